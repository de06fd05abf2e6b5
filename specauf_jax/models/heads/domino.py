"""Domino's head (arXiv 2605.29707): the logits of a block's slots, corrected by what was drafted before them.

A GRU reads the block's tokens up to the one before a draft; with the drafter's hidden state its own
gives a low-rank correction of that draft's logits. n counts drafts: draft n is the token n + 1
after the anchor, whichever slot predicts it (`first_slot`).
"""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from specauf_jax.architecture import Head
from specauf_jax.checks import not_negative, positive
from specauf_jax.kernels.lm_head import chunked_scores, project
from specauf_jax.models.heads.dflash import DFlash
from specauf_jax.objectives import label_scores
from specauf_jax.sharding import gather_head, spread_rows


@dataclass(frozen=True)
class Domino(Head):
    """The body runs once; then the head rolls over its own drafts. The branch `base` is the body's own logits."""

    emb_dim: int = 256
    """Rank of the correction."""
    gru_hidden_dim: int = 1024
    """R: width of the recurrent state."""
    pure_draft_prefix_len: int = 1
    """Drafts before the first corrected one."""
    shift_label: bool = True
    """Slot k predicts the token k + 1 after the anchor (the public drafters' way), else the token k after it."""

    projector_type = "domino"
    aliases = ("causal_v5",)
    title = "Domino"
    architectures = ("DFlashDraftModel", "DominoDraftModel")
    tensors = {
        "prefix_gru.input.weight": "prefix_gru.weight_ih_l0",
        "prefix_gru.hidden.weight": "prefix_gru.weight_hh_l0",
        "embed_proj.down.weight": "embed_proj.0.weight",
        "embed_proj.up.weight": "embed_proj.2.weight",
    }
    top_level = ("emb_dim",)
    early_prefix = "logit_head."
    branches = ("final", "base")
    num_anchors = 256
    engines = {
        "vLLM": ("no", "has no Domino (its check of config.json passes; its loader was not tried)"),
        "tpu-inference": ("no", "fails on Domino's tensors, which it does not know"),
        "sglang-jax": ("differently", "ignores Domino's head: plain DFlash, one slot late where labels are shifted"),
        "speculators": ("no", "has no place for Domino's head in its layout"),
        "z-lab": ("differently", "ignores Domino's head: plain DFlash"),
    }

    def __post_init__(self):
        positive(self, "emb_dim", "gru_hidden_dim")
        not_negative(self, "pure_draft_prefix_len")

    @property
    def first_slot(self) -> int:
        return 0 if self.shift_label else 1

    def modules(self, drafter, rngs):
        D, V = drafter.hidden_size, drafter.vocab_size
        return {
            "prefix_gru": PrefixGRU(D, self.gru_hidden_dim, rngs=rngs),
            "embed_proj": EmbedProj(D + self.gru_hidden_dim, self.emb_dim, V, rngs=rngs),
        }

    def training_scores(
        self, params, hidden, *, embedding, lm_head, previous, labels, valid, target_hidden, objectives, chunk, skip
    ):
        states = prefix_states(params, lax.stop_gradient(embedding[previous]).astype(hidden.dtype))
        features = self.correction_features(params, hidden, states, jnp.arange(labels.shape[-1]))
        up = gather_head(params["embed_proj"]["up"]["kernel"])

        def scores(labels, hidden, features, *target_hidden):
            base = project(hidden, lm_head)
            logits = {"final": base + project(features, up), "base": base}
            target = project(*target_hidden, lm_head) if target_hidden else None
            return {
                name: label_scores(logits[name], labels, target if objective.soft else None, objective)
                for name, objective in objectives.items()
            }

        states = () if target_hidden is None else (target_hidden,)
        return chunked_scores(scores, (labels, hidden, features, *states), chunk=chunk)

    def first_state(self, shape, dtype):
        return jnp.zeros((*shape, self.gru_hidden_dim), dtype)

    def next_logits(self, params, state, token, n, hidden, logits, *, embedding):
        state = next_state(params, state, embedding[token])
        hidden = jnp.broadcast_to(hidden, (*state.shape[:-1], hidden.shape[-1]))
        features = self.correction_features(params, hidden, state, n)
        return state, logits + project(features, params["embed_proj"]["up"]["kernel"])

    def correction_features(self, params: dict, hidden: jax.Array, states: jax.Array, n) -> jax.Array:
        """What `embed_proj.up` turns into the correction of draft n's logits; 0 where none is due.

        Args:
          params: of the drafter.
          hidden: `[..., D]`, z: the body's state of the slot that predicts draft n.
          states: `[..., R]`, s: the GRU's after the token before draft n.
          n: int, broadcast against `[...]`; drafts below `pure_draft_prefix_len` are not corrected.

        Returns:
          `[..., emb_dim]`.
        """
        features = jax.nn.silu(jnp.concatenate([hidden, states], axis=-1) @ params["embed_proj"]["down"]["kernel"])
        return jnp.where((n >= self.pure_draft_prefix_len)[..., None], features, 0)

    def draft_flops(self, drafter):
        D, R, rank = drafter.hidden_size, self.gru_hidden_dim, self.emb_dim
        return {"correction": 2 * 3 * (D + R) * R + 2 * (D + R) * rank + 2 * rank * drafter.vocab_size}

    def variants(self):
        other = dataclasses.replace(self, shift_label=not self.shift_label)
        return [("labels", "the other label convention", other), ("plain", "plain DFlash", DFlash())]


HEAD = Domino


class PrefixGRU(nnx.Module):
    """One recurrent layer without biases; the gates r, z, n stand side by side, as in PyTorch's nn.GRU."""

    def __init__(self, D: int, R: int, *, rngs: nnx.Rngs):
        uniform = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        self.input = nnx.Linear(D, 3 * R, use_bias=False, kernel_init=uniform, rngs=rngs)
        self.hidden = nnx.Linear(R, 3 * R, use_bias=False, kernel_init=uniform, rngs=rngs)


class EmbedProj(nnx.Module):
    """Correction of low rank: up(silu(down([z; s])))."""

    def __init__(self, inputs: int, rank: int, V: int, *, rngs: nnx.Rngs):
        normal = nnx.initializers.normal(0.02)
        self.down = nnx.Linear(inputs, rank, use_bias=False, kernel_init=normal, rngs=rngs)
        self.up = nnx.Linear(rank, V, use_bias=False, kernel_init=normal, rngs=rngs)


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


def _gates(params: dict, state, inputs):
    """r, z = σ(W x + U h); h' = (1 - z) · tanh(W x + r · U h) + z · h. The reset follows the product U h."""
    r_in, z_in, n_in = jnp.split(inputs, 3, axis=-1)
    r_h, z_h, n_h = jnp.split(state @ params["prefix_gru"]["hidden"]["kernel"], 3, axis=-1)
    reset, update = jax.nn.sigmoid(r_in + r_h), jax.nn.sigmoid(z_in + z_h)
    return (1 - update) * jnp.tanh(n_in + reset * n_h) + update * state
