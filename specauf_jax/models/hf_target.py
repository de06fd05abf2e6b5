"""config.json ↔ targets, in Hugging Face layout.

Nothing is guessed: sizes and the RoPE base must be written in the file, and what this project would compute
differently (another activation, biases, a quantised file) is refused.
"""

import dataclasses

from specauf_jax.architecture import Target
from specauf_jax.errors import SpecaufError
from specauf_jax.models.hf_keys import check_keys
from specauf_jax.models.hf_values import (
    MOST_LAYERS,
    SIZES,
    architecture_of,
    build,
    check_full_attention,
    flag,
    listed,
    number,
    object_of,
    refuse,
    shared_fields,
    shared_json,
)
from specauf_jax.parts import Experts, Hybrid

TARGET_ARCHITECTURES = {"Qwen3ForCausalLM": "qwen3", "Qwen2ForCausalLM": "qwen2", "LlamaForCausalLM": "llama",
                        "Qwen3MoeForCausalLM": "qwen3_moe", "Qwen3_5ForCausalLM": "qwen3_5",
                        "Qwen3_5ForConditionalGeneration": "qwen3_5"}  # fmt: skip
_MODEL_TYPES = {"Qwen3_5ForCausalLM": "qwen3_5_text"}  # in files, where it is another name than here
_SEES = "ForConditionalGeneration"  # a model whose language part is one of several
_KEYS = (
    *(*SIZES, "rms_norm_eps", "hidden_act", "rope_theta", "rope_scaling", "rope_parameters"),
    *("original_max_position_embeddings", "layer_types", "sliding_window", "use_sliding_window"),
    *("attention_bias", "mlp_bias", "quantization_config", "tie_word_embeddings", "is_causal"),
)
_EXPERTS_KEYS = (
    *("num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"),
    *("decoder_sparse_step", "mlp_only_layers", "router_aux_loss_coef", "output_router_logits"),
)
"""Of a mixture of experts; the last two change no number."""
_LINEAR_KEYS = tuple(field.name for field in dataclasses.fields(Hybrid) if field.name.startswith("linear"))
_HYBRID_KEYS = (
    *(*_LINEAR_KEYS, "full_attention_interval", "partial_rotary_factor", "attn_output_gate"),
    *("mtp_num_hidden_layers", "mtp_use_dedicated_embeddings", "mamba_ssm_dtype"),
)
"""Of layers with linear attention; the last three concern what is not computed here."""


def target_keys(architecture: str | None = None) -> tuple[str, ...]:
    """Keys of a target's config.json that are read here, in its text_config where it has one."""
    more = {"qwen3_moe": _EXPERTS_KEYS, "qwen3_5": _HYBRID_KEYS}
    return (*_KEYS, *more.get(TARGET_ARCHITECTURES.get(architecture or "", ""), ()))


def read_target(values: dict, where: str) -> Target:
    """The architecture that a target's config.json describes.

    Args:
      values: as parsed.
      where: the file's name, for messages.

    Raises:
      SpecaufError: naming the key that is missing, wrong or not supported.
    """
    architecture = architecture_of(values, where)
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
    if architecture.endswith(_SEES):
        values, where = _text_of(values, where), f"{where}: text_config"
    biases = () if model_type == "qwen2" else ("attention_bias",)
    refuse(values, where, *biases, "mlp_bias", "use_sliding_window", "quantization_config")
    check_keys(values, where, target_keys(architecture))
    hybrid = _read_hybrid(values, where) if model_type == "qwen3_5" else None
    if hybrid is None:
        check_full_attention(values, where)
    else:
        values = _plain_rope(values, where)
    if values.get("is_causal") not in (None, True):
        raise SpecaufError(f"{where}: is_causal is {values['is_causal']!r}", "true", "use a causal language model")
    values = dict(values)
    if model_type in ("qwen2", "llama") and values.get("head_dim") is None:
        values["head_dim"] = number(values, where, "hidden_size") // number(values, where, "num_attention_heads")
    return build(
        Target,
        where,
        **shared_fields(values, where),
        model_type=model_type,
        tie_word_embeddings=flag(values, where, "tie_word_embeddings"),
        experts=_read_experts(values, where) if model_type == "qwen3_moe" else None,
        hybrid=hybrid,
    )


def text_config(values: dict) -> dict:
    """A sound config.json without what it says of other parts than the language model."""
    [architecture] = values["architectures"]
    return values["text_config"] | {"architectures": [architecture]} if architecture.endswith(_SEES) else values


def _text_of(values: dict, where: str) -> dict:
    """The language model's part of a file of a model that sees, too; its other parts are not read."""
    text = object_of(values, where, "text_config")
    tied = [place["tie_word_embeddings"] for place in (values, text) if place.get("tie_word_embeddings") is not None]
    if tied and any(value != tied[0] for value in tied):
        raise SpecaufError(f"{where}: tie_word_embeddings is {tied[0]!r}, in text_config {tied[1]!r}", "one value",
                           "correct the file")  # fmt: skip
    refuse(values, where, "quantization_config")
    if text.get("model_type") not in (None, f"{values.get('model_type')}_text"):
        raise SpecaufError(f"{where}: text_config is of model_type {text['model_type']!r}",
                           f"'{values.get('model_type')}_text'", "use another model")  # fmt: skip
    return text | ({"tie_word_embeddings": tied[0]} if tied else {})


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
    share = shares.pop()
    sizes = {name: number(values, where, name) for name in _LINEAR_KEYS}
    return build(Hybrid, where, full_attention_interval=period, partial_rotary_factor=share, **sizes)


def _plain_rope(values: dict, where: str) -> dict:
    """Without what concerns images: of text all three coordinates of a position are the same."""
    rope = object_of(values, where, "rope_parameters")
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
    names = [name for name in ("num_experts", "num_local_experts") if values.get(name) is not None] or ["num_experts"]
    counts = {number(values, where, name) for name in names}
    if len(counts) > 1:
        raise SpecaufError(f"{where}: num_experts and num_local_experts differ", "one number", "correct the file")
    sizes = {name: number(values, where, name) for name in ("num_experts_per_tok", "moe_intermediate_size")}
    if "norm_topk_prob" not in values:
        raise SpecaufError(f"{where} has no norm_topk_prob", "true or false, as it was trained", "add norm_topk_prob")
    norm = flag(values, where, "norm_topk_prob")
    return build(Experts, where, num_experts=counts.pop(), **sizes, norm_topk_prob=norm)


def write_target(config: Target, eos_token_id: int | None = None) -> dict:
    """config.json of a target, in Hugging Face layout."""
    architecture = next(name for name, kind in TARGET_ARCHITECTURES.items() if kind == config.model_type)
    values = shared_json(config, _MODEL_TYPES.get(architecture, config.model_type))
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
