"""The same folder decoded under the usual mistakes, and what that means.

Greedy decoding writes the same text whatever the drafter (but for ties within rounding), so that
variants are compared prompt by prompt: only the number of rounds differs.
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
from specauf_jax.errors import SpecaufError
from specauf_jax.evaluation.doctor.checks import Finding, Folder, Level, Rows
from specauf_jax.evaluation.measure import tau_micro
from specauf_jax.evaluation.prompts import Prompt, encode_first_turn
from specauf_jax.models.drafter import drafter_shapes
from specauf_jax.models.heads import head_settings
from specauf_jax.models.target import target_step

CLEAR, SMALL = 0.10, 0.02
"""Gains in tau from which on a difference counts as a fault, and as worth a look."""
NOTHING = 1.05
"""Below this tau a drafter does next to nothing."""
_OFF_BY_ONE = 0.03
"""What layer ids off by one have been seen to cost at the least."""
_FEW = 4  # prompts

_TEXTS = (
    "The library opens at nine. On the first floor there are newspapers, and on the second",
    "def mean(values):\n    total = 0\n    for value in values:\n",
    "To make bread you need flour, water, salt and yeast. First",
    "import json\n\n\nclass Settings:\n    def __init__(self, path):\n",
    "Water boils at a lower temperature in the mountains, because",
    "for row in range(len(table)):\n    for column in range(len(table[row])):\n",
    "Dear Anna,\n\nthank you for your letter. We arrived on Monday, and",
    "try:\n    number = int(text)\nexcept ValueError:\n",
)
_QUESTIONS = (
    "Explain in a few sentences why the sky is blue.",
    "A train leaves at 9:40 and arrives at 13:05. How long does it travel?",
    "Write a Python function that returns the longest word of a sentence.",
    "Name three rivers of Europe and the seas into which they flow.",
    "What is the difference between a list and a tuple in Python?",
    "Summarise in one sentence what a bank does.",
    "If 3 pencils cost 2.40, how much do 7 pencils cost? Show the steps.",
    "Give two reasons to walk to work and two against it.",
)

Kind = Literal["given", "ids", "labels", "mask", "rope", "windows", "plain"]
"""What a variant changes; nothing for "given"."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to understand the drafter's folder."""

    kind: Kind
    name: str
    drafter: ResolvedDrafter
    errors: float = 2.0
    """Standard errors by which it must be better before it counts: more for the best of many."""

    @property
    def layer_ids(self) -> tuple[int, ...]:
        """The tapped target layers."""
        return self.drafter.target_layer_ids


@dataclasses.dataclass(frozen=True)
class Decoded:
    """What decoding a variant gave."""

    variant: Variant
    generations: list[Generation]

    @property
    def accepted(self) -> list[list[int]]:
        """Drafts accepted in every round of every prompt."""
        return [generation.accepted for generation in self.generations]

    @property
    def tau(self) -> float:
        """Tokens per round, over all rounds."""
        return tau_micro(self.accepted) or math.nan


@dataclasses.dataclass(frozen=True)
class Gain:
    """How much higher one variant's tau is than another's, as a share of the latter, and its standard error."""

    share: float
    error: float

    def exceeds(self, share: float, errors: float) -> bool:
        """Higher by more than `share` and by more than `errors` standard errors."""
        return self.share > share and self.share > errors * self.error

    def __str__(self):
        return f"{100 * self.share:+.1f} % ± {100 * self.error:.1f}"


def gain(other: Decoded, given: Decoded) -> Gain:
    """`other` against `given`, both on the same prompts: the quotient of their taus, with its jackknife error."""
    both = (other, given)
    tokens = np.array([[sum(history) + len(history) for history in d.accepted] for d in both], np.float64)
    rounds = np.array([[len(history) for history in d.accepted] for d in both], np.float64)
    n = tokens.shape[1]

    def share(tokens, rounds):
        other, given = tokens / rounds
        return other / given - 1

    best, error = float(share(tokens.sum(1), rounds.sum(1))), 0.0
    if n > 1:  # leave out one prompt at a time
        without = share(tokens.sum(1, keepdims=True) - tokens, rounds.sum(1, keepdims=True) - rounds)
        error = math.sqrt((n - 1) / n * float(np.square(without - without.mean()).sum()))
    if n < _FEW:  # too few to show how much prompts differ: take rounds as independent of one another
        variances = [np.var(np.concatenate(d.accepted)) / len(np.concatenate(d.accepted)) / d.tau**2 for d in both]
        error = max(error, (1 + best) * math.sqrt(sum(variances)))
    return Gain(best, error)


# ---------------------------------------------------------------------------------------------
# What to decode


def built_in_prompts(tokenizer) -> list[list[int]]:
    """Token ids of a few texts and questions; the latter under the chat template, if there is one that takes them."""
    requests = []
    for text, question in zip(_TEXTS, _QUESTIONS, strict=True):
        requests.append(encode_first_turn(tokenizer, Prompt(text, ())))
        try:
            requests.append(encode_first_turn(tokenizer, Prompt(None, (question,))))
        except SpecaufError:
            requests.append(encode_first_turn(tokenizer, Prompt(question, ())))
    return requests


def variants_of(folder: Folder, drafter: ResolvedDrafter, *, single_ids: bool) -> list[Variant]:
    """The drafter as written if it can be decoded so, and every other way worth a comparison; none if it cannot fit.

    Args:
      folder: the drafter's and its target's.
      drafter: as read from it, with every field.
      single_ids: also move each layer id by itself.
    """
    target = folder.target
    fits = (drafter.hidden_size, drafter.vocab_size) == (target.hidden_size, target.vocab_size)
    variants = layer_id_variants(drafter, target.num_hidden_layers, single_ids=single_ids)
    if not (fits and variants and drafter.mask_token_id < target.vocab_size):
        return []

    def add(kind: Kind, name: str, **changes):
        variants.append(Variant(kind, name, dataclasses.replace(variants[0].drafter, **changes)))

    for kind, name, head in drafter.head.variants():
        add(kind, name, head=head)
    if folder.mask_token not in (None, drafter.mask_token_id):
        add("mask", f"mask token {folder.mask_token}", mask_token_id=folder.mask_token)
    if not _same_rope(drafter, target):
        add("rope", "the target's RoPE", rope_theta=target.rope_theta, rope_scaling=target.rope_scaling)
    if any(drafter.windows):
        add("windows", "full attention in all layers", layer_types=("full_attention",) * drafter.num_hidden_layers)
    return variants


def layer_id_variants(drafter: ResolvedDrafter, depth: int, *, single_ids: bool) -> list[Variant]:
    """The layer ids as written, all of them one higher and lower and, if `single_ids`, each moved by itself.

    Only those that a target of `depth` layers has, ascending and distinct.
    """
    ids, variants = drafter.target_layer_ids, []

    def add(kind: Kind, name: str, ids: tuple[int, ...], errors: float = 2.0):
        if ids and list(ids) == sorted(set(ids)) and ids[0] >= 0 and ids[-1] < depth:
            variants.append(Variant(kind, name, dataclasses.replace(drafter, target_layer_ids=ids), errors))

    add("given", "as written", ids)
    for by in (1, -1):
        add("ids", f"all layer ids {by:+d}", tuple(i + by for i in ids))
    for n, i in enumerate(ids if single_ids and len(ids) > 1 else ()):
        for by in (1, -1):
            add("ids", f"layer id {i} as {i + by}", (*ids[:n], i + by, *ids[n + 1 :]), errors=3.0)
    return variants


def _same_rope(drafter: ResolvedDrafter, target: Target) -> bool:
    return (drafter.rope_theta, drafter.rope_scaling) == (target.rope_theta, target.rope_scaling)


# ---------------------------------------------------------------------------------------------
# Decoding


def decode_variants(
    variants: Sequence[Variant],
    drafter_params: dict,
    target_params: dict,
    target: Target,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_tokens: tuple[int, ...] = (),
    batch_size: int = 16,
    begin: Callable[[str], None] = lambda name: None,
) -> list[Decoded]:
    """Decode the prompts greedily under every variant.

    Args:
      variants: of the same number of layer ids, all valid for the target.
      drafter_params: as stored; a variant takes those that its own head has.
      target_params, target: of the target.
      prompts: token ids.
      max_new_tokens, stop_tokens, batch_size: as for `generate`.
      begin: called with each variant's name before it is decoded.
    """
    D, ids = target.hidden_size, tuple(sorted({i for variant in variants for i in variant.layer_ids}))
    step, decoded = target_step(target, ids), []
    for variant in variants:
        begin(variant.name)
        params = {name: drafter_params[name] for name in drafter_shapes(variant.drafter)}
        # One program for all variants: each taps the ids of all, with rows of zeros for those of others.
        rows = np.concatenate([np.arange(D) + D * ids.index(i) for i in variant.layer_ids])
        kernel = params["fc"]["kernel"]
        params["fc"] = {"kernel": jnp.zeros((len(ids) * D, D), kernel.dtype).at[rows].set(kernel)}
        drafter = dataclasses.replace(variant.drafter, target_layer_ids=ids)
        generations = generate(
            params,
            target_params,
            prompts,
            config=Decoding(step, drafter, stop_tokens),
            max_new_tokens=max_new_tokens,
            batch_size=min(batch_size, len(prompts)),
        )
        decoded.append(Decoded(variant, generations))
    return decoded


# ---------------------------------------------------------------------------------------------
# What it means. Each check gives level, found, expected and remedy


def variant_findings(decoded: Sequence[Decoded], drafter: ResolvedDrafter, target: Target) -> list[Finding]:
    """Findings from the acceptance of all variants of `variants_of`; only those on RoPE where none was decoded."""
    rows = {"RoPE": _rope(decoded, drafter, target)}
    if decoded and decoded[0].variant.kind == "given":
        given, ids, mask, labels = decoded[0], _of("ids", decoded), _of("mask", decoded), _of("labels", decoded)
        rows |= {"acceptance": _acceptance(given), "layer ids": _layer_ids(given, ids)}
        rows |= {"mask token": _mask_token(given, mask), "labels": _labels(given, labels)}
    elif decoded:
        rows["layer ids"] = _unreadable_ids(_of("ids", decoded))
    return [Finding(topic, *row) for topic, found in rows.items() for row in found]


def _of(kind: Kind, decoded: Sequence[Decoded]) -> list[Decoded]:
    return [d for d in decoded if d.variant.kind == kind]


def _level(better: Gain, errors: float) -> Level | None:
    """An error where the gain is large, or beyond chance; a warning where it may be worth a look."""
    if better.exceeds(CLEAR, errors) or better.exceeds(SMALL, errors + 2):
        return "error"
    return "warning" if better.exceeds(SMALL, errors) else None


def _acceptance(given: Decoded) -> Rows:
    rounds, prompts = sum(map(len, given.accepted)), len(given.accepted)
    found, most = f"tau {given.tau:.2f} over {rounds} rounds of {prompts} prompts", given.variant.drafter.block_size
    if given.tau < NOTHING:
        remedy = "use the weights that were trained, for this target"
        yield "warning", found, "more than 1; random weights and broken conventions give 1", remedy
    else:
        yield "note", found, f"between 1 and {most}, as where it was trained", "none"


_IDS = "those of training: id i is the output of 0-based layer i (speculators numbers them one higher)"


def _write_ids(better: Decoded) -> str:
    return f"write {list(better.variant.layer_ids)} in dflash_config.target_layer_ids"


def _unreadable_ids(shifts: list[Decoded]) -> Rows:
    best = max(shifts, key=lambda d: d.tau)
    found = f"the layer ids cannot be decoded as written; {best.variant.name} they give tau {best.tau:.2f}"
    yield "note", found, _IDS, _write_ids(best)


def _layer_ids(given: Decoded, shifts: list[Decoded]) -> Rows:
    by_tau = sorted(shifts, key=lambda d: d.tau, reverse=True)
    for other in by_tau:
        better = gain(other, given)
        if level := _level(better, other.variant.errors):
            found = f"target_layer_ids {list(given.variant.layer_ids)} decode at tau {given.tau:.2f}"
            yield level, f"{found}, {other.variant.name} at {other.tau:.2f} ({better})", _IDS, _write_ids(other)
            return
    if not shifts or given.tau < NOTHING:
        return  # a drafter that gets nothing right shows nothing of its taps
    best, expected = gain(by_tau[0], given), "the ids of training are the best"
    found = f"no layer ids off by one decode clearly better; the best, {by_tau[0].variant.name}: {best}"
    level, remedy = "note", "none"
    if best.exceeds(SMALL, 1):
        level, remedy = "warning", "give more prompts (--prompts, --max-prompts, --max-new-tokens) to be sure"
    elif 2 * best.error > _OFF_BY_ONE:
        remedy = f"give more prompts to detect gains below {2 * best.error:.0%} (off by one may cost 3 to 5 %)"
    yield level, found, expected, remedy


def _mask_token(given: Decoded, tokenizers: list[Decoded]) -> Rows:
    mask, expected = given.variant.drafter.mask_token_id, "the mask token of training, which never occurs in text"
    if texts := sum(mask in g.prompt or mask in g.tokens for g in given.generations):
        yield "error", f"mask_token_id {mask} occurs in {texts} of the texts", expected, "write it"
    for other in tokenizers:
        better, write = gain(other, given), f"write {other.variant.drafter.mask_token_id}"
        if level := _level(better, 2):
            taus = f"tau {given.tau:.2f}, the tokenizer's own at {other.tau:.2f} ({better})"
            yield level, f"mask_token_id {mask} decodes at {taus}", expected, write


def _labels(given: Decoded, conventions: list[Decoded]) -> Rows:
    for other in conventions:
        better = gain(other, given)
        if not better.exceeds(CLEAR, 2):
            continue
        taus = f"tau {given.tau:.2f}, under the other convention {other.tau:.2f} ({better})"
        settings, others = (head_settings(d.variant.drafter.head) for d in (given, other))
        for name in (name for name, value in others.items() if settings[name] != value):
            write = f"write {name} {str(others[name]).lower()}"
            yield "error", f"{name} {settings[name]} decodes at {taus}", "the convention of training", write


def _rope(decoded: Sequence[Decoded], drafter: ResolvedDrafter, target: Target) -> Rows:
    if _same_rope(drafter, target):
        return
    level: Level = "error"
    taus, remedy = "", "write the target's RoPE"
    for other in _of("rope", decoded):
        better, worse = gain(other, decoded[0]), gain(decoded[0], other)
        taus = f": tau {decoded[0].tau:.2f}, with the target's {other.tau:.2f} ({better})"
        if worse.exceeds(SMALL, 2):
            level, remedy = "warning", "train with the target's RoPE: tpu-inference does not read the drafter's"
    yield level, f"the drafter's RoPE is {_rope_name(drafter)}{taus}", f"the target's, {_rope_name(target)}", remedy


def _rope_name(config: ResolvedDrafter | Target) -> str:
    scaling = config.rope_scaling
    factor = "" if scaling.rope_type == "default" else f", {scaling.rope_type} by {scaling.factor:g}"
    return f"theta {config.rope_theta:g}{factor}"
