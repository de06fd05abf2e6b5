"""Gemma 3: windows in most layers, with a RoPE base of their own; norms on both sides; scaled embeddings."""

from specauf_jax.architecture import Target
from specauf_jax.errors import SpecaufError
from specauf_jax.models.families.family import SEES, Family
from specauf_jax.models.hf_values import MOST_LAYERS, listed, number, object_of, said
from specauf_jax.parts import BLOCKS

_DEFAULTS = {
    "vocab_size": 262_208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-6,
    "query_pre_attn_scalar": 256,
}
"""What config.json of published models leaves to transformers, with RoPE's bases."""
_LOCAL, _FULL, _SLIDING = "rope_local_base_freq", "full_attention", "sliding_attention"
_KEYS = ("query_pre_attn_scalar", _LOCAL, "hidden_activation", "sliding_window_pattern",
         "_sliding_window_pattern")  # fmt: skip


def _read(values: dict, where: str) -> tuple[dict, dict]:
    """layer_types, or full attention in every sliding_window_pattern-th layer; RoPE of both in one place or in two."""
    activation = values.get("hidden_activation", BLOCKS["gemma3"].activation)
    if activation != BLOCKS["gemma3"].activation:
        raise SpecaufError(f"{where}: hidden_activation is {activation!r}", repr(BLOCKS["gemma3"].activation),
                           "use another model")  # fmt: skip
    layers = number(values, where, "num_hidden_layers", most=MOST_LAYERS)
    if values.get("layer_types") is not None:
        types = tuple(listed(values, where, "layer_types", str))
    else:
        names = [name for name in ("sliding_window_pattern", "_sliding_window_pattern") if name in values]
        periods = {number(values, where, name) for name in names} or {6}
        if len(periods) > 1:
            raise SpecaufError(f"{where}: {' and '.join(names)} differ", "one number", "correct the file")
        [period] = periods
        types = tuple(_SLIDING if (i + 1) % period else _FULL for i in range(layers))
    values = {"tie_word_embeddings": True} | values
    values, local = _rope(values, where)
    fields = {
        "layer_types": types,
        "sliding_window": number(values, where, "sliding_window") if _SLIDING in types else None,
        "rope_local_base_freq": local,
        "query_pre_attn_scalar": number(values, where, "query_pre_attn_scalar"),
    }
    return values, fields


def _rope(values: dict, where: str) -> tuple[dict, float]:
    """config.json with the RoPE of full attention alone, and the base of the layers with windows."""
    rope = object_of(values, where, "rope_parameters")
    if not {_FULL, _SLIDING} & rope.keys():
        return values, number(values, where, _LOCAL, kind=float)
    where = f"{where}: rope_parameters"
    own = object_of(rope, where, _SLIDING)
    if own.keys() - {"rope_type", "rope_theta"} or own.get("rope_type", "default") != "default":
        raise SpecaufError(f"{where}: {_SLIDING} is {own!r}", "a base alone, without scaling", "use another model")
    local = number(own, f"{where}: {_SLIDING}", "rope_theta", kind=float)
    if values.get(_LOCAL) not in (None, local):
        raise SpecaufError(f"{where}: {_SLIDING} has the base {local!r}, and {_LOCAL} is {values[_LOCAL]!r}", "one",
                           "correct the file")  # fmt: skip
    return values | {"rope_parameters": object_of(rope, where, _FULL)}, local


def _read_with_defaults(values: dict, where: str) -> tuple[dict, dict]:
    bases = {} if values.get("rope_parameters") else {"rope_theta": 1e6, _LOCAL: 1e4}
    return _read(_DEFAULTS | bases | said(values), where)


def _write(values: dict, config: Target) -> dict:
    local = {"rope_type": "default", "rope_theta": config.rope_local_base_freq}
    gone = ("hidden_act", "use_sliding_window", "max_window_layers")
    return {key: value for key, value in values.items() if key not in gone} | {
        "hidden_activation": config.block.activation,
        "query_pre_attn_scalar": config.query_pre_attn_scalar,
        _LOCAL: config.rope_local_base_freq,
        "rope_parameters": {_FULL: values["rope_parameters"], _SLIDING: local},
    }


_PARTS = ("vision_tower.", "multi_modal_projector.")
FAMILIES = (
    Family(
        "gemma3",
        "Gemma 3",
        {"Gemma3ForCausalLM": "gemma3_text", f"Gemma3{SEES}": "gemma3"},
        _read_with_defaults,
        _write,
        _KEYS,
        ("model.", "model.language_model.", "language_model.model."),
        (*_PARTS, *(f"model.{part}" for part in _PARTS)),
    ),
)
