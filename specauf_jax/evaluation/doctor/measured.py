"""Acceptance of a drafter under several readings of its config, on the same prompts.

Greedy decoding writes the same text whatever the drafter (but for ties within rounding), so that
readings are compared prompt by prompt: only the number of rounds differs.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Literal

import jax.numpy as jnp
import numpy as np

from specauf_jax.architecture import ResolvedDrafter, Target
from specauf_jax.decoding.generate import Generation, generate
from specauf_jax.decoding.state import Decoding
from specauf_jax.evaluation.measure import tau_micro
from specauf_jax.models.drafter import drafter_shapes
from specauf_jax.models.target import TargetStep, target_head

CLEAR, SMALL = 0.10, 0.02
"""Gains in tau from which on a difference counts as a fault, and as worth a look."""
_FEW = 4  # prompts


@dataclasses.dataclass(frozen=True)
class Reading:
    """One way to understand the drafter's folder."""

    kind: Literal["given", "ids", "labels", "mask", "rope", "windows", "plain"]
    """What it changes; nothing for "given"."""
    name: str
    layer_ids: tuple[int, ...]
    drafter: ResolvedDrafter
    errors: float = 2.0
    """Standard errors by which it must be better before it counts: more for the best of many."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """What decoding with a reading gave."""

    reading: Reading
    generations: list[Generation]

    @property
    def accepted(self) -> list[list[int]]:
        """Drafts accepted in every round of every prompt."""
        return [generation.accepted for generation in self.generations]

    @property
    def tau(self) -> float:
        """Tokens per round, over all rounds."""
        return tau_micro(self.accepted)


@dataclasses.dataclass(frozen=True)
class Gain:
    """How much higher one reading's tau is than another's, as a share of the latter, and its standard error."""

    share: float
    error: float

    def exceeds(self, share: float, errors: float) -> bool:
        """Higher by more than `share` and by more than `errors` standard errors."""
        return self.share > share and self.share > errors * self.error

    def __str__(self):
        return f"{100 * self.share:+.1f} % ± {100 * self.error:.1f}"


@dataclasses.dataclass(frozen=True)
class ChosenTaps:
    """A target step that hands on those of `layer_ids` that `params["taps"]` picks: one program for all shifts."""

    config: Target
    layer_ids: tuple[int, ...]

    def __call__(self, params, tokens, positions, cache):
        logits, taps, cache = TargetStep(self.config, self.layer_ids)(params["model"], tokens, positions, cache)
        taps = taps.reshape(*tokens.shape, len(self.layer_ids), -1)[..., params["taps"], :]
        return logits, taps.reshape(*tokens.shape, -1), cache

    def init_cache(self, batch: int, length: int, dtype=jnp.float32):
        """As `TargetStep.init_cache`."""
        return TargetStep(self.config, self.layer_ids).init_cache(batch, length, dtype)


def chosen_head(params: dict):
    """`target_head` of parameters as `ChosenTaps` takes them."""
    return target_head(params["model"])


def measure(
    readings: Sequence[Reading],
    drafter_params: dict,
    target_params: dict,
    target: Target,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_tokens: tuple[int, ...] = (),
    batch_size: int = 16,
    begin: Callable[[str], None] = lambda name: None,
) -> list[Measured]:
    """Decode the prompts greedily under every reading.

    Args:
      readings: of the same number of layer ids, all valid for the target.
      drafter_params: as stored; Domino's head is left out under a plain reading.
      target_params, target: of the target.
      prompts: token ids.
      max_new_tokens, stop_tokens, batch_size: as for `generate`.
      begin: told each reading's name before it is decoded.
    """
    union = tuple(sorted({i for reading in readings for i in reading.layer_ids}))
    step, measured = ChosenTaps(target, union), []
    for reading in readings:
        begin(reading.name)
        wanted = drafter_shapes(reading.drafter)
        taps = jnp.asarray([union.index(i) for i in reading.layer_ids], jnp.int32)
        generations = generate(
            {name: x for name, x in drafter_params.items() if name in wanted},
            {"model": target_params, "taps": taps},
            prompts,
            config=Decoding(step, reading.drafter, stop_tokens, chosen_head),
            max_new_tokens=max_new_tokens,
            batch_size=min(batch_size, len(prompts)),
        )
        measured.append(Measured(reading, generations))
    return measured


def gain(other: Measured, given: Measured) -> Gain:
    """`other` against `given`, both on the same prompts: the quotient of their taus, with its jackknife error."""
    both = (other, given)
    tokens = np.array([[sum(history) + len(history) for history in m.accepted] for m in both], np.float64)
    rounds = np.array([[len(history) for history in m.accepted] for m in both], np.float64)
    n = tokens.shape[1]

    def share(tokens, rounds) -> float:
        a, b = tokens.sum(1) / rounds.sum(1)
        return float(a / b - 1)

    best = share(tokens, rounds)
    without = [share(np.delete(tokens, i, 1), np.delete(rounds, i, 1)) for i in range(n)] if n > 1 else [best]
    error = math.sqrt((n - 1) / n * float(np.square(without - np.mean(without)).sum()))
    if n < _FEW:  # too few to tell how much prompts differ: take rounds for independent of one another
        variances = [np.var(np.concatenate(m.accepted)) / len(np.concatenate(m.accepted)) / m.tau**2 for m in both]
        error = max(error, (1 + best) * math.sqrt(sum(variances)))
    return Gain(best, error)


def id_readings(ids: Sequence[int], depth: int, drafter: ResolvedDrafter, *, alone: bool) -> list[Reading]:
    """The layer ids as written, all of them one higher and lower and, if `alone`, each moved by itself.

    Only those that a target of `depth` layers has, ascending and distinct.
    """
    ids = tuple(ids)
    named = [("given", "as written", ids, 2.0)]
    named += [("ids", f"all layer ids {by:+d}", tuple(i + by for i in ids), 2.0) for by in (1, -1)]
    if alone and len(ids) > 1:
        moves = [(n, by) for n in range(len(ids)) for by in (1, -1)]
        named += [("ids", f"layer id {ids[n]} as {ids[n] + by}", (*ids[:n], ids[n] + by, *ids[n + 1 :]), 3.0)
                  for n, by in moves]  # fmt: skip

    def valid(ids) -> bool:
        return bool(ids) and list(ids) == sorted(set(ids)) and ids[0] >= 0 and ids[-1] < depth

    return [Reading(kind, name, ids, drafter, errors) for kind, name, ids, errors in named if valid(ids)]
