"""config.json ↔ architectures: Hugging Face targets, z-lab, SpecForge and speculators drafters.

Nothing is guessed: a size, the mask token, the RoPE base and a head's settings must be written in the file, and what
this project would compute differently (another activation, biases, a quantised file) is refused.
"""

import dataclasses
import math
import typing

from specauf_jax.architecture import Experts, Head, Hybrid, ResolvedDrafter, RopeScaling, RopeType, Target
from specauf_jax.errors import SpecaufError
from specauf_jax.models.heads import head_settings, head_types
from specauf_jax.models.hf_keys import check_keys

TARGET_ARCHITECTURES = {"Qwen3ForCausalLM": "qwen3", "Qwen2ForCausalLM": "qwen2", "LlamaForCausalLM": "llama",
                        "Qwen3MoeForCausalLM": "qwen3_moe", "Qwen3_5ForCausalLM": "qwen3_5",
                        "Qwen3_5ForConditionalGeneration": "qwen3_5"}  # fmt: skip
_MODEL_TYPES = {"Qwen3_5ForCausalLM": "qwen3_5_text"}  # in files, where it is another name than here
DRAFTER_ARCHITECTURES = tuple(dict.fromkeys(name for head in head_types().values() for name in head.architectures))
_SPECULATORS = {head.speculator.kind: head for head in head_types().values() if head.speculator}
SPECULATORS = tuple(head.speculator.architecture for head in head_types().values() if head.speculator)
"""Architectures in speculators' layout."""
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
TARGET_KEYS = (
    *(*_SIZES, "rms_norm_eps", "hidden_act", "rope_theta", "rope_scaling", "rope_parameters"),
    *("original_max_position_embeddings", "layer_types", "sliding_window", "use_sliding_window"),
    *("attention_bias", "mlp_bias", "quantization_config", "tie_word_embeddings", "is_causal"),
)
"""Keys of a target's config.json that are read here."""
_EXPERTS_KEYS = (
    *("num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"),
    *("decoder_sparse_step", "mlp_only_layers", "router_aux_loss_coef", "output_router_logits"),
)
"""With them those of a mixture of experts; the last two change no number."""
_LINEAR_KEYS = tuple(field.name for field in dataclasses.fields(Hybrid) if field.name.startswith("linear"))
_HYBRID_KEYS = (
    *(*_LINEAR_KEYS, "full_attention_interval", "partial_rotary_factor", "attn_output_gate"),
    *("mtp_num_hidden_layers", "mtp_use_dedicated_embeddings", "mamba_ssm_dtype"),
)
"""With them those of layers with linear attention; the last three concern what is not computed here."""
_LABELS = ("shift_label", "sample_from_anchor", "query_zero_predicts_next")
"""Names of one flag: in SpecForge, in speculators and vLLM, in DeepSpec."""
_DFLASH_KEYS = (
    *("block_size", "mask_token_id", "target_layer_ids", "num_target_layers", "projector_type", "attention_mode"),
    *_LABELS,
)
"""Keys that stand in dflash_config, or at the top level; with them the settings of the head."""
_SPECULATORS_KEYS = (
    *("speculators_model_type", "speculators_config", "transformer_layer_config", "aux_hidden_state_layer_ids"),
    *("sample_from_anchor", "draft_vocab_size", "block_size", "mask_token_id", "quantization_config", "is_causal"),
    *("speculators_version", "target_hidden_size"),  # of no effect
    *(field.name for head in _SPECULATORS.values() for field in dataclasses.fields(head)),
)
DRAFTER_KEYS = (
    *(*TARGET_KEYS, *_DFLASH_KEYS, "dflash_config"),
    *(field.name for head in head_types().values() for field in dataclasses.fields(head)),
)
"""Keys of a drafter's config.json that are read here."""


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
            "use a checkpoint of Qwen3, Qwen3-MoE, Qwen3.5, Qwen2.5 or Llama 3",
        )
    model_type = TARGET_ARCHITECTURES[architecture]
    wanted = _MODEL_TYPES.get(architecture, model_type)
    if values.get("model_type", wanted) != wanted:
        raise SpecaufError(
            f"{where}: model_type {values['model_type']!r} under {architecture}", f"{wanted!r}", "correct the file"
        )
    if architecture.endswith("ForConditionalGeneration"):
        values, where = _text_of(values, where), f"{where}: text_config"
    biases = () if model_type == "qwen2" else ("attention_bias",)
    _refuse(values, where, *biases, "mlp_bias", "use_sliding_window", "quantization_config")
    more = {"qwen3_moe": _EXPERTS_KEYS, "qwen3_5": _HYBRID_KEYS}.get(model_type, ())
    check_keys(values, where, (*TARGET_KEYS, *more))
    hybrid = _read_hybrid(values, where) if model_type == "qwen3_5" else None
    if hybrid is None:
        _check_full_attention(values, where)
    else:
        values = _plain_rope(values, where)
    if values.get("is_causal") not in (None, True):
        raise SpecaufError(f"{where}: is_causal is {values['is_causal']!r}", "true", "use a causal language model")
    values = dict(values)
    if model_type in ("qwen2", "llama") and values.get("head_dim") is None:
        values["head_dim"] = _number(values, where, "hidden_size") // _number(values, where, "num_attention_heads")
    return _build(
        Target,
        where,
        **_shared(values, where),
        model_type=model_type,
        tie_word_embeddings=_flag(values, where, "tie_word_embeddings"),
        experts=_read_experts(values, where) if model_type == "qwen3_moe" else None,
        hybrid=hybrid,
    )


def _text_of(values: dict, where: str) -> dict:
    """The language model's part of a file of a model that sees, too; its other parts are not read."""
    text = _object(values, where, "text_config")
    tied = [place["tie_word_embeddings"] for place in (values, text) if place.get("tie_word_embeddings") is not None]
    if tied and any(value != tied[0] for value in tied):
        raise SpecaufError(f"{where}: tie_word_embeddings is {tied[0]!r}, in text_config {tied[1]!r}", "one value",
                           "correct the file")  # fmt: skip
    _refuse(values, where, "quantization_config")
    return text | ({"tie_word_embeddings": tied[0]} if tied else {})


def _read_hybrid(values: dict, where: str) -> Hybrid:
    """One layer of full attention at the end of each period, as layer_types or full_attention_interval say."""
    layers = _number(values, where, "num_hidden_layers", most=_MOST_LAYERS)
    interval = values.get("full_attention_interval")
    if values.get("layer_types") is not None:
        types = _list(values, where, "layer_types", str)
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
        period = _number(values, where, "full_attention_interval")
    if values.get("attn_output_gate", True) is not True:
        raise SpecaufError(f"{where}: attn_output_gate is {values['attn_output_gate']!r}", "true", "use another model")
    shares = {place["partial_rotary_factor"] for place in (_object(values, where, "rope_parameters"), values)
              if place.get("partial_rotary_factor") is not None}  # fmt: skip
    if len(shares) != 1:
        raise SpecaufError(f"{where}: partial_rotary_factor is {shares or 'missing'}", "one value", "correct the file")
    share = _number({"partial_rotary_factor": shares.pop()}, where, "partial_rotary_factor", kind=float)
    sizes = {name: _number(values, where, name) for name in _LINEAR_KEYS}
    return _build(Hybrid, where, full_attention_interval=period, partial_rotary_factor=share, **sizes)


def _plain_rope(values: dict, where: str) -> dict:
    """Without what concerns images: of text all three coordinates of a position are the same."""
    rope = _object(values, where, "rope_parameters")
    kept = {
        key: x for key, x in rope.items() if key not in ("mrope_section", "mrope_interleaved", "partial_rotary_factor")
    }
    return values | {"rope_parameters": kept}


def _read_experts(values: dict, where: str) -> Experts:
    """All layers alike; transformers writes num_local_experts for num_experts."""
    for key, neutral in (("decoder_sparse_step", 1), ("mlp_only_layers", [])):
        if values.get(key, neutral) not in (neutral, None):
            raise SpecaufError(
                f"{where}: {key} is {values[key]!r}", f"{neutral!r}: experts in every layer", "use another model"
            )
    names = [name for name in ("num_experts", "num_local_experts") if name in values] or ["num_experts"]
    counts = {_number(values, where, name) for name in names}
    if len(counts) > 1:
        raise SpecaufError(f"{where}: num_experts and num_local_experts differ", "one number", "correct the file")
    sizes = {name: _number(values, where, name) for name in ("num_experts_per_tok", "moe_intermediate_size")}
    norm = _flag(values, where, "norm_topk_prob")
    return _build(Experts, where, num_experts=counts.pop(), **sizes, norm_topk_prob=norm)


def write_target(config: Target, eos_token_id: int | None = None) -> dict:
    """config.json of a target, in Hugging Face layout."""
    architecture = next(name for name, kind in TARGET_ARCHITECTURES.items() if kind == config.model_type)
    values = _shared_json(config, _MODEL_TYPES.get(architecture, config.model_type))
    if config.experts is not None:
        values |= dataclasses.asdict(config.experts)
    if config.hybrid is not None:
        types = ["linear_attention"] * (config.period - 1) + ["full_attention"]
        values |= dataclasses.asdict(config.hybrid) | {
            "layer_types": types * (config.num_hidden_layers // config.period)
        }
        values["rope_parameters"] |= {"partial_rotary_factor": config.hybrid.partial_rotary_factor}
    return values | {
        "architectures": [architecture],
        "tie_word_embeddings": config.tie_word_embeddings,
        "eos_token_id": eos_token_id,
    }


def read_drafter(values: dict, where: str) -> ResolvedDrafter:
    """The architecture that a drafter's config.json describes; arguments and errors as for `read_target`."""
    if "speculators_model_type" in values:
        values = _from_speculators(values, where)
    architecture = _architecture(values, where)
    if architecture not in DRAFTER_ARCHITECTURES:
        raise SpecaufError(
            f"{where}: architecture {architecture!r}",
            " or ".join(DRAFTER_ARCHITECTURES),
            f"pass the folder of a {' or '.join(head.title for head in head_types().values())} drafter",
        )
    _refuse(values, where, "attention_bias", "mlp_bias", "quantization_config")
    check_keys(values, where, DRAFTER_KEYS)
    kinds = {kind: head for kind, head in head_types().items() if architecture in head.architectures}
    dflash = dflash_settings(values, where)
    projector = dflash.get("projector_type", _UNNAMED if _UNNAMED in kinds else next(iter(kinds)))
    if projector not in list(kinds):
        raise SpecaufError(
            f"{where}: projector_type {projector!r} under {architecture}",
            " or ".join(sorted(kinds)),
            f"use a drafter of {' or '.join(head.title for head in kinds.values())}",
        )
    head, inside = kinds[projector], f"{where}: dflash_config"
    own = [field.name for field in dataclasses.fields(head)]
    section = _object(values, where, "dflash_config")
    check_keys(section, inside, {*_DFLASH_KEYS, *own, "is_causal"}, strict=True)
    found = _build(
        ResolvedDrafter,
        where,
        **_shared(values, where),
        **_layer_types(values, where),
        block_size=_number(dflash, inside, "block_size"),
        mask_token_id=_number(dflash, inside, "mask_token_id", least=0),
        target_layer_ids=tuple(_list(dflash, inside, "target_layer_ids", int)),
        num_target_layers=_number(dflash, where, "num_target_layers") if "num_target_layers" in dflash else None,
        head=_read_head(head, dflash, where),
    )
    _build(found.head.check, where, drafter=found)
    for place, name in ((values, where), (section, inside)):
        _check_causal(place, found, name)
    if dflash.get("attention_mode", mode := _attention_mode(found)) != mode:
        raise SpecaufError(f"{inside}: attention_mode is {dflash['attention_mode']!r}", f"{mode!r}, as the sizes say",
                           "correct the file")  # fmt: skip
    return found


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
    head = config.head
    if head.projector_type != _UNNAMED:
        dflash["projector_type"] = head.projector_type
    if head.attention_mode:
        dflash["attention_mode"] = _attention_mode(config)
    dflash |= {name: x for name, x in head_settings(head).items() if (name, x) not in head.absent.items()}
    return values | {name: getattr(head, name) for name in head.top_level}


def write_speculators(config: ResolvedDrafter, verifier: str, verifier_architecture: str) -> dict:
    """config.json of a drafter in speculators' layout: its layer ids are one higher.

    Args:
      config: resolved.
      verifier: name or path of the target, from which speculators takes embedding and LM head.
      verifier_architecture: as in the target's config.json.
    """
    head = config.head
    assert head.speculator is not None
    return {name: getattr(head, name) for name in head.top_level} | {
        "architectures": [head.speculator.architecture],
        "speculators_model_type": head.speculator.kind,
        "aux_hidden_state_layer_ids": [i + 1 for i in config.target_layer_ids],
        "block_size": config.block_size,
        "draft_vocab_size": config.vocab_size,
        "mask_token_id": config.mask_token_id,
        "sample_from_anchor": config.first_slot == 0,
        "sliding_window_non_causal": False,
        "tie_word_embeddings": False,
        "transformer_layer_config": _shared_json(config, "qwen3") | {"tie_word_embeddings": False},
        "speculators_config": {
            "algorithm": head.speculator.kind,
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": config.num_labels}],
            "verifier": {"name_or_path": verifier, "architectures": [verifier_architecture]},
        },
    }


def _from_speculators(values: dict, where: str) -> dict:
    """The same drafter's config.json in z-lab's layout."""
    kind = values["speculators_model_type"]
    if kind not in list(_SPECULATORS):
        raise SpecaufError(
            f"{where}: speculators_model_type {kind!r}", f"one of {', '.join(_SPECULATORS)}", "use another drafter"
        )
    head, body = _SPECULATORS[kind], _object(values, where, "transformer_layer_config")
    assert head.speculator is not None
    check_keys(values, where, _SPECULATORS_KEYS)
    if _architecture(values, where) not in (named := (head.speculator.architecture, *head.architectures)):
        raise SpecaufError(f"{where}: architecture {_architecture(values, where)!r} of a {kind}", " or ".join(named),
                           "correct the file")  # fmt: skip
    if other := sorted({"dflash_config", "target_layer_ids", "shift_label", "projector_type"} & values.keys()):
        raise SpecaufError(f"{where}: {other[0]} beside speculators_model_type", "the keys of one layout",
                           f"remove {other[0]}, or speculators_model_type")  # fmt: skip
    if values.get("draft_vocab_size") not in (None, body.get("vocab_size")):
        raise SpecaufError(
            f"{where}: draft_vocab_size is {values['draft_vocab_size']!r}",
            f"the target's {body.get('vocab_size')!r}: a drafter of the whole vocabulary",
            "train one without --draft-vocab-size",
        )
    if body.get("sliding_window") is not None:  # theirs starts at the anchor for all slots
        raise SpecaufError(
            f"{where}: sliding_window is {body['sliding_window']!r}", "full attention", "use another drafter"
        )
    names = ("block_size", "mask_token_id", *(field.name for field in dataclasses.fields(head)))
    dflash = {name: values[name] for name in names if name in values} | {
        "projector_type": head.projector_type,
        "target_layer_ids": [i - 1 for i in _list(values, where, "aux_hidden_state_layer_ids", int)],
    }
    if values.get("sample_from_anchor") is not None:
        dflash["shift_label"] = _flag(values, where, "sample_from_anchor")
    kept = {name: values[name] for name in ("quantization_config", "is_causal") if name in values}
    return body | kept | {"architectures": [head.architectures[0]], "dflash_config": dflash}


# ---------------------------------------------------------------------------------------------
# Parts of a drafter's file


def _attention_mode(config: ResolvedDrafter) -> str:
    return "gqa" if config.num_key_value_heads < config.num_attention_heads else "mha"


def dflash_settings(values: dict, where: str) -> dict:
    """Settings of dflash_config, with those that stand at the top level, each under one name.

    Raises:
      SpecaufError: two places, or two names of the label convention, hold different values.
    """
    inside, heads = _object(values, where, "dflash_config"), head_types().values()
    names = {*_DFLASH_KEYS, *(field.name for head in heads for field in dataclasses.fields(head))}
    found: dict = {}
    said: dict[str, str] = {}
    for place, section in (("in dflash_config", inside), ("at the top level", values)):
        for key in sorted(names & section.keys()):
            name, value = "shift_label" if key in _LABELS else key, section[key]
            if value is None:
                continue
            if key in _LABELS:
                value = _flag(section, where, key)
            if name in found and found[name] != value:
                raise SpecaufError(
                    f"{where}: {said[name]}, and {key} {value!r} {place}", "one value", "correct the file"
                )
            found[name], said[name] = value, f"{key} is {value!r} {place}"
    aliases = {alias: head.projector_type for head in heads for alias in head.aliases}
    if isinstance(found.get("projector_type"), str):
        found["projector_type"] = aliases.get(found["projector_type"], found["projector_type"])
    return found


def _read_head(kind: type[Head], dflash: dict, where: str) -> Head:
    """Every setting of the head."""
    inside, found = f"{where}: dflash_config", {}
    dflash = kind.absent | dflash
    for field in dataclasses.fields(kind):
        if field.name not in dflash:
            raise SpecaufError(f"{inside} has no {field.name}", f"every setting of {kind.title}'s head",
                               "add it, as it was trained")  # fmt: skip
        match field.default:
            case bool():
                found[field.name] = _flag(dflash, inside, field.name)
            case str():
                found[field.name] = dflash[field.name]  # one of a few words, as the head itself says
            case value:
                found[field.name] = _number(dflash, inside, field.name, least=0, kind=type(value))
    return _build(kind, where, **found)


def _check_causal(values: dict, drafter: ResolvedDrafter, where: str) -> None:
    """is_causal, of all layers, must say what is computed: only layers with a window see no later slot."""
    causal = values.get("is_causal")
    if causal is not None and any(causal is not (window is not None) for window in drafter.windows):
        raise SpecaufError(
            f"{where}: is_causal is {causal!r}",
            "slots that see the whole block, but in layers with a window none behind them",
            "use a drafter that was trained so",
        )


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
    right = isinstance(value, int | kind) and not isinstance(value, bool) and abs(value) < math.inf
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
