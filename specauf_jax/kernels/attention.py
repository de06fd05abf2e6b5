"""Attention over ranges: every query sees the keys `start <= j < stop` of its row.

One rule serves all of the system: causal attention in packed rows (start = first token of the
document, stop = own index + 1), attention over a cache (0, position + 1), and the context of a
drafted block (start of the document, anchor).
"""

import jax
import jax.numpy as jnp
from jax import lax

from specauf_jax.kernels.chunks import map_chunks

NO_WINDOW = 0  # as the `window` of a layer that has none
QUERY_CHUNK = 512  # queries whose scores over the whole row exist at one time


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
        scores = _scores("btgre,bsge->bgrts", q, k)
        probabilities = _masked_softmax(scores, _in_range(start, stop, k.shape[1])[:, None, None])
        mixed = jnp.einsum("bgrts,bsge->btgre", probabilities.astype(v.dtype), v)
        return mixed.reshape(q.shape)

    return map_chunks(chunk, QUERY_CHUNK, q, start, stop)


def block_attend(q, k, v, context_k, context_v, start, stop, keep, window=None, *, anchor_chunk: int) -> jax.Array:
    """Attention of drafted blocks: a range of the row's context, and all slots of the own block.

    Args:
      q: `[B, A, K, H, E]`.
      k, v: `[B, A, K, G, E]`, of the block itself.
      context_k, context_v: `[B, S, G, E]`.
      start, stop: int `[B, A]`, the context that each block sees; stop is the index of its slot 0.
      keep: bool `[B, A]`; a block that is not kept sees nothing and gets 0.
      window: int [], positions that a slot sees, ending with its own; NO_WINDOW or None for all of
        the range and the block's later slots too.
      anchor_chunk: blocks whose scores exist at one time.

    Returns:
      `[B, A, K, H, E]` in q's dtype.
    """
    S, K = context_k.shape[1], q.shape[2]
    slot = jnp.arange(K)

    def seen(start, stop, keep):
        """Context and block as seen by each slot, bool `[B, A, K or 1, S + K]`."""
        context, block = _in_range(start, stop, S)[..., None, :], jnp.ones((1, K), bool)
        if window is not None:
            everything = window == NO_WINDOW
            first = stop[..., None] + slot - (window - 1)
            context = context & (everything | (jnp.arange(S) >= first[..., None]))
            block = everything | ((slot <= slot[:, None]) & (slot > slot[:, None] - window))
        block = jnp.broadcast_to(block, (*keep.shape, *block.shape))
        context = jnp.broadcast_to(context, (*block.shape[:-1], S))
        return jnp.concatenate([context, block], axis=-1) & keep[..., None, None]

    def chunk(q, k, v, start, stop, keep):
        context_scores = _scores("bakgre,bsge->bgraks", q, context_k)
        block_scores = _scores("bakgre,bajge->bgrakj", q, k)
        scores = jnp.concatenate([context_scores, block_scores], axis=-1)
        probabilities = _masked_softmax(scores, seen(start, stop, keep)[:, None, None]).astype(v.dtype)
        mixed = jnp.einsum("bgraks,bsge->bakgre", probabilities[..., :S], context_v)
        mixed += jnp.einsum("bgrakj,bajge->bakgre", probabilities[..., S:], v)
        return mixed.reshape(q.shape)

    return map_chunks(chunk, anchor_chunk, q, k, v, start, stop, keep)


def _in_range(start, stop, length):
    j = jnp.arange(length)
    return (j >= start[..., None]) & (j < stop[..., None])


def _scores(equation, q, k):
    """Scaled scores in float32; q's H heads are viewed as G groups of r."""
    *lead, H, E = q.shape
    G = k.shape[-2]
    grouped = q.reshape(*lead, G, H // G, E)
    return jnp.einsum(equation, grouped, k, preferred_element_type=jnp.float32) * (E**-0.5)


def _masked_softmax(scores, visible):
    """Softmax over the visible keys; all zeros, with finite gradients, where none is visible."""
    scores = jnp.where(visible, scores, -jnp.inf)
    peak = lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    powers = jnp.exp(scores - jnp.where(jnp.isfinite(peak), peak, 0.0))
    return powers / jnp.maximum(powers.sum(-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
