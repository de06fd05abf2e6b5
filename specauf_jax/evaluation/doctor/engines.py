"""Which serving engines will load a drafter folder, and what each will quietly do with it.

By what is known of SGLang, vLLM, tpu-inference, sglang-jax, speculators, SpecForge and z-lab's code;
the engines themselves are not run.
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal

from specauf_jax.evaluation.doctor.pair import DOMINO_KEYS, Pair, agree

SERVERS = ("SGLang", "vLLM", "tpu-inference", "sglang-jax")
Serves = Literal["yes", "differently", "converted", "no"]


@dataclasses.dataclass(frozen=True)
class Engine:
    """What an engine makes of the folder."""

    name: str
    serves: Serves
    """differently: it loads, but decodes by other conventions than the folder's."""
    why: tuple[str, ...]


def engine_table(pair: Pair, taus: Mapping[str, float], *, other_rope: bool) -> list[Engine]:
    """Every engine's row.

    Args:
      pair: the folders.
      taus: measured tau by kind of reading ("given", "rope", "windows", "plain"), as far as measured.
      other_rope: the drafter's RoPE is not the target's.
    """
    engines = [
        _sglang(pair),
        _vllm(pair),
        _tpu_inference(pair, taus, other_rope),
        _sglang_jax(pair, taus),
        _speculators(pair),
        _specforge(pair),
        Engine("AutoModel", "no", ("takes it for a plain Qwen3 with random embeddings, without an error",)),
    ]
    if pair.unreadable is not None:
        return [Engine(engine.name, "no", ("there are no weights to read",)) for engine in engines]
    return engines


def _row(name: str, no=(), differently=(), notes=(), *, serves: Serves = "yes") -> Engine:
    """The worst that was said decides, and notes matter only where the engine loads it.

    Each argument: (condition, what to say) pairs.
    """
    no, differently, notes = ([text for holds, text in said if holds] for said in (no, differently, notes))
    found = "no" if no else "differently" if differently else serves
    return Engine(name, found, (*no, *differently, *([] if no else notes)))


def _sglang(pair: Pair) -> Engine:
    places, names = (pair.dflash, pair.values), pair.names
    unknown = names.shared + names.prefixed + names.unknown + names.head
    size = pair.block_sizes.get("in dflash_config")
    lost = [key for key in DOMINO_KEYS if not any(key in place for place in places)]
    return _row(
        "SGLang",
        no=[
            (pair.named != "DFlashDraftModel", "serves architecture DFlashDraftModel, Domino too (by projector_type)"),
            (not any(place.get("mask_token_id") is not None for place in places), "needs mask_token_id"),
            (not _fc_fits(pair), "checks the shape of fc.weight, which does not fit target_layer_ids"),
            (pair.domino and lost, f"needs Domino's {', '.join(lost)}"),
        ],
        differently=[
            (unknown, f"drops tensors that it does not know without a word: {len(unknown)}"),
        ],
        notes=[(not agree(pair.block_sizes.values()), f"takes block_size {size} of dflash_config")],
    )


def _vllm(pair: Pair) -> Engine:
    return _row(
        "vLLM",
        no=[
            (pair.domino, "has no Domino"),
            (pair.named != "DFlashDraftModel" and not pair.domino, "needs architecture DFlashDraftModel"),
            ("in rope_parameters" not in pair.thetas, "needs rope_parameters"),
        ],
        notes=[(pair.layer_ids, "adds 1 to target_layer_ids itself")],
    )


def _tpu_inference(pair: Pair, taus: Mapping[str, float], other_rope: bool) -> Engine:
    names = pair.names
    wrong = names.shared + names.prefixed + names.early + names.unknown + names.head + names.missing
    return _row(
        "tpu-inference",
        no=[
            ("at the top level" not in pair.block_sizes, "needs block_size at the top level"),
            (pair.layer_ids is None, "needs dflash_config.target_layer_ids"),
            (pair.domino, "fails on Domino's tensors, which it does not know"),
            (not pair.domino and wrong, f"fails on unknown and missing tensors: {len(wrong)}"),
        ],
        differently=[
            (pair.dflash.get("mask_token_id") is None, "without dflash_config.mask_token_id takes token 0"),
            (other_rope, f"replaces the drafter's RoPE by the target's{_measured(taus, 'rope')}"),
            (pair.sliding, f"ignores layer_types: full attention{_measured(taus, 'windows')}"),
        ],
        notes=[(not other_rope, "replaces the drafter's RoPE by the target's, here the same")],
    )


def _sglang_jax(pair: Pair, taus: Mapping[str, float]) -> Engine:
    names = pair.names
    return _row(
        "sglang-jax",
        no=[
            (pair.layer_ids is None, "needs target_layer_ids written out"),
            ("at the top level" not in pair.thetas, "needs rope_theta at the top level"),
        ],
        differently=[
            (pair.domino, f"ignores Domino's head: plain DFlash{_measured(taus, 'plain')}"),
            (names.prefixed, f"needs names without a prefix: only warns of the {len(names.prefixed)} it does not find"),
            (names.missing, f"only warns of missing tensors: {len(names.missing)}"),
            (pair.sliding, f"ignores layer_types: full attention{_measured(taus, 'windows')}"),
        ],
        notes=[(names.shared or names.unknown or names.head, "ignores tensors that it does not know")],
    )


def _speculators(pair: Pair) -> Engine:
    last = pair.architecture.num_hidden_layers - 1
    return _row(
        "speculators",
        no=[(pair.domino, "has no place for Domino's head in its layout")],
        differently=[(last in (pair.layer_ids or []), f"its converter drops layer id {last}, the last")],
        notes=[(not pair.domino, "has its own layout, layer ids one higher: specauf export --layout speculators")],
        serves="converted",
    )


def _specforge(pair: Pair) -> Engine:
    renamed = pair.domino and pair.named != "DominoDraftModel"
    return _row(
        "SpecForge, z-lab's classes",
        differently=[
            (pair.names.early, "from_pretrained leaves an early Domino's head random, without an error"),
            (pair.sliding, "z-lab's see everything under sdpa, whatever the window"),
        ],
        notes=[
            (pair.sliding, "SpecForge's window is causal within the block"),
            (renamed, "SpecForge trains Domino under DominoDraftModel: specauf export --layout specforge"),
        ],
        serves="converted" if renamed else "yes",
    )


def _fc_fits(pair: Pair) -> bool:
    shape = pair.tensors.get("fc.weight")
    return not (shape and pair.layer_ids) or shape[-1] == len(pair.layer_ids) * pair.architecture.hidden_size


def _measured(taus: Mapping[str, float], kind: str) -> str:
    return f" (tau {taus[kind]:.2f} instead of {taus['given']:.2f})" if {kind, "given"} <= taus.keys() else ""
