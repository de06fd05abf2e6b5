"""Which serving engines load a drafter's folder, and what each does with it: what their code said at a version.

No engine runs here. A line holds for its engine's version; other versions may differ.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Literal, get_args

from specauf_jax.architecture import ResolvedDrafter, Target
from specauf_jax.evaluation.doctor.checks import Folder, agree
from specauf_jax.evaluation.doctor.variants import Kind
from specauf_jax.models.heads import head_settings
from specauf_jax.models.hf_drafter import DRAFTER_ARCHITECTURES
from specauf_jax.parts import RopeScaling

Verdict = Literal["yes", "converted", "differently", "no"]
"""From the best to the worst; differently: it loads, but decodes by other conventions than the folder's."""
SERVERS = ("SGLang", "vLLM", "tpu-inference", "sglang-jax")


@dataclasses.dataclass(frozen=True)
class Engine:
    """What an engine makes of the folder."""

    name: str
    version: str
    date: str
    serves: Verdict
    why: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Source:
    """An engine, the version of its code that was read, and the date of reading."""

    engine: str
    version: str = "not known"
    date: str = "not known"


@dataclasses.dataclass(frozen=True)
class Line:
    """One thing that an engine does."""

    source: Source
    verdict: Verdict
    """At best, where the line applies; "yes" and "converted" only add a remark."""
    applies: Callable[[Folder], object]
    """Whether it does; what it returns stands in place of the sentence's {}."""
    sentence: str
    variant: Kind | None = None
    """The variant that decodes as the engine does."""


# ---------------------------------------------------------------------------------------------
# Conditions that take more than a line


def _untapped(folder: Folder) -> bool:
    """A target whose layers the TPU engines do not tap."""
    return folder.target.model_type not in ("qwen3", "llama")


def _last_layer(folder: Folder) -> str:
    """The id of the target's last layer, if it is tapped."""
    last = folder.target.num_hidden_layers - 1
    return str(last) if last in (folder.layer_ids or []) else ""


def _unfit_fc(folder: Folder) -> bool:
    shape, ids = folder.tensors.get("fc.weight", ()), folder.layer_ids or ()
    return bool(shape and ids) and shape[-1] != len(ids) * folder.target.hidden_size


def _extra_names(folder: Folder) -> set[str]:
    names = folder.names
    return {*names.shared, *names.prefixed, *names.unknown, *names.other_head}


def _trained_name(folder: Folder) -> str:
    """The architecture under which SpecForge trains the head, where config.json names another."""
    name = folder.head.architectures[-1]
    return name if folder.architecture in DRAFTER_ARCHITECTURES and folder.architecture != name else ""


def unserved_heads(drafter: ResolvedDrafter, target: Target) -> str:
    """What tpu-inference (0.32) cannot run of a drafter's heads, and what to train instead; empty where it can.

    Its cache pads hidden_size / num_attention_heads to 64 or a multiple of 128, which must be head_dim, and has no
    bidirectional attention at 64. What it adds to the target's head_dim it adds to the drafter's projections too.
    """
    D, E, cached = drafter.hidden_size, drafter.head_dim, drafter.hidden_size // drafter.num_attention_heads
    if target.head_dim != _padded(target.head_dim):
        return f"a drafter of any heads for a target whose head_dim is {target.head_dim}"
    if E % 128 == 0 and _padded(cached) == E:
        return ""
    H = next(H for H in range(-(-D // 128), D + 1) if D % H == 0 and D // H != 64)
    G = max(G for G in range(1, min(drafter.num_key_value_heads, H) + 1) if H % G == 0)
    flags = f"--drafter.num-attention-heads {H} --drafter.num-key-value-heads {G}"
    flags += "" if E == 128 else " --drafter.head-dim 128"
    return f"head_dim {E} with hidden_size / num_attention_heads {cached}: train with {flags}"


def _padded(size: int) -> int:
    return 64 if size == 64 else -(-size // 128) * 128


def _unserved_heads(folder: Folder) -> str:
    return unserved_heads(folder.drafter, folder.target) if isinstance(folder.drafter, ResolvedDrafter) else ""


def _unread_shift(folder: Folder) -> bool:
    """Shifted labels of a head whose files need not say so: who does not know the key reads them unshifted."""
    return folder.settings.get("shift_label") is True and folder.head.absent.get("shift_label") is False


def _dspark(folder: Folder) -> bool:
    return "Qwen3DSparkModel" in folder.head.architectures


def _other_markov_head(folder: Folder) -> str:
    kind = head_settings(folder.head).get("markov_head_type", "vanilla")
    return "" if kind == "vanilla" else kind


def _rope(case: Literal["Qwen3", "Llama 3.1", "yarn", "other"]) -> Callable[[Folder], str]:
    """The drafter's theta where this case applies. Qwen3 and Llama 3.1: drafter and target have that model's RoPE."""

    def base(folder: Folder) -> str:
        drafter, target = folder.drafter, folder.target
        if not isinstance(drafter, ResolvedDrafter):
            return ""
        theta, ropes = drafter.rope_theta, {(model.rope_theta, model.rope_scaling) for model in (drafter, target)}
        found = "yarn" if drafter.rope_scaling.rope_type == "yarn" else "other"
        if ropes == {(theta, _LLAMA_31)}:
            found = "Llama 3.1"
        elif ropes == {(1e6, RopeScaling())}:
            found = "Qwen3"
        return f"{theta:.15g}" if found == case else ""

    return base


_LLAMA_31 = RopeScaling("llama3", 8.0, 8192, low_freq_factor=1.0, high_freq_factor=4.0)

# ---------------------------------------------------------------------------------------------
# The table

_VLLM_ARCHITECTURES = ("DFlashDraftModel", "Qwen3DSparkModel", "DSparkDraftModel", "DFlash2DraftModel")
_SGLANG = Source("SGLang")
_VLLM = Source("vLLM", "0.32.0", "2026-11-26")
_TPU = Source("tpu-inference", "0.32.0", "2026-11-26")
_SGLANG_JAX = Source("sglang-jax", "cddbf6f1 of 2026-08-21", "2026-11-26")
_SPECULATORS = Source("speculators", "0.9.0", "2026-11-24")
_SPECFORGE = Source("SpecForge", "0.2.0", "2026-11-24")
_ZLAB = Source("z-lab", "dflash 0.1.0", "2026-11-26")
_AUTO_MODEL = Source("AutoModel")

LINES = (
    Line(_SGLANG, "no", lambda f: f.architecture != f.head.architectures[0] and f.head.architectures[0],
         "serves architecture {}, every head by its projector_type"),
    Line(_SGLANG, "no", lambda f: all(place.get("mask_token_id") is None for place in (f.dflash, f.config)),
         "needs mask_token_id"),
    Line(_SGLANG, "no", _unfit_fc, "checks the shape of fc.weight, which does not fit target_layer_ids"),
    Line(_SGLANG, "no", lambda f: ", ".join(name for name in head_settings(f.head)
                                         if name not in f.dflash | f.config | f.head.absent),
         "needs {} of the head"),
    Line(_SGLANG, "differently", lambda f: len(_extra_names(f)), "drops {} tensors that it does not know, silently"),
    Line(_SGLANG, "yes", lambda f: not agree(f.block_sizes.values()) and f.block_sizes["in dflash_config"],
         "takes block_size {} of dflash_config"),
    Line(_VLLM, "no", lambda f: f.architecture not in _VLLM_ARCHITECTURES,
         f"needs architecture {' or '.join(_VLLM_ARCHITECTURES)}"),
    Line(_VLLM, "no", _other_markov_head, "has the vanilla Markov head only, not {}"),
    Line(_VLLM, "no", lambda f: "in rope_parameters" not in f.thetas, "needs rope_parameters"),
    Line(_VLLM, "yes", lambda f: f.slides, "reads windows as this project does"),
    Line(_VLLM, "yes", lambda f: f.layer_ids, "adds 1 to target_layer_ids itself"),
    Line(_TPU, "no", _untapped, "taps dense Qwen3 and Llama targets only"),
    Line(_TPU, "no", _unserved_heads, "cannot run {}"),
    Line(_TPU, "no", lambda f: f.dflash.get("target_layer_ids") is None, "needs dflash_config.target_layer_ids"),
    Line(_TPU, "no", lambda f: len({*_extra_names(f), *f.names.early, *f.names.missing}),
         "fails on unknown and missing tensors: {}"),
    Line(_TPU, "no", _rope("yarn"), "has no YaRN: takes Llama 3 scaling"),
    Line(_TPU, "differently", _rope("Llama 3.1"),
         "takes theta 1e6 and Llama 3 scaling (with transformers 5): "
         """--hf-overrides '{"rope_theta": {}}' makes it exact"""),
    Line(_TPU, "differently", _rope("other"),
         "takes theta 1e6 and Llama 3 scaling (with transformers 5): "
         """--hf-overrides '{"rope_theta": {}}' corrects theta, not the scaling"""),
    Line(_TPU, "differently", lambda f: f.dflash.get("mask_token_id") is None,
         "without dflash_config.mask_token_id takes token 0"),
    Line(_TPU, "differently", lambda f: "at the top level" not in f.block_sizes and f.dflash.get("block_size") != 8,
         "without block_size at the top level takes 8"),
    Line(_TPU, "differently", lambda f: f.slides, "ignores layer_types: full attention", "windows"),
    Line(_TPU, "yes", _rope("Qwen3"),
         "takes Llama 3 scaling besides (with transformers 5), an error that grows with the context: "
         """--hf-overrides '{"rope_scaling": null}' makes it exact"""),
    Line(_SGLANG_JAX, "no", _untapped, "taps dense Qwen3 and Llama targets only"),
    Line(_SGLANG_JAX, "no", lambda f: f.target.tie_word_embeddings, "fails on a target whose LM head is its embedding"),
    Line(_SGLANG_JAX, "no", _last_layer, "never taps layer {}, the target's last"),
    Line(_SGLANG_JAX, "no", lambda f: f.dflash.get("target_layer_ids") is None,
         "needs dflash_config.target_layer_ids"),
    Line(_SGLANG_JAX, "no", lambda f: f.dflash.get("mask_token_id") is None,
         "needs mask_token_id, unless the tokenizer has <|MASK|>"),
    Line(_SGLANG_JAX, "no", lambda f: not {"at the top level", "in rope_parameters"} <= f.thetas.keys(),
         "needs rope_theta at the top level (else takes 1e4) and in rope_parameters (else later code fails)"),
    Line(_SGLANG_JAX, "no", _other_markov_head, "has the vanilla Markov head only, not {}"),
    Line(_SGLANG_JAX, "differently", lambda f: _dspark(f) and f.head.first_slot != 0,
         "takes the labels of a DSpark for shifted", "labels"),
    Line(_SGLANG_JAX, "differently", lambda f: isinstance(f.drafter, ResolvedDrafter)
         and f.drafter.rope_scaling != RopeScaling(), "ignores RoPE scaling"),
    Line(_SGLANG_JAX, "differently", lambda f: len(f.names.prefixed),
         "needs names without a prefix: only warns of the {} that it does not find"),
    Line(_SGLANG_JAX, "differently", lambda f: len(f.names.missing), "only warns of missing tensors: {}"),
    Line(_SGLANG_JAX, "differently", lambda f: f.slides, "ignores layer_types: full attention", "windows"),
    Line(_SGLANG_JAX, "yes", lambda f: f.names.shared or f.names.unknown or f.names.other_head,
         "ignores tensors that it does not know"),
    Line(_SPECULATORS, "differently", _last_layer, "its converter drops layer id {}, the last"),
    Line(_SPECULATORS, "converted", lambda f: True,
         "has its own layout, layer ids one higher: specauf export --layout speculators"),
    Line(_SPECFORGE, "differently", lambda f: f.names.early,
         "from_pretrained leaves the head of an early file random, without an error"),
    Line(_SPECFORGE, "differently", lambda f: f.slides,
         "trains with the windows, causal within the block, but decodes without: full attention", "windows"),
    Line(_SPECFORGE, "differently", lambda f: _dspark(f) and f.head.first_slot == 0,
         "trains a DSpark with shifted labels, but decodes it without", "labels"),
    Line(_SPECFORGE, "converted", _trained_name, "trains this head under {}: specauf export --layout specforge"),
    Line(_ZLAB, "yes", lambda f: f.slides, "reads windows as this project does"),
    Line(_AUTO_MODEL, "no", lambda f: True, "takes it for a plain Qwen3 with random embeddings, without an error"),
    *(Line(source, "differently", _unread_shift, "is not known to read shifted labels of a plain drafter", "labels")
      for source in (_SGLANG, _VLLM, _TPU, _SGLANG_JAX, _SPECFORGE, _ZLAB)),
)  # fmt: skip


def engine_table(folder: Folder, taus: Mapping[Kind, float]) -> list[Engine]:
    """Every engine's row: the worst verdict of all lines that apply, and remarks only where it loads the folder.

    Args:
      folder: the drafter's and its target's.
      taus: measured tau by kind of variant, as far as measured.
    """
    return [_row(source, folder, taus) for source in dict.fromkeys(line.source for line in LINES)]


def _row(source: Source, folder: Folder, taus: Mapping[Kind, float]) -> Engine:
    name, version, date = dataclasses.astuple(source)
    if folder.unreadable is not None:
        return Engine(name, version, date, "no", ("there are no weights to read",))
    lines = [line for line in LINES if line.source == source]
    if name in folder.head.engines:
        verdict, sentence = folder.head.engines[name]
        lines.insert(0, Line(source, verdict, lambda f: True, sentence, "plain" if verdict == "differently" else None))
    applying = [(line, value) for line in lines if (value := line.applies(folder))]
    applying.sort(key=lambda pair: -_RANK[pair[0].verdict])
    serves: Verdict = applying[0][0].verdict if applying else "yes"
    why = [_sentence(line, value, taus) for line, value in applying if serves != "no" or _RANK[line.verdict] > 1]
    return Engine(name, version, date, serves, tuple(why))


_RANK = {verdict: rank for rank, verdict in enumerate(get_args(Verdict))}


def _sentence(line: Line, value: object, taus: Mapping[Kind, float]) -> str:
    sentence = line.sentence.replace("{}", str(value))
    if line.variant is not None and {line.variant, "given"} <= taus.keys():
        sentence += f" (tau {taus[line.variant]:.2f} instead of {taus['given']:.2f})"
    return sentence
