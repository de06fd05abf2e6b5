"""gpt-oss: windows in every second layer, attention sinks, experts with biases and limits, stored as MXFP4 or whole."""

from specauf_jax.architecture import Target
from specauf_jax.errors import SpecaufError
from specauf_jax.models.families import moe
from specauf_jax.models.families.family import Family
from specauf_jax.models.hf_values import MOST_LAYERS, listed, number, object_of, said

_KEYS = ("num_local_experts", "num_experts_per_tok", "experts_per_token", "swiglu_limit", "initial_context_length",
         "router_aux_loss_coef", "output_router_logits")  # fmt: skip
"""The last three change no number."""
_LIMIT = 7.0  # of all published models, and of those whose file does not say it


def _read(values: dict, where: str) -> tuple[dict, dict]:
    """layer_types, or a window in every second layer, the first one."""
    values = said(values)
    if values.get("attention_bias", True) is not True:
        raise SpecaufError(f"{where}: attention_bias is {values['attention_bias']!r}", "true", "use another model")
    method = object_of(values, where, "quantization_config").get("quant_method", "mxfp4")
    if method != "mxfp4":
        raise SpecaufError(f"{where}: quantization_config of {method!r}", "'mxfp4', or none", "use another checkpoint")
    layers = number(values, where, "num_hidden_layers", most=MOST_LAYERS)
    types = ["sliding_attention" if i % 2 == 0 else "full_attention" for i in range(layers)]
    if values.get("layer_types") is not None:
        types = listed(values, where, "layer_types", str)
    if values.get("experts_per_token") not in (None, values.get("num_experts_per_tok")):
        raise SpecaufError(f"{where}: experts_per_token and num_experts_per_tok differ", "one number",
                           "correct the file")  # fmt: skip
    experts = moe.read_experts(
        values,
        where,
        moe_intermediate_size=number(values, where, "intermediate_size"),
        norm_topk_prob=True,
        swiglu_limit=number({"swiglu_limit": _LIMIT} | values, where, "swiglu_limit", kind=float),
    )
    window = number(values, where, "sliding_window") if "sliding_attention" in types else None
    return values, {"experts": experts, "layer_types": tuple(types), "sliding_window": window}


def _write(values: dict, config: Target) -> dict:
    assert config.experts is not None
    gone = ("use_sliding_window", "max_window_layers")
    return {key: value for key, value in values.items() if key not in gone} | {
        "num_local_experts": config.experts.num_experts,
        "num_experts_per_tok": config.experts.num_experts_per_tok,
        "swiglu_limit": config.experts.swiglu_limit,
        "intermediate_size": config.experts.moe_intermediate_size,
    }


FAMILIES = (Family("gpt_oss", "gpt-oss", {"GptOssForCausalLM": "gpt_oss"}, _read, _write, _KEYS, mxfp4=True),)
