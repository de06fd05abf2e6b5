"""Qwen3.5 and Qwen3-Next: linear attention in most layers, dense or with experts."""

import dataclasses

from specauf_jax.architecture import Target
from specauf_jax.errors import SpecaufError
from specauf_jax.models.families import moe
from specauf_jax.models.families.family import SEES, Family
from specauf_jax.models.hf_values import MOST_LAYERS, build, listed, number, object_of, refuse, said
from specauf_jax.parts import Hybrid

_LINEAR_KEYS = tuple(field.name for field in dataclasses.fields(Hybrid) if field.name.startswith("linear"))
_KEYS = (
    *(*_LINEAR_KEYS, "full_attention_interval", "partial_rotary_factor", "attn_output_gate"),
    *("mtp_num_hidden_layers", "mtp_use_dedicated_embeddings", "mamba_ssm_dtype"),
)
"""The last three concern what is not computed here."""
_SHARED = "shared_expert_intermediate_size"


def _read(values: dict, where: str) -> tuple[dict, dict]:
    refuse(values, where, "use_sliding_window")
    hybrid = _read_hybrid(values, where)
    return _plain_rope(values, where), {"hybrid": hybrid}


def _read_moe(values: dict, where: str) -> tuple[dict, dict]:
    """Its files have no dense MLP: what stands for its width is that of all that a token meets."""
    values = said(values)
    shared = number(values, where, _SHARED)
    values = {"norm_topk_prob": True} | values  # which no file says
    experts = moe.read_experts(values, where, shared_expert_intermediate_size=shared)
    width = experts.num_experts_per_tok * experts.moe_intermediate_size + shared
    values, fields = _read({"intermediate_size": width} | values, where)
    return values, fields | {"experts": experts}


def _read_next(values: dict, where: str) -> tuple[dict, dict]:
    experts = moe.read_experts(values, where, shared_expert_intermediate_size=number(values, where, _SHARED))
    values, fields = _read(values, where)
    return values, {"experts": experts, "hybrid": dataclasses.replace(fields["hybrid"], interleaved=True)}


def _read_hybrid(values: dict, where: str) -> Hybrid:
    """One layer of full attention at the end of each period, as layer_types or full_attention_interval say."""
    layers = number(values, where, "num_hidden_layers", most=MOST_LAYERS)
    interval = values.get("full_attention_interval")
    if values.get("layer_types") is not None:
        types = listed(values, where, "layer_types", str)
        period = types.index("full_attention") + 1 if "full_attention" in types else 0
        expected = ["linear_attention"] * (period - 1) + ["full_attention"]
        if not period or len(types) != layers or types != expected * (layers // period):
            raise SpecaufError(
                f"{where}: layer_types {types!r}",
                f"{layers} of them, linear_attention but for full_attention at equal distances",
                "use another model",
            )
        if interval not in (None, period):
            raise SpecaufError(f"{where}: full_attention_interval is {interval!r}", f"{period}, as layer_types say",
                               "correct the file")  # fmt: skip
    else:
        period = number(values, where, "full_attention_interval")
    if values.get("attn_output_gate", True) is not True:
        raise SpecaufError(f"{where}: attn_output_gate is {values['attn_output_gate']!r}", "true", "use another model")
    places = [place for place in (object_of(values, where, "rope_parameters"), values)
              if place.get("partial_rotary_factor") is not None]  # fmt: skip
    shares = {number(place, where, "partial_rotary_factor", kind=float) for place in places or [values]}
    if len(shares) > 1:
        raise SpecaufError(f"{where}: partial_rotary_factor is {shares}", "one value", "correct the file")
    sizes = {name: number(values, where, name) for name in _LINEAR_KEYS}
    return build(Hybrid, where, full_attention_interval=period, partial_rotary_factor=shares.pop(), **sizes)


def _plain_rope(values: dict, where: str) -> dict:
    """Without what concerns images: of text all three coordinates of a position are the same."""
    rope = object_of(values, where, "rope_parameters")
    other = ("mrope_section", "mrope_interleaved", "partial_rotary_factor")
    return values | {"rope_parameters": {key: x for key, x in rope.items() if key not in other}}


def _write(values: dict, config: Target) -> dict:
    assert config.hybrid is not None
    sizes = {key: value for key, value in dataclasses.asdict(config.hybrid).items() if key != "interleaved"}
    types = ["linear_attention"] * (config.period - 1) + ["full_attention"]
    rope = values["rope_parameters"] | {"partial_rotary_factor": config.hybrid.partial_rotary_factor}
    return (
        values | sizes | {"layer_types": types * (config.num_hidden_layers // config.period), "rope_parameters": rope}
    )


def _write_with_experts(values: dict, config: Target) -> dict:
    return moe.write_experts(_write(values, config), config)


_BESIDE_OTHERS = "model.language_model."
_UNREAD = ("model.visual.", "visual.", "mtp.")  # what sees, and what drafts


def _names(text: str) -> dict[str, str]:
    kind = {"Qwen3_5": "qwen3_5", "Qwen3_5Moe": "qwen3_5_moe"}[text]
    return {f"{text}ForCausalLM": f"{kind}_text", f"{text}{SEES}": kind}


FAMILIES = (
    Family("qwen3_5", "Qwen3.5", _names("Qwen3_5"), _read, _write, _KEYS, ("model.", _BESIDE_OTHERS), _UNREAD),
    Family("qwen3_5_moe", "Qwen3.5-MoE", _names("Qwen3_5Moe"), _read_moe, _write_with_experts,
           (*_KEYS, *moe.KEYS, _SHARED), ("model.", _BESIDE_OTHERS), _UNREAD),
    Family("qwen3_next", "Qwen3-Next", {"Qwen3NextForCausalLM": "qwen3_next"}, _read_next, _write_with_experts,
           (*_KEYS, *moe.KEYS, _SHARED), unread=_UNREAD),
)  # fmt: skip
