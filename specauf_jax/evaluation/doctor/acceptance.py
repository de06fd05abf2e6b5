"""What decoding says of a drafter's conventions: acceptance as written, and under the usual mistakes."""

import dataclasses
from collections.abc import Sequence

from specauf_jax.architecture import ResolvedDrafter, Target
from specauf_jax.errors import SpecaufError
from specauf_jax.evaluation.doctor.measured import (
    CLEAR,
    SMALL,
    Measured,
    Reading,
    gain,
    id_readings,
)
from specauf_jax.evaluation.doctor.pair import Finding, Level, Pair
from specauf_jax.evaluation.prompts import Prompt, encode_first_turn
from specauf_jax.models.heads import head_settings

NOTHING = 1.05
"""Below this tau a drafter does next to nothing."""
_OFF_BY_ONE = 0.03
"""What layer ids off by one have been seen to cost at the least."""

_TEXTS = (
    Prompt("The library opens at nine. On the first floor there are newspapers, and on the second", ()),
    Prompt(None, ("Explain in a few sentences why the sky is blue.",)),
    Prompt("def mean(values):\n    total = 0\n    for value in values:\n", ()),
    Prompt(None, ("A train leaves at 9:40 and arrives at 13:05. How long does it travel?",)),
    Prompt("To make bread you need flour, water, salt and yeast. First", ()),
    Prompt(None, ("Write a Python function that returns the longest word of a sentence.",)),
    Prompt("import json\n\n\nclass Settings:\n    def __init__(self, path):\n", ()),
    Prompt(None, ("Name three rivers of Europe and the seas into which they flow.",)),
    Prompt("Water boils at a lower temperature in the mountains, because", ()),
    Prompt(None, ("What is the difference between a list and a tuple in Python?",)),
    Prompt("for row in range(len(table)):\n    for column in range(len(table[row])):\n", ()),
    Prompt(None, ("Summarise in one sentence what a bank does.",)),
    Prompt("Dear Anna,\n\nthank you for your letter. We arrived on Monday, and", ()),
    Prompt(None, ("If 3 pencils cost 2.40, how much do 7 pencils cost? Show the steps.",)),
    Prompt("try:\n    number = int(text)\nexcept ValueError:\n", ()),
    Prompt(None, ("Give two reasons to walk to work and two against it.",)),
)


def built_in_prompts(tokenizer) -> list[list[int]]:
    """Token ids of a few texts and questions; the latter under the chat template, if there is one that takes them."""
    requests = []
    for prompt in _TEXTS:
        try:
            requests.append(encode_first_turn(tokenizer, prompt))
        except SpecaufError:
            requests.append(encode_first_turn(tokenizer, Prompt(prompt.turns[0], ())))
    return requests


# ---------------------------------------------------------------------------------------------
# What to decode


def has_rope_of(drafter: ResolvedDrafter, target: Target) -> bool:
    """Whether the drafter's RoPE is the target's."""
    return (drafter.rope_theta, drafter.rope_scaling) == (target.rope_theta, target.rope_scaling)


def readings_of(drafter: ResolvedDrafter, pair: Pair, *, alone: bool) -> list[Reading]:
    """The drafter as written if it can be decoded so, and in every other way worth a comparison.

    Args:
      drafter: as read, with every field.
      pair: its folder and target.
      alone: also move each layer id by itself.
    """
    target, replace = pair.architecture, dataclasses.replace
    readings = id_readings(drafter.target_layer_ids, target.num_hidden_layers, drafter, alone=alone)
    if not readings:
        return []
    others = [(kind, name, replace(drafter, head=head)) for kind, name, head in drafter.head.variants()]
    mask = getattr(pair.tokenizer, "mask_token_id", None)
    if mask not in (None, drafter.mask_token_id):
        others.append(("mask", f"mask token {mask}", replace(drafter, mask_token_id=mask)))
    if not has_rope_of(drafter, target):
        rope = {"rope_theta": target.rope_theta, "rope_scaling": target.rope_scaling}
        others.append(("rope", "the target's RoPE", replace(drafter, **rope)))
    if any(drafter.windows):
        full = ("full_attention",) * drafter.num_hidden_layers
        others.append(("windows", "full attention in all layers", replace(drafter, layer_types=full)))
    ids = readings[0].layer_ids
    return readings + [Reading(kind, name, ids, changed) for kind, name, changed in others]


# ---------------------------------------------------------------------------------------------
# What it means


def judge(measured: Sequence[Measured], drafter: ResolvedDrafter, pair: Pair) -> list[Finding]:
    """Findings from the acceptance of all readings.

    Args:
      measured: of `readings_of`, in its order.
      drafter, pair: as there.
    """
    given, *others = measured
    if given.reading.kind != "given":
        best = max((m for m in measured if m.reading.kind == "ids"), key=lambda m: m.tau)
        found = f"the layer ids cannot be decoded as written; {best.reading.name} they give tau {best.tau:.2f}"
        return [_ids("note", found, best)]
    found = [_tau(given, drafter), *_layer_ids(given, others), *_mask_token(given, others, drafter)]
    return found + [*_labels(given, others, drafter), *_rope(given, others, drafter, pair)]


def rope_unmeasured(drafter: ResolvedDrafter, target: Target) -> list[Finding]:
    """The finding on a RoPE that is not the target's, when nothing was decoded."""
    return [] if has_rope_of(drafter, target) else [_other_rope("error", "", drafter, target)]


def _level(better, errors: float) -> Level | None:
    """An error where the gain is large, or beyond chance; a warning where it may be worth a look."""
    if better.exceeds(CLEAR, errors) or better.exceeds(SMALL, errors + 2):
        return "error"
    return "warning" if better.exceeds(SMALL, errors) else None


def _tau(given: Measured, drafter: ResolvedDrafter) -> Finding:
    rounds, prompts = sum(map(len, given.accepted)), len(given.accepted)
    found = f"tau {given.tau:.2f} over {rounds} rounds of {prompts} prompts"
    if given.tau < NOTHING:
        return Finding("acceptance", "warning", f"{found}: as good as nothing is accepted",
                       "more than 1; random weights and broken conventions give 1",
                       "use the weights that were trained, for this target")  # fmt: skip
    return Finding("acceptance", "note", found, f"between 1 and {drafter.block_size}, as where it was trained", "none")


def _layer_ids(given: Measured, others: list[Measured]) -> list[Finding]:
    shifts = [m for m in others if m.reading.kind == "ids"]
    if not shifts:
        return []
    by_tau = sorted(shifts, key=lambda m: m.tau, reverse=True)
    for other in by_tau:
        better = gain(other, given)
        level = _level(better, other.reading.errors)
        if level:
            found = (f"target_layer_ids {list(given.reading.layer_ids)} decode at tau {given.tau:.2f}, "
                     f"{other.reading.name} at {other.tau:.2f} ({better})")  # fmt: skip
            return [_ids(level, found, other)]
    if given.tau < NOTHING:
        return []  # a drafter that gets nothing right tells nothing of its taps
    best = gain(by_tau[0], given)
    found = f"no layer ids off by one decode clearly better; the best, {by_tau[0].reading.name}: {best}"
    level, remedy = "note", "none"
    if 2 * best.error > _OFF_BY_ONE:
        remedy = f"to tell gains below {2 * best.error:.0%} (off by one may cost 3 to 5 %), give more prompts"
    if best.exceeds(SMALL, 1):
        level, remedy = "warning", "too few to tell: give more prompts (--prompts, --max-prompts, --max-new-tokens)"
    return [Finding("layer ids", level, found, "the ids of training are the best", remedy)]


def _ids(level: Level, found: str, better: Measured) -> Finding:
    return Finding("layer ids", level, found,
                   "those of training: id i is the output of 0-based layer i (speculators numbers them one higher)",
                   f"write {list(better.reading.layer_ids)} in dflash_config.target_layer_ids")  # fmt: skip


def _mask_token(given: Measured, others: list[Measured], drafter: ResolvedDrafter) -> list[Finding]:
    mask, found = drafter.mask_token_id, []
    texts = sum(mask in g.prompt or mask in g.tokens for g in given.generations)
    if texts:
        found.append(Finding("mask token", "error", f"mask_token_id {mask} occurs in {texts} of the texts",
                             "a token that never occurs in text", "write the mask token of training"))  # fmt: skip
    for other in (m for m in others if m.reading.kind == "mask"):
        better = gain(other, given)
        if level := _level(better, 2):
            taus = f"tau {given.tau:.2f}, the tokenizer's own at {other.tau:.2f} ({better})"
            found.append(Finding("mask token", level, f"mask_token_id {mask} decodes at {taus}",
                                 "the mask token of training",
                                 f"write {other.reading.drafter.mask_token_id}"))  # fmt: skip
    return found


def _labels(given: Measured, others: list[Measured], drafter: ResolvedDrafter) -> list[Finding]:
    [other] = [m for m in others if m.reading.kind == "labels"]
    better, domino = gain(other, given), "shift_label" in head_settings(drafter.head)
    if not better.exceeds(CLEAR, 2):
        return []
    taus = f"tau {given.tau:.2f}, under the other convention {other.tau:.2f} ({better})"
    if domino:
        shift = other.reading.drafter.first_slot == 0
        return [Finding("labels", "error", f"shift_label {not shift} decodes at {taus}",
                        "the convention of training", f"write shift_label {str(shift).lower()}")]  # fmt: skip
    return [Finding("labels", "error", f"trained with shifted labels: {taus}",
                    "slot k predicts the token k after the anchor, in every plain DFlash drafter",
                    "no engine serves it: train again without shifted labels")]  # fmt: skip


def _rope(given: Measured, others: list[Measured], drafter: ResolvedDrafter, pair: Pair) -> list[Finding]:
    for other in others:
        if other.reading.kind == "rope":
            better, worse = gain(other, given), gain(given, other)
            taus = f": tau {given.tau:.2f}, with the target's {other.tau:.2f} ({better})"
            level = "warning" if worse.exceeds(SMALL, 2) else "error"
            return [_other_rope(level, taus, drafter, pair.architecture)]
    return []


def _other_rope(level: Level, taus: str, drafter: ResolvedDrafter, target: Target) -> Finding:
    def name(config) -> str:
        scaling = config.rope_scaling
        factor = "" if scaling.rope_type == "default" else f", {scaling.rope_type} by {scaling.factor:g}"
        return f"theta {config.rope_theta:g}{factor}"

    remedy = "write the target's RoPE"
    if level == "warning":
        remedy = "train with the target's RoPE, or do not serve it with tpu-inference"
    return Finding("RoPE", level, f"the drafter's RoPE is {name(drafter)}{taus}",
                   f"the target's, {name(target)}, by which tpu-inference replaces it", remedy)  # fmt: skip
