"""Whether greedy speculation wrote the target's own tokens, told apart from rounding.

A pass over K tokens adds numbers in another order than a pass over one, so that two logits of the target which are
equal but for rounding may change places between the two. Where texts part, the target alone reads what they have in
common twice, one token at a time and K at a time, from the start; δ is the largest difference of any logit between the
two readings. The two next tokens are a *tie* if in both readings they are the two best and no further apart than 2 δ,
by which their distance may change as each of their logits moves by δ. Rounding explains a δ of at most 1e-4 (float32)
or 0.03 (bfloat16) of the largest logit; more is not counted. What is no tie is a mismatch: speculation is not exact.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from specauf_jax.decoding.rows import Generation
from specauf_jax.decoding.speculate import settled
from specauf_jax.decoding.state import Decoding
from specauf_jax.distributed import to_host
from specauf_jax.models.layers import float_dtype
from specauf_jax.sharding import batch_sharding

_MOST_ROUNDING = {"float32": 1e-4, "bfloat16": 3e-2}  # of the largest logit


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Texts compared with the target's own: how many, how many differ, and how many more differ by a tie alone."""

    compared: int = 0
    mismatches: int = 0
    gaps: tuple[float, ...] = ()
    """Of each tie, the distance of the two logits."""

    def __add__(self, other: "Comparison") -> "Comparison":
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Comparison(*(a + b for a, b in pairs))

    def results(self) -> dict:
        """As in results files; `exact` is None where nothing was compared."""
        return {
            "exact": not self.mismatches if self.compared else None,
            "compared": self.compared,
            "mismatches": self.mismatches,
            "ties": len(self.gaps),
            "largest_tie_gap": max(self.gaps, default=None),
        }


def said(results: dict) -> str:
    """`Comparison.results` in a few words."""
    if results["exact"] is None:
        return "sampled"
    text = "exact" if results["exact"] else f"{results['mismatches']} of {results['compared']} DIFFER"
    if results["ties"]:
        text += f", ties: {results['ties']}, largest gap {results['largest_tie_gap']:.1g}"
    return text


def compare(
    found: Sequence[Generation], expected, target_params, config: Decoding, batch_size: int, mesh
) -> Comparison:
    """Compare speculative texts with autoregressive ones of the same prompts, both greedy.

    Args:
      found, expected: Generations, in the same order.
      target_params, config, mesh: that `found` was decoded with.
      batch_size: rows that decoded together; the target reads again in as many.
    """
    total = Comparison(compared=len(found))
    for one, other in zip(found, expected, strict=True):
        if one.tokens != other.tokens:
            gap = _tie(one, other, target_params, config, batch_size, mesh)
            total += Comparison(mismatches=1) if gap is None else Comparison(gaps=(gap,))
    return total


def _tie(one: Generation, other: Generation, target_params, config: Decoding, batch_size: int, mesh) -> float | None:
    """The distance of the two tokens where the texts part; None if rounding does not explain it."""
    parting = next((i for i, (a, b) in enumerate(zip(one.tokens, other.tokens, strict=False)) if a != b), None)
    if parting is None:
        return None  # one goes on where the other stops
    text, K = [*one.prompt, *one.tokens[:parting]], config.width
    room = K * (1 << (-(-len(text) // K) - 1).bit_length())
    tokens = np.zeros((batch_size, room), np.int32)
    tokens[:, : len(text)] = text
    rows = tokens if mesh is None else jax.device_put(tokens, batch_sharding(mesh))
    logits, moved = to_host(_read_twice(target_params, rows, len(text), config=config))
    pair = [one.tokens[parting], other.tokens[parting]]
    best_two = all((np.delete(row, pair) <= row[pair].min()).all() for row in logits)
    rounding = _MOST_ROUNDING[float_dtype(target_params).name] * np.abs(logits).max()
    gap = float(np.abs(np.diff(logits[:, pair])).max())
    return gap if best_two and gap <= 2 * min(moved, rounding) else None


@functools.partial(jax.jit, static_argnames="config")
def _read_twice(target_params, tokens, length, *, config):
    """The last token's logits `[2, V]` of a reading token by token and of one by K, and δ over all positions.

    Args:
      tokens: int32 `[B, T]`, the same text in every row.
      length: int32 [], of the text.
    """
    (B, T), K = tokens.shape, config.width
    step, dtype = config.target_step, float_dtype(target_params)

    def read(start, width, cache):
        block = lax.dynamic_slice_in_dim(tokens, start, width, axis=1)
        positions = jnp.broadcast_to(start + jnp.arange(width), block.shape)
        logits, _, cache = step(target_params, block, positions, cache)
        return logits[0].astype(jnp.float32), settled(config, cache, jnp.full(B, width))

    def block(i, carry):
        last, moved, singly, together = carry
        wide, together = read(i * K, K, together)

        def one(cache, k):
            logits, cache = read(i * K + k, 1, cache)
            return cache, logits[0]

        singly, narrow = lax.scan(one, singly, jnp.arange(K))
        inside = (i * K + jnp.arange(K) < length)[:, None]
        moved = jnp.maximum(moved, jnp.where(inside, jnp.abs(wide - narrow), 0.0).max())
        at = (length - 1) % K
        return jnp.stack([narrow[at], wide[at]]), moved, singly, together

    caches = [step.init_cache(B, T, dtype) for _ in range(2)]
    V = jax.eval_shape(lambda: read(0, 1, caches[0])[0]).shape[-1]
    start = jnp.zeros((2, V), jnp.float32), jnp.float32(0), *caches
    return lax.fori_loop(0, -(-length // K), block, start)[:2]
