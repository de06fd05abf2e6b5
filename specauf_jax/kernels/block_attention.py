"""Attention of drafted blocks: every slot sees a range of its row's context and a range of its own block.

Both parts share one softmax, whose running maximum and sum start with the own block and go on over tiles of the
context. Three forms give the same numbers: `dense` (all scores at one time; the reference, and what GPUs take where the
scores are few), loops of XLA, and a kernel for TPU. The last two skip tiles that no slot of theirs sees, and keep of a
forward pass only its result and the log-sum-exp of the scores.
"""

import jax
import jax.numpy as jnp
from jax import lax

from specauf_jax.kernels import block_attention_tpu as tpu
from specauf_jax.kernels import block_attention_xla as xla
from specauf_jax.kernels.attention import NO_WINDOW, in_range
from specauf_jax.sharding import heads_spec, mesh_of, per_device, rows_spec

# Bytes of all scores up to which a GPU takes them at one time: it would wait for loops whose length the data know.
GPU_SCORES = 2**30
_HEADS = (3, 3, 3, 2, 2, None)  # axis of the heads of (q, k, v, context_k, context_v, ranges)


@jax.named_scope("attention")
def block_attention(q, k, v, context_k, context_v, start, stop, keep, window=None) -> jax.Array:
    """Softmax attention with grouped key/value heads; an array of A·K·S numbers only on GPUs, where it is small.

    Args:
      q: `[B, A, K, H, E]`.
      k, v: `[B, A, K, G, E]`, of the block itself; H is a multiple of G.
      context_k, context_v: `[B, S, G, E]`.
      start, stop: int `[B, A]`, the context that each block sees; stop is the index of its slot 0.
      keep: bool `[B, A]`; a block that is not kept sees nothing and gets 0.
      window: int [], positions that a slot sees, ending with its own; NO_WINDOW or None for all of
        the range and the block's later slots too.

    Returns:
      `[B, A, K, H, E]` in q's dtype.
    """
    ranges = visible_ranges(start, stop, keep, q.shape[2], window)
    if jax.default_backend() == "gpu" and 4 * q.size // q.shape[-1] * (context_k.shape[1] + q.shape[2]) <= GPU_SCORES:
        return dense(q, k, v, context_k, context_v, ranges)
    return with_gradient(_forward, _backward)(q, k, v, context_k, context_v, ranges)


def causal_attention(q, k, v, start, sinks=None) -> jax.Array:
    """Attention of packed rows: every token is a block of one slot, and sees a range that ends with itself.

    Args:
      q: `[B, S, H, E]`.
      k, v: `[B, S, G, E]`, H a multiple of G.
      start: int32 `[B, S]`, first index that each token sees: of its document, or of its window.
      sinks: `[H]`, a score beside those of what is seen, whose share of the softmax goes nowhere; None for none. With
        sinks there is no gradient.

    Returns:
      `[B, S, H, E]` in q's dtype.
    """
    index = jnp.broadcast_to(jnp.arange(start.shape[1], dtype=start.dtype), start.shape)
    own = q[:, :, None], k[:, :, None], v[:, :, None]
    everything = jnp.ones_like(index, bool)
    if sinks is None:
        return block_attention(*own, k, v, start, index, everything)[:, :, 0]
    with jax.named_scope("attention"):
        mixed, lse = _forward(*own, k, v, visible_ranges(start, index, everything, 1))
        share = jax.nn.sigmoid(lse - sinks.astype(jnp.float32))
        return (mixed * share[..., None]).astype(q.dtype)[:, :, 0]


def visible_ranges(start, stop, keep, slots: int, window=None) -> jax.Array:
    """What each slot sees, as int32 `[B, A, 4, K]`: context from, context to, own slots from, own slots to.

    Args: as for `block_attention`; slots: K.
    """
    slot = jnp.arange(slots)
    start, stop, first, last = start[..., None], stop[..., None], jnp.zeros_like(slot), jnp.full_like(slot, slots)
    if window is not None:
        everything, back = window == NO_WINDOW, slot - (window - 1)
        start = jnp.where(everything, start, jnp.maximum(start, stop + back))
        first, last = jnp.where(everything, 0, jnp.maximum(back, 0)), jnp.where(everything, slots, slot + 1)
    parts = [jnp.broadcast_to(part, (*keep.shape, slots)) for part in (start, stop, first, last)]
    return jnp.where(keep[..., None, None], jnp.stack(parts, axis=2), 0).astype(jnp.int32)


def dense(q, k, v, context_k, context_v, ranges) -> jax.Array:
    """`block_attention` with all scores at one time, in ordinary operations.

    Args: as for `block_attention`, with `visible_ranges`.
    """
    S, K = context_k.shape[1], k.shape[2]
    start, stop, first, last = jnp.moveaxis(ranges, 2, 0)
    visible = jnp.concatenate([in_range(start, stop, S), in_range(first, last, K)], axis=-1)[:, None, None]
    context_scores = _grouped_scores("bakgre,bsge->bgraks", q, context_k)
    block_scores = _grouped_scores("bakgre,bajge->bgrakj", q, k)
    scores = jnp.concatenate([context_scores, block_scores], axis=-1)
    probabilities = _masked_softmax(scores, visible).astype(v.dtype)
    mixed = jnp.einsum("bgraks,bsge->bakgre", probabilities[..., :S], context_v)
    mixed += jnp.einsum("bgrakj,bajge->bakgre", probabilities[..., S:], v)
    return mixed.reshape(q.shape)


def _grouped_scores(equation: str, q, k) -> jax.Array:
    """Scaled scores in float32; q's H heads are viewed as G groups of r."""
    *lead, H, E = q.shape
    G = k.shape[-2]
    grouped = q.reshape(*lead, G, H // G, E)
    return jnp.einsum(equation, grouped, k, preferred_element_type=jnp.float32) * (E**-0.5)


def _masked_softmax(scores, visible) -> jax.Array:
    """Softmax over the visible keys; all zeros, with finite gradients, where none is visible."""
    scores = jnp.where(visible, scores, -jnp.inf)
    peak = lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    powers = jnp.exp(scores - jnp.where(jnp.isfinite(peak), peak, 0.0))
    return powers / jnp.maximum(powers.sum(-1, keepdims=True), jnp.finfo(jnp.float32).tiny)


def with_gradient(forward, backward):
    """Attention by a forward and a backward pass of its own, which computes the scores anew.

    Args:
      forward: (q, k, v, context_k, context_v, ranges) → the mixed values like q, and float32 `[B, A, K, H]`
        log-sum-exp of each query's scores.
      backward: (the same, the mixed values, log-sum-exp, cotangent like q) → gradients of the five arrays.
    """

    def save(*arrays):
        mixed, lse = forward(*arrays)
        return mixed, (arrays, mixed, lse)

    def pull(saved, cotangent):
        arrays, mixed, lse = saved
        return *backward(*arrays, mixed, lse, cotangent), None  # none for the ranges

    attention = jax.custom_vjp(lambda *arrays: forward(*arrays)[0])
    attention.defvjp(save, pull)
    return attention


def _forward(*arrays):
    return _on_device(xla.forward, tpu.forward, arrays, _HEADS, (3, 3))


def _backward(*arrays):
    return _on_device(xla.backward, tpu.backward, arrays, (*_HEADS, 3, 3, 3), _HEADS[:5])


def _on_device(loops, kernel, arrays, heads, out_heads):
    """The kernel where it is lowered for TPU and can hold the shapes, loops elsewhere; each device its own part."""

    def run(*arrays):
        if not tpu.holds(*arrays[:5]):
            return loops(*arrays)
        return lax.platform_dependent(*arrays, tpu=kernel, default=loops)

    B, _, groups, _ = arrays[3].shape
    mesh = mesh_of(arrays[0])

    def specs(axes):
        return tuple(heads_spec(mesh, B, groups, axis) if axis else rows_spec(mesh, B) for axis in axes)

    return per_device(run, mesh, specs(heads), specs(out_heads))(*arrays)
