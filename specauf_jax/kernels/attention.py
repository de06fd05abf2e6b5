"""Attention over ranges: every query sees the keys `start <= j < stop` of its row.

For decoding, where the keys are a cache and a query sees (0, position + 1); training's attention, with tiles that
nobody sees, is in block_attention.py.
"""

import jax
import jax.numpy as jnp
from jax import lax

from specauf_jax.kernels.chunks import map_chunks

NO_WINDOW = 0  # as the `window` of a layer that has none
QUERY_CHUNK = 512  # queries whose scores over the whole row exist at one time


@jax.named_scope("attention")
def attend(q: jax.Array, k: jax.Array, v: jax.Array, start: jax.Array, stop: jax.Array) -> jax.Array:
    """Softmax attention with grouped key/value heads.

    Args:
      q: `[B, T, H, E]`.
      k, v: `[B, S, G, E]`, H a multiple of G.
      start, stop: int `[B, T]`; a query with an empty range gets 0.

    Returns:
      `[B, T, H, E]` in q's dtype.
    """

    def chunk(q, start, stop):
        scores = grouped_scores("btgre,bsge->bgrts", q, k)
        probabilities = masked_softmax(scores, in_range(start, stop, k.shape[1])[:, None, None])
        mixed = jnp.einsum("bgrts,bsge->btgre", probabilities.astype(v.dtype), v)
        return mixed.reshape(q.shape)

    return map_chunks(chunk, QUERY_CHUNK, q, start, stop)


def in_range(start, stop, length: int) -> jax.Array:
    """Whether `start <= j < stop`: bool `[..., length]` of int `[...]`."""
    j = jnp.arange(length)
    return (j >= start[..., None]) & (j < stop[..., None])


def grouped_scores(equation: str, q, k) -> jax.Array:
    """Scaled scores in float32; q's H heads are viewed as G groups of r."""
    *lead, H, E = q.shape
    G = k.shape[-2]
    grouped = q.reshape(*lead, G, H // G, E)
    return jnp.einsum(equation, grouped, k, preferred_element_type=jnp.float32) * (E**-0.5)


def masked_softmax(scores, visible) -> jax.Array:
    """Softmax over the visible keys; all zeros, with finite gradients, where none is visible."""
    scores = jnp.where(visible, scores, -jnp.inf)
    peak = lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    powers = jnp.exp(scores - jnp.where(jnp.isfinite(peak), peak, 0.0))
    return powers / jnp.maximum(powers.sum(-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
