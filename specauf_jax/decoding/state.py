"""What decoding carries from round to round, and what each part of a round hands to the next."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from specauf_jax.architecture import ResolvedDrafter
from specauf_jax.config import MOST_TREE_NODES
from specauf_jax.decoding.baselines import PromptLookup
from specauf_jax.errors import SpecaufError
from specauf_jax.models.layers import KVCache
from specauf_jax.models.target import target_head
from specauf_jax.pytrees import pytree


@dataclasses.dataclass(frozen=True)
class Decoding:
    """Static data of a round.

    Attributes:
      target_step: `(params, tokens [B, T], positions [B, T], cache) -> (logits [B, T, V],
        taps [B, T, L·D], cache)`, pure; see `specauf_jax.models.target.TargetStep` for what its
        cache must allow. Hashable, as everything here.
      drafter: resolved, or prompt lookup; None decodes autoregressively, by the same code with no drafts.
      stop_tokens: ids that end a row.
      verify_slots: tokens verified per round, fewer than the drafter's block holds; None for all of them.
      tree_nodes: N, nodes of the draft tree of a round (`specauf_jax.decoding.tree`), whose target pass reads N + 1
        tokens; None for a chain. Needs a target step with `read_tree` and `keep`, as `TargetStep` has.
      tree_temperature: of the drafter's distribution when a tree's paths are chosen, times that of sampling.
      target_head: target_params → Head, for a target whose parameters are not ours.
    """

    target_step: Any
    drafter: ResolvedDrafter | PromptLookup | None = None
    stop_tokens: tuple[int, ...] = ()
    verify_slots: int | None = None
    tree_nodes: int | None = None
    tree_temperature: float = 1.0
    target_head: Callable = target_head

    def __post_init__(self):
        if self.verify_slots is not None and not 1 <= self.verify_slots <= self._whole:
            raise SpecaufError(
                f"verify_slots {self.verify_slots}",
                f"from 1 to the {self._whole} of the drafter's block",
                "change --verify-slots, or leave it out",
            )
        if self.tree_nodes is not None:
            self._check_tree()
        heat = self.tree_temperature
        if not 0 < heat < math.inf or (heat != 1 and self.tree_nodes is None):
            raise SpecaufError(
                f"tree_temperature {heat} with tree_nodes {self.tree_nodes}",
                "a finite number above 0, of a tree",
                "change --tree-temperature, or leave it out",
            )

    def _check_tree(self):
        what, methods = f"tree_nodes {self.tree_nodes}", ("read_tree", "keep")
        if type(self.tree_nodes) is not int or not 1 <= self.tree_nodes <= MOST_TREE_NODES:
            raise SpecaufError(
                what, f"a whole number from 1 to {MOST_TREE_NODES}", "change --tree-nodes, or leave it out"
            )
        if self.model is None or self.verify_slots is not None:
            other = "no drafter that predicts" if self.model is None else f"verify_slots {self.verify_slots}"
            raise SpecaufError(f"{what} with {other}", "a drafter, and all of its slots", "leave one of the two out")
        if not all(hasattr(self.target_step, name) for name in methods):
            raise SpecaufError(
                f"{what} with a target step that reads chains alone, as linear attention (Qwen3.5) does",
                f"one with {' and '.join(methods)}, as specauf_jax.TargetStep has",
                "leave --tree-nodes out, or write the two",
            )

    @property
    def _whole(self) -> int:
        return self.drafter.block_size if self.drafter else 1

    @property
    def block_size(self) -> int:
        """K, the most tokens that a round commits; 1 without a drafter."""
        return self.verify_slots or self._whole

    @property
    def width(self) -> int:
        """Tokens that the target reads of a row in a round: K, or N + 1."""
        return self.block_size if self.tree_nodes is None else self.tree_nodes + 1

    @property
    def model(self) -> ResolvedDrafter | None:
        """The drafter, if it is one with parameters and a cache."""
        return self.drafter if isinstance(self.drafter, ResolvedDrafter) else None


@pytree
class DecodeState:
    """Rows of different lengths at different points. Caches hold all positions before the anchor."""

    tokens: jax.Array  # int32 [B, T]: committed tokens, the prompt first
    length: jax.Array  # int32 [B]: committed tokens; the last of them is the anchor
    limit: jax.Array  # int32 [B]: length at which the row stops, at most T
    done: jax.Array  # bool [B]
    keys: jax.Array  # PRNG keys [B]; a row's draws do not depend on its neighbours
    temperature: jax.Array  # float32 [B]; 0 is greedy
    top_k: jax.Array  # int32 [B]; 0 for all
    top_p: jax.Array  # float32 [B]; 1 for all
    target_cache: Any  # room for positions up to max(limit) + K - 2
    drafter_cache: KVCache | None  # [M, B, G, ≥ max(limit) + K - 1, E]


@pytree
class Proposal:
    """What the drafter suggests. Without a drafter, K-1 = 0."""

    tokens: jax.Array  # int32 [B, K-1]
    chances: jax.Array  # float32 [B, K-1], q of each draft; 1 of those that were not drawn
    logits: jax.Array | None  # float32 [B, K-1, V]; None for drafts that were not drawn: all of q is on them
    survival: jax.Array | None = None  # float32 [B, K-1]: predicted probability that this many drafts stand


@pytree
class Verdict:
    """What the target makes of it."""

    accepted: jax.Array  # int32 [B]: leading drafts that stand
    token: jax.Array  # int32 [B]: the target's own token after them


@pytree
class Round:
    """What one round did, row by row."""

    active: jax.Array  # bool [B]: the row was not done before
    accepted: jax.Array  # int32 [B]: drafts that the target agreed with, before any stop; 0 if not active
    tokens: jax.Array  # int32 [B, K]: committed tokens, the first `emitted` of each row
    emitted: jax.Array  # int32 [B]: accepted + 1, less what a stop cut off; 0 if not active
    survival: jax.Array | None = None  # float32 [B, K-1], of the proposal


def init_state(tokens, length, limit, keys, how, *, target_cache, drafter_cache: KVCache | None = None) -> DecodeState:
    """Rows before their prompts are read (see `prefill`).

    Args:
      tokens: int32 `[B, T]`, prompts on the left, room for the rest.
      length: int32 `[B]`, prompt lengths, at least 1.
      limit: int32 `[B]`; a row with limit = length is done from the start.
      keys: PRNG keys `[B]`.
      how: temperature, top_k, top_p, each [] for all rows or `[B]`.
      target_cache, drafter_cache: empty, with room as DecodeState says.
    """
    temperature, top_k, top_p = (jnp.broadcast_to(x, length.shape) for x in how)
    return DecodeState(
        tokens=tokens,
        length=length,
        limit=limit,
        done=length >= limit,
        keys=keys,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        target_cache=target_cache,
        drafter_cache=drafter_cache,
    )
