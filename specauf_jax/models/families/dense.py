"""Qwen3, Qwen2.5 and Llama 3: one MLP and full attention in every layer."""

from specauf_jax.models.families.family import Family
from specauf_jax.models.hf_values import check_full_attention, number, refuse


def read(values: dict, where: str) -> tuple[dict, dict]:
    """Nothing of its own."""
    check_plain(values, where)
    return values, {}


def _read_older(values: dict, where: str) -> tuple[dict, dict]:
    """head_dim may be missing."""
    if values.get("head_dim") is None:
        size = number(values, where, "hidden_size") // number(values, where, "num_attention_heads")
        values = values | {"head_dim": size}
    return read(values, where)


def check_plain(values: dict, where: str) -> None:
    """Refuse windows."""
    refuse(values, where, "use_sliding_window")
    check_full_attention(values, where)


FAMILIES = (
    Family("qwen3", "Qwen3", {"Qwen3ForCausalLM": "qwen3"}, read),
    Family("qwen2", "Qwen2.5", {"Qwen2ForCausalLM": "qwen2"}, _read_older),
    Family("llama", "Llama 3", {"LlamaForCausalLM": "llama"}, _read_older),
)
