"""Domino's head (arXiv 2605.29707): the logits of a block's slots, corrected by what was drafted before them.

A GRU reads the block's tokens up to the one before a draft; with the drafter's hidden state its own
gives a low-rank correction of that draft's logits. n counts drafts: draft n is the token n + 1
after the anchor, whichever slot predicts it (`Drafter.first_slot`).
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from specauf_jax.architecture import Drafter
from specauf_jax.sharding import spread_rows


class PrefixGRU(nnx.Module):
    """One recurrent layer without biases; the gates r, z, n stand side by side, as in PyTorch's nn.GRU."""

    def __init__(self, config: Drafter, *, rngs: nnx.Rngs):
        D, R = config.hidden_size, config.gru_hidden_dim
        uniform = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        self.input = nnx.Linear(D, 3 * R, use_bias=False, kernel_init=uniform, rngs=rngs)
        self.hidden = nnx.Linear(R, 3 * R, use_bias=False, kernel_init=uniform, rngs=rngs)


class EmbedProj(nnx.Module):
    """Correction of rank `emb_dim`: up(silu(down([z; s])))."""

    def __init__(self, config: Drafter, *, rngs: nnx.Rngs):
        D, R = config.hidden_size, config.gru_hidden_dim
        normal = nnx.initializers.normal(0.02)
        self.down = nnx.Linear(D + R, config.emb_dim, use_bias=False, kernel_init=normal, rngs=rngs)
        self.up = nnx.Linear(config.emb_dim, config.vocab_size, use_bias=False, kernel_init=normal, rngs=rngs)


def next_state(params: dict, state: jax.Array, embedding: jax.Array) -> jax.Array:
    """The GRU's state after one more token: `[..., R]`, `[..., D]` → `[..., R]`."""
    return _gates(params, state, embedding @ params["prefix_gru"]["input"]["kernel"])


def prefix_states(params: dict, embeddings: jax.Array) -> jax.Array:
    """The GRU's state after each of a block's tokens, from zero: `[..., N, D]` → `[..., N, R]`."""
    inputs = spread_rows(embeddings) @ params["prefix_gru"]["input"]["kernel"]
    R = params["prefix_gru"]["hidden"]["kernel"].shape[0]

    def step(state, gates):
        state = _gates(params, state, gates)
        return state, state

    start = jnp.zeros((*inputs.shape[:-2], R), inputs.dtype)
    _, states = lax.scan(step, start, jnp.moveaxis(inputs, -2, 0))
    return jnp.moveaxis(states, 0, -2)


def correction_features(params: dict, hidden: jax.Array, states: jax.Array, n, *, config: Drafter) -> jax.Array:
    """What `embed_proj.up` turns into the correction of draft n's logits; 0 where none is due.

    Args:
      params: of a Domino drafter.
      hidden: `[..., D]`, z: the drafter's state of the slot that predicts draft n.
      states: `[..., R]`, s: the GRU's after the token before draft n.
      n: int, broadcast against `[...]`; drafts below `pure_draft_prefix_len` are not corrected.
      config: resolved.

    Returns:
      `[..., emb_dim]`.
    """
    features = jax.nn.silu(jnp.concatenate([hidden, states], axis=-1) @ params["embed_proj"]["down"]["kernel"])
    return jnp.where((n >= config.pure_draft_prefix_len)[..., None], features, 0)


def _gates(params: dict, state, inputs):
    """r, z = σ(W x + U h); h' = (1 - z) · tanh(W x + r · U h) + z · h. The reset follows the product U h."""
    r_in, z_in, n_in = jnp.split(inputs, 3, axis=-1)
    r_h, z_h, n_h = jnp.split(state @ params["prefix_gru"]["hidden"]["kernel"], 3, axis=-1)
    reset, update = jax.nn.sigmoid(r_in + r_h), jax.nn.sigmoid(z_in + z_h)
    return (1 - update) * jnp.tanh(n_in + reset * n_h) + update * state
