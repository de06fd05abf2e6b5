"""Qwen3-MoE: a mixture of experts in every layer."""

from specauf_jax.architecture import Target
from specauf_jax.errors import SpecaufError
from specauf_jax.models.families.dense import check_plain
from specauf_jax.models.families.family import Family
from specauf_jax.models.hf_values import build, flag, number
from specauf_jax.parts import Experts

KEYS = (
    *("num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"),
    *("decoder_sparse_step", "mlp_only_layers", "router_aux_loss_coef", "output_router_logits"),
)
"""The last two change no number."""


def _read(values: dict, where: str) -> tuple[dict, dict]:
    check_plain(values, where)
    return values, {"experts": read_experts(values, where)}


def read_experts(values: dict, where: str, **more) -> Experts:
    """All layers alike; transformers writes num_local_experts for num_experts.

    Args:
      values: config.json.
      where: its name.
      more: fields that this kind has besides, or that its config.json leaves out.
    """
    for key, neutral in (("decoder_sparse_step", 1), ("mlp_only_layers", [])):
        if values.get(key, neutral) not in (neutral, None):
            raise SpecaufError(
                f"{where}: {key} is {values[key]!r}", f"{neutral!r}: experts in every layer", "use another model"
            )
    names = [name for name in ("num_experts", "num_local_experts") if values.get(name) is not None] or ["num_experts"]
    counts = {number(values, where, name) for name in names}
    if len(counts) > 1:
        raise SpecaufError(f"{where}: num_experts and num_local_experts differ", "one number", "correct the file")
    fields = {"num_experts": counts.pop(), **more}
    fields |= {name: number(values, where, name) for name in ("num_experts_per_tok", "moe_intermediate_size")
               if name not in more}  # fmt: skip
    if "norm_topk_prob" not in fields and "norm_topk_prob" not in values:
        raise SpecaufError(f"{where} has no norm_topk_prob", "true or false, as it was trained", "add norm_topk_prob")
    return build(Experts, where, **{"norm_topk_prob": flag(values, where, "norm_topk_prob")} | fields)


def write_experts(values: dict, config: Target) -> dict:
    """The inverse of `read_experts`."""
    names = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob",
             "shared_expert_intermediate_size")  # fmt: skip
    found = {name: getattr(config.experts, name) for name in names}
    return values | {name: value for name, value in found.items() if value is not None}


FAMILIES = (Family("qwen3_moe", "Qwen3-MoE", {"Qwen3MoeForCausalLM": "qwen3_moe"}, _read, write_experts, KEYS),)
