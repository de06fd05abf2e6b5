"""Drafting without a model, to compare with: prompt lookup (n-grams)."""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class PromptLookup:
    """Drafts what followed the latest earlier occurrence of the row's last tokens. Stands in for a `Drafter`."""

    block_size: int = 8
    """K: tokens verified per round."""
    longest: int = 3
    """Most tokens that an occurrence must share; fewer, down to one, where there is none of so many."""


def look_up(tokens, length, *, config: PromptLookup) -> jax.Array:
    """K-1 drafts for every row, int32 `[B, K-1]`.

    Of all earlier places that end as the row ends, the one that shares most tokens (at most `longest`) is taken, of
    equals the latest. What follows it is drafted; where that reaches the row's end it repeats, as a loop would.
    A row whose last token is new drafts that token.

    Args:
      tokens: int32 `[B, T]`, committed tokens, then anything.
      length: int32 `[B]`, committed tokens, at least 1.
      config: static.
    """
    ends = jnp.arange(tokens.shape[1])

    def row(tokens, length):
        matching, shared = ends < length - 1, jnp.zeros_like(ends)
        for back in range(config.longest):
            before = jnp.where(ends >= back, jnp.roll(tokens, back), -1)
            matching &= before == tokens[length - 1 - back]
            shared += matching
        best = jnp.argmax(jnp.where(shared > 0, shared * len(ends) + ends, -1))
        end = jnp.where(shared[best] > 0, best, length - 2)
        period = length - 1 - end
        return tokens[end + 1 + jnp.arange(config.block_size - 1) % period]

    return jax.vmap(row)(tokens, length)
