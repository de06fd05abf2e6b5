"""Acceptance of a drafter under several readings of its config, on the same prompts.

Greedy decoding writes the same text whatever the drafter, so that readings are compared prompt by
prompt: only the number of rounds differs.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np

from specauf_jax.architecture import Drafter, Target
from specauf_jax.decoding.generate import generate
from specauf_jax.decoding.state import Decoding
from specauf_jax.evaluation.measure import tau_micro
from specauf_jax.models.target import TargetStep, target_head

CLEAR, SMALL = 0.10, 0.02
"""Gains in tau from which on a difference counts as a fault, and as worth a look."""


@dataclasses.dataclass(frozen=True)
class Reading:
    """One way to understand the drafter's folder."""

    name: str
    layer_ids: tuple[int, ...]
    drafter: Drafter
    errors: float = 2.0
    """Standard errors by which it must be better before it counts: more for the best of many."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """What decoding with a reading accepted, round by round of every prompt."""

    reading: Reading
    accepted: list[list[int]]

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


class ShiftedSlots(Drafter):
    """A plain DFlash drafter read as if its labels were shifted: slot k predicts the token k + 1 after the anchor."""

    first_slot = 0


@dataclasses.dataclass(frozen=True)
class ChosenTaps:
    """A target step that taps `layer_ids` and hands on those that `params["taps"]` picks: one program for all shifts."""

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
        plain = reading.drafter.projector_type == "dflash"
        head = ("prefix_gru", "embed_proj") if plain else ()
        taps = jnp.asarray([union.index(i) for i in reading.layer_ids], jnp.int32)
        generations = generate(
            {name: x for name, x in drafter_params.items() if name not in head},
            {"model": target_params, "taps": taps},
            prompts,
            config=Decoding(step, reading.drafter, stop_tokens, chosen_head),
            max_new_tokens=max_new_tokens,
            batch_size=min(batch_size, len(prompts)),
        )
        measured.append(Measured(reading, [g.accepted for g in generations]))
    return measured


def gain(other: Measured, given: Measured) -> Gain:
    """`other` against `given`, prompt by prompt (delete-one jackknife of the quotient of the two taus)."""
    tokens, rounds = (
        np.array([[f(history) for history in m.accepted] for m in (other, given)], np.float64)
        for f in (lambda history: sum(history) + len(history), len)
    )

    def share(tokens, rounds) -> float:
        [a, b] = tokens / rounds
        return a / b - 1

    totals, n = (tokens.sum(1), rounds.sum(1)), tokens.shape[1]
    best = share(*totals)
    without = [share(totals[0] - tokens[:, i], totals[1] - rounds[:, i]) for i in range(n)] if n > 1 else [best]
    error = math.sqrt((n - 1) / n * float(np.square(without - np.mean(without)).sum()))
    if n < 4:  # too few prompts to tell how much they differ: take rounds for independent of one another
        spread = [np.var([a for h in m.accepted for a in h]) / m_rounds / m.tau**2
                  for m, m_rounds in zip((other, given), totals[1], strict=True)]  # fmt: skip
        error = max(error, (1 + best) * math.sqrt(sum(spread)))
    return Gain(best, error)


def id_readings(ids: Sequence[int], depth: int, drafter: Drafter, *, alone: bool) -> list[Reading]:
    """The layer ids as written if they can be, then all of them one higher and lower, then (alone) each by itself."""

    def valid(ids) -> bool:
        return list(ids) == sorted(set(ids)) and ids[0] >= 0 and ids[-1] < depth

    ids = tuple(ids)
    named = [("as written", ids, 2.0)]
    named += [(f"all layer ids {by:+d}", tuple(i + by for i in ids), 2.0) for by in (1, -1)]
    if alone and len(ids) > 1:
        named += [
            (f"layer id {ids[n]} as {ids[n] + by}", (*ids[:n], ids[n] + by, *ids[n + 1 :]), 3.0)
            for n in range(len(ids))
            for by in (1, -1)
        ]
    return [Reading(name, ids, drafter, errors) for name, ids, errors in named if valid(ids)]


def shifted_labels(drafter: Drafter) -> Drafter:
    """The drafter with the other convention of its slots."""
    if drafter.projector_type == "domino":
        return dataclasses.replace(drafter, shift_label=not drafter.shift_label)
    return ShiftedSlots(**{field.name: getattr(drafter, field.name) for field in dataclasses.fields(Drafter)})
