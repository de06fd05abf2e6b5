"""Values of config.json that targets and drafters have in common, read and written; each is checked by itself."""

import dataclasses
import math
import typing

from specauf_jax.architecture import ResolvedDrafter, Target
from specauf_jax.errors import SpecaufError
from specauf_jax.parts import RopeScaling, RopeType

_MOST = 2**31 - 1
MOST_LAYERS = 4096

SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)


def shared_fields(values: dict, where: str) -> dict:
    """Sizes, epsilon and RoPE of a model, as fields of its architecture."""
    fields = {
        name: number(values, where, name, most=MOST_LAYERS if name == "num_hidden_layers" else _MOST) for name in SIZES
    }
    if values.get("hidden_act", "silu") != "silu":
        raise SpecaufError(
            f"{where}: hidden_act is {values['hidden_act']!r}", "'silu'", "use a model with SwiGLU layers"
        )
    epsilon = number(values, where, "rms_norm_eps", kind=float)
    return fields | {"rms_norm_eps": epsilon} | _rope(values, where)


def _rope(values: dict, where: str) -> dict:
    """`rope_theta` and `rope_scaling` from the new `rope_parameters`, the old pair of keys, or both if they agree."""
    new, old = object_of(values, where, "rope_parameters"), object_of(values, where, "rope_scaling")
    bases = [place["rope_theta"] for place in (new, old, values) if place.get("rope_theta") is not None]
    if not bases or any(base != bases[0] for base in bases):
        raise SpecaufError(
            f"{where}: rope_theta is {' and '.join(map(repr, bases)) or 'missing'}",
            "one base, in rope_parameters or at the top level",
            "write the base that the model was trained with",
        )
    theta = number({"rope_theta": bases[0]}, where, "rope_theta", kind=float)
    scalings = [_rope_scaling(place, values, f"{where}: {name}")
                for name, place in (("rope_parameters", new), ("rope_scaling", old)) if place]  # fmt: skip
    if len(set(scalings)) > 1:
        raise SpecaufError(
            f"{where}: rope_parameters and rope_scaling disagree", "the same scaling in both", "correct the file"
        )
    return {"rope_theta": theta, "rope_scaling": scalings[0] if scalings else RopeScaling()}


def _rope_scaling(place: dict, values: dict, where: str) -> RopeScaling:
    kind = place.get("rope_type", place.get("type", "default"))
    if kind not in typing.get_args(RopeType):
        raise SpecaufError(
            f"{where}: RoPE of type {kind!r}", f"one of {', '.join(typing.get_args(RopeType))}", "use another model"
        )
    fields = {field.name: field for field in dataclasses.fields(RopeScaling)}
    found = {"rope_type": kind}
    for key, value in place.items():
        if key in ("type", "rope_type", "rope_theta") or value is None:
            continue
        if key == "partial_rotary_factor" and value == 1:
            continue
        if key not in fields:
            raise SpecaufError(f"{where} has {key!r}", "keys of the default, linear, llama3 and yarn scalings",
                               "use a model without it")  # fmt: skip
        if key == "truncate":
            found[key] = flag(place, where, key)
        else:
            found[key] = number(place, where, key, kind=int if key.startswith("original") else float)
    if kind == "default":
        return RopeScaling()
    for key in ("factor",) + (("low_freq_factor", "high_freq_factor") if kind == "llama3" else ()):
        if key not in found:
            raise SpecaufError(f"{where} has no {key}", f"it, for a scaling of type {kind}", "add it")
    if kind == "linear":
        return build(RopeScaling, where, rope_type=kind, factor=found["factor"])
    original = values.get("original_max_position_embeddings")
    if original is not None:  # Phi's place for it, which transformers prefers
        found["original_max_position_embeddings"] = number(values, where, "original_max_position_embeddings")
    found.setdefault("original_max_position_embeddings", number(values, where, "max_position_embeddings"))
    return build(RopeScaling, where, **found)


def shared_json(config: Target | ResolvedDrafter, model_type: str) -> dict:
    """What a config.json says of any model; the inverse of `shared_fields`, with what goes without saying."""
    window = next((w for w in config.windows if w), None)
    scaling = _rope_json(config.rope_scaling)
    return {name: getattr(config, name) for name in (*SIZES, "rms_norm_eps")} | {
        "model_type": model_type,
        "hidden_act": "silu",
        "attention_bias": config.block.qkv_bias,
        "attention_dropout": 0.0,
        "layer_types": ["sliding_attention" if w else "full_attention" for w in config.windows],
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "max_window_layers": config.num_hidden_layers,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling or None,
        "rope_parameters": {"rope_type": "default"} | scaling | {"rope_theta": config.rope_theta},
        "bos_token_id": None,
        "eos_token_id": None,
    }


_ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "yarn": (
        *("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "truncate"),
        *("mscale", "mscale_all_dim", "attention_factor"),
    ),
}


def _rope_json(scaling: RopeScaling) -> dict:
    if scaling.rope_type == "default":
        return {}
    found = {key: getattr(scaling, key) for key in _ROPE_KEYS[scaling.rope_type]}
    return {"rope_type": scaling.rope_type} | {key: value for key, value in found.items() if value is not None}


# ---------------------------------------------------------------------------------------------
# Single values


def number(values: dict, where: str, name: str, least=1, most=_MOST, kind=int):
    """An int, or (kind float) a finite number above 0."""
    if name not in values:
        raise SpecaufError(f"{where} has no {name}", "every number of the architecture", f"add {name}")
    value = values[name]
    right = isinstance(value, int | kind) and not isinstance(value, bool) and abs(value) < math.inf
    if not right or value > most or value < (least if kind is int else 0):
        wanted = f"a whole number from {least} to {most}" if kind is int else "a finite number of at least 0"
        raise SpecaufError(f"{where}: {name} is {value!r}", wanted, "correct the value")
    return kind(value)


def flag(values: dict, where: str, name: str) -> bool:
    """true or false; false where it is missing or null."""
    value = values.get(name)
    if value is not None and not isinstance(value, bool):
        raise SpecaufError(f"{where}: {name} is {value!r}", "true or false", "correct the value")
    return bool(value)


def object_of(values: dict, where: str, name: str) -> dict:
    """An object of settings; empty where it is missing or null."""
    found = values.get(name)
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise SpecaufError(f"{where}: {name} is {found!r}", "an object of settings", "correct the value")
    return found


def listed(values: dict, where: str, name: str, kind: type) -> list:
    """A list, every item of which is of this kind."""
    found = values.get(name)
    if not isinstance(found, list) or not all(type(item) is kind for item in found):
        raise SpecaufError(f"{where}: {name} is {found!r}", f"a list of {kind.__name__}", f"write {name} explicitly")
    return found


def architecture_of(values: dict, where: str) -> str:
    """The one name in `architectures`."""
    found = listed(values, where, "architectures", str)
    if len(found) != 1:
        raise SpecaufError(f"{where}: architectures is {found!r}", "one name", "correct the value")
    return found[0]


def said(values: dict) -> dict:
    """Without keys that are null."""
    return {key: value for key, value in values.items() if value is not None}


def refuse(values: dict, where: str, *keys: str) -> None:
    """Refuse keys that ask for something."""
    for key in keys:
        if values.get(key):
            raise SpecaufError(f"{where}: {key} is {values[key]!r}", "none", "use a model without it")


def check_full_attention(values: dict, where: str) -> None:
    """Refuse layers of another type."""
    if values.get("layer_types") is not None:
        for kind in listed(values, where, "layer_types", str):
            if kind != "full_attention":
                raise SpecaufError(f"{where}: a layer of type {kind!r}", "full_attention", "use another model")


def build(cls, where: str, **fields):
    """`cls(**fields)`; the dataclass's own complaints get the file's name."""
    try:
        return cls(**fields)
    except SpecaufError as error:
        raise SpecaufError(f"{where}: {error.found}", error.expected, error.remedy) from error
