"""config.json ↔ architectures: Hugging Face targets, z-lab, SpecForge and speculators drafters.

Nothing is guessed: a size, the mask token and the RoPE base must be written in the file, and what
this project would compute differently (another activation, biases, a quantised file) is refused.
"""

import dataclasses
import math
import typing

from specauf_jax.architecture import Head, ResolvedDrafter, RopeScaling, RopeType, Target
from specauf_jax.errors import SpecaufError
from specauf_jax.models.heads import head_settings, head_types

TARGET_ARCHITECTURES = {"Qwen3ForCausalLM": "qwen3", "Qwen2ForCausalLM": "qwen2", "LlamaForCausalLM": "llama"}
DRAFTER_ARCHITECTURES = tuple(dict.fromkeys(name for head in head_types().values() for name in head.architectures))
_UNNAMED = "dflash"  # the projector type of a file that names none
_MOST = 2**31 - 1
_MOST_LAYERS = 4096

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)


def read_target(values: dict, where: str) -> Target:
    """The architecture that a target's config.json describes.

    Args:
      values: as parsed.
      where: the file's name, for messages.

    Raises:
      SpecaufError: naming the key that is missing, wrong or not supported.
    """
    architecture = _architecture(values, where)
    if architecture not in TARGET_ARCHITECTURES:
        raise SpecaufError(
            f"{where}: architecture {architecture!r}",
            f"one of {', '.join(TARGET_ARCHITECTURES)}",
            "use a dense Qwen3, Qwen2.5 or Llama 3 checkpoint",
        )
    model_type = TARGET_ARCHITECTURES[architecture]
    if values.get("model_type", model_type) != model_type:
        raise SpecaufError(
            f"{where}: model_type {values['model_type']!r} under {architecture}", f"{model_type!r}", "correct the file"
        )
    biases = () if model_type == "qwen2" else ("attention_bias",)
    _refuse(values, where, *biases, "mlp_bias", "use_sliding_window", "quantization_config")
    _check_full_attention(values, where)
    values = dict(values)
    if model_type != "qwen3" and values.get("head_dim") is None:
        values["head_dim"] = _number(values, where, "hidden_size") // _number(values, where, "num_attention_heads")
    return _build(
        Target,
        where,
        **_shared(values, where),
        model_type=model_type,
        tie_word_embeddings=_flag(values, where, "tie_word_embeddings"),
    )


def write_target(config: Target, eos_token_id: int | None = None) -> dict:
    """config.json of a target, in Hugging Face layout."""
    [architecture] = [name for name, kind in TARGET_ARCHITECTURES.items() if kind == config.model_type]
    return _shared_json(config, config.model_type) | {
        "architectures": [architecture],
        "tie_word_embeddings": config.tie_word_embeddings,
        "eos_token_id": eos_token_id,
    }


def read_drafter(values: dict, where: str) -> ResolvedDrafter:
    """The architecture that a drafter's config.json describes; arguments and errors as for `read_target`."""
    if "speculators_model_type" in values:
        raise SpecaufError(
            f"{where}: a drafter in speculators' layout",
            "z-lab's layout, whose layer ids are one lower",
            "convert it, or export it again with --layout zlab",
        )
    architecture = _architecture(values, where)
    if architecture not in DRAFTER_ARCHITECTURES:
        raise SpecaufError(
            f"{where}: architecture {architecture!r}",
            " or ".join(DRAFTER_ARCHITECTURES),
            "pass the folder of a DFlash or Domino drafter",
        )
    _refuse(values, where, "attention_bias", "quantization_config")
    dflash = _object(values, where, "dflash_config")
    kinds = {kind: head for kind, head in head_types().items() if architecture in head.architectures}
    projector = dflash.get("projector_type") or (_UNNAMED if _UNNAMED in kinds else next(iter(kinds)))
    if not isinstance(projector, str) or projector not in kinds:
        raise SpecaufError(
            f"{where}: projector_type {projector!r} under {architecture}",
            " or ".join(sorted(kinds)),
            f"use a drafter of {' or '.join(head.title for head in kinds.values())}",
        )
    return _build(
        ResolvedDrafter,
        where,
        **_shared(values, where),
        **_layer_types(values, where),
        block_size=_block_size(values, dflash, where),
        mask_token_id=_number(dflash, f"{where}: dflash_config", "mask_token_id", least=0),
        target_layer_ids=tuple(_list(dflash, f"{where}: dflash_config", "target_layer_ids", int)),
        num_target_layers=_number(values, where, "num_target_layers") if "num_target_layers" in values else None,
        head=_read_head(kinds[projector], values, dflash, where),
    )


def write_drafter(config: ResolvedDrafter, architecture: str = "DFlashDraftModel") -> dict:
    """config.json of a drafter, in z-lab's layout."""
    dflash = {
        "block_size": config.block_size,
        "mask_token_id": config.mask_token_id,
        "target_layer_ids": list(config.target_layer_ids),
    }
    values = _shared_json(config, "qwen3") | {
        "architectures": [architecture],
        "block_size": config.block_size,
        "dflash_config": dflash,
        "num_target_layers": config.num_target_layers,
        "tie_word_embeddings": False,
    }
    if config.head.projector_type != _UNNAMED:
        dflash |= {"projector_type": config.head.projector_type} | head_settings(config.head)
        values |= {name: getattr(config.head, name) for name in config.head.top_level}
    return values


def write_speculators(config: ResolvedDrafter, verifier: str, verifier_architecture: str) -> dict:
    """config.json of a plain DFlash drafter, in speculators' layout: its layer ids are one higher.

    Args:
      config: resolved.
      verifier: name or path of the target, from which speculators takes embedding and LM head.
      verifier_architecture: as in the target's config.json.
    """
    return {
        "architectures": ["DFlashSpeculator"],
        "speculators_model_type": "dflash",
        "aux_hidden_state_layer_ids": [i + 1 for i in config.target_layer_ids],
        "block_size": config.block_size,
        "draft_vocab_size": config.vocab_size,
        "mask_token_id": config.mask_token_id,
        "sample_from_anchor": False,
        "sliding_window_non_causal": False,
        "tie_word_embeddings": False,
        "transformer_layer_config": _shared_json(config, "qwen3") | {"tie_word_embeddings": False},
        "speculators_config": {
            "algorithm": "dflash",
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": config.block_size - 1}],
            "verifier": {"name_or_path": verifier, "architectures": [verifier_architecture]},
        },
    }


# ---------------------------------------------------------------------------------------------
# Parts of a drafter's file


def _read_head(kind: type[Head], values: dict, dflash: dict, where: str) -> Head:
    """Every setting of the head, from dflash_config or, where that may be, from the top level."""
    inside = f"{where}: dflash_config"
    dflash = dict(kind.absent) | {name: values[name] for name in kind.top_level if name in values} | dflash
    found = {}
    for field in dataclasses.fields(kind):
        if field.name not in dflash:
            raise SpecaufError(f"{inside} has no {field.name}", f"every setting of {kind.title}'s head",
                               "add it, as it was trained")  # fmt: skip
        if isinstance(field.default, bool):
            found[field.name] = _flag(dflash, inside, field.name)
        else:
            found[field.name] = _number(dflash, inside, field.name, least=0)
    return _build(kind, where, **found)


def _block_size(values: dict, dflash: dict, where: str) -> int:
    found = {_number(place, where, "block_size") for place in (values, dflash) if "block_size" in place}
    if len(found) != 1:
        raise SpecaufError(
            f"{where}: block_size is {' and '.join(map(str, sorted(found))) or 'missing'}",
            "one value, at the top level and in dflash_config",
            "correct the file",
        )
    return found.pop()


def _layer_types(values: dict, where: str) -> dict:
    """Fields of sliding windows; where no list says which layers have one, the last ones do (Hugging Face's rule)."""
    layers, window = _number(values, where, "num_hidden_layers", most=_MOST_LAYERS), values.get("sliding_window")
    slides = _flag(values, where, "use_sliding_window") and window is not None
    if values.get("layer_types") is not None:
        types = tuple(_list(values, where, "layer_types", str))
    else:
        full = _number(values, where, "max_window_layers", 0) if slides else layers
        types = tuple("full_attention" if i < full else "sliding_attention" for i in range(layers))
    if "sliding_attention" not in types:
        return {"layer_types": types}
    if not slides:
        raise SpecaufError(
            f"{where}: layer_types has sliding_attention, use_sliding_window is "
            f"{values.get('use_sliding_window')!r} and sliding_window {window!r}",
            "use_sliding_window true and the window",
            "correct the file",
        )
    return {"layer_types": types, "sliding_window": _number(values, where, "sliding_window")}


# ---------------------------------------------------------------------------------------------
# What targets and drafters have in common


def _shared(values: dict, where: str) -> dict:
    fields = {
        name: _number(values, where, name, most=_MOST_LAYERS if name == "num_hidden_layers" else _MOST)
        for name in _SIZES
    }
    if values.get("hidden_act", "silu") != "silu":
        raise SpecaufError(
            f"{where}: hidden_act is {values['hidden_act']!r}", "'silu'", "use a model with SwiGLU layers"
        )
    epsilon = _number(values, where, "rms_norm_eps", kind=float)
    return fields | {"rms_norm_eps": epsilon} | _rope(values, where)


def _rope(values: dict, where: str) -> dict:
    """`rope_theta` and `rope_scaling` from the new `rope_parameters`, the old pair of keys, or both if they agree."""
    new, old = _object(values, where, "rope_parameters"), _object(values, where, "rope_scaling")
    bases = [place["rope_theta"] for place in (new, old, values) if place.get("rope_theta") is not None]
    if not bases or any(base != bases[0] for base in bases):
        raise SpecaufError(
            f"{where}: rope_theta is {' and '.join(map(repr, bases)) or 'missing'}",
            "one base, in rope_parameters or at the top level",
            "write the base that the model was trained with",
        )
    theta = _number({"rope_theta": bases[0]}, where, "rope_theta", kind=float)
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
            found[key] = _flag(place, where, key)
        else:
            found[key] = _number(place, where, key, kind=int if key.startswith("original") else float)
    if kind == "default":
        return RopeScaling()
    for key in ("factor",) + (("low_freq_factor", "high_freq_factor") if kind == "llama3" else ()):
        if key not in found:
            raise SpecaufError(f"{where} has no {key}", f"it, for a scaling of type {kind}", "add it")
    if kind == "linear":
        return _build(RopeScaling, where, rope_type=kind, factor=found["factor"])
    original = values.get("original_max_position_embeddings")
    if original is not None:  # Phi's place for it, which transformers prefers
        found["original_max_position_embeddings"] = _number(values, where, "original_max_position_embeddings")
    found.setdefault("original_max_position_embeddings", _number(values, where, "max_position_embeddings"))
    return _build(RopeScaling, where, **found)


def _shared_json(config: Target | ResolvedDrafter, model_type: str) -> dict:
    windows = config.windows if isinstance(config, ResolvedDrafter) else (None,) * config.num_hidden_layers
    window = next((w for w in windows if w), None)
    scaling = _rope_json(config.rope_scaling)
    return {name: getattr(config, name) for name in (*_SIZES, "rms_norm_eps")} | {
        "model_type": model_type,
        "hidden_act": "silu",
        "attention_bias": config.qkv_bias,
        "attention_dropout": 0.0,
        "layer_types": ["sliding_attention" if w else "full_attention" for w in windows],
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


def _number(values: dict, where: str, name: str, least=1, most=_MOST, kind=int):
    """An int, or (kind float) a finite number above 0."""
    if name not in values:
        raise SpecaufError(f"{where} has no {name}", "every number of the architecture", f"add {name}")
    value = values[name]
    right = isinstance(value, int | kind) and not isinstance(value, bool) and math.isfinite(value)
    if not right or value > most or value < (least if kind is int else 0):
        wanted = f"a whole number from {least} to {most}" if kind is int else "a finite number of at least 0"
        raise SpecaufError(f"{where}: {name} is {value!r}", wanted, "correct the value")
    return kind(value)


def _flag(values: dict, where: str, name: str) -> bool:
    value = values.get(name)
    if value is not None and not isinstance(value, bool):
        raise SpecaufError(f"{where}: {name} is {value!r}", "true or false", "correct the value")
    return bool(value)


def _object(values: dict, where: str, name: str) -> dict:
    found = values.get(name)
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise SpecaufError(f"{where}: {name} is {found!r}", "an object of settings", "correct the value")
    return found


def _list(values: dict, where: str, name: str, kind: type) -> list:
    found = values.get(name)
    if not isinstance(found, list) or not all(type(item) is kind for item in found):
        raise SpecaufError(f"{where}: {name} is {found!r}", f"a list of {kind.__name__}", f"write {name} explicitly")
    return found


def _architecture(values: dict, where: str) -> str:
    found = _list(values, where, "architectures", str)
    if len(found) != 1:
        raise SpecaufError(f"{where}: architectures is {found!r}", "one name", "correct the value")
    return found[0]


def _refuse(values: dict, where: str, *keys: str) -> None:
    for key in keys:
        if values.get(key):
            raise SpecaufError(f"{where}: {key} is {values[key]!r}", "none", "use a model without it")


def _check_full_attention(values: dict, where: str) -> None:
    if values.get("layer_types") is not None:
        for kind in _list(values, where, "layer_types", str):
            if kind != "full_attention":
                raise SpecaufError(f"{where}: a layer of type {kind!r}", "full_attention", "use another model")


def _build(cls, where: str, **fields):
    """`cls(**fields)`; the dataclass's own complaints get the file's name."""
    try:
        return cls(**fields)
    except SpecaufError as error:
        raise SpecaufError(f"{where}: {error.found}", error.expected, error.remedy) from error
