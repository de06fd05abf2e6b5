"""Parts of an architecture that some models have. Static data under `jit`; field names are Hugging Face's."""

import dataclasses
import typing
from dataclasses import dataclass
from typing import Literal

from specauf_jax.checks import choice, positive
from specauf_jax.errors import SpecaufError

RopeType = Literal["default", "linear", "llama3", "yarn"]


@dataclass(frozen=True)
class RopeScaling:
    """How RoPE's frequencies are stretched for texts longer than those of pretraining."""

    rope_type: RopeType = "default"
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    """Positions of pretraining, for llama3 and yarn; None takes max_position_embeddings."""
    low_freq_factor: float = 1.0
    """llama3: waves longer than the pretraining length over this are stretched whole."""
    high_freq_factor: float = 4.0
    """llama3: waves shorter than the pretraining length over this are left alone."""
    beta_fast: float = 32.0
    """yarn: frequencies with more turns than this over the pretraining length are left alone."""
    beta_slow: float = 1.0
    """yarn: frequencies with fewer turns than this are stretched whole."""
    truncate: bool = True
    """yarn: round the range between the two to whole frequencies."""
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    """yarn: multiplies cosines and sines; None takes 0.1 · ln(factor) + 1 (or mscale's quotient)."""

    def __post_init__(self):
        choice(self, "rope_type", typing.get_args(RopeType))
        positive(self, "factor", "original_max_position_embeddings", "low_freq_factor", "beta_fast", "beta_slow")
        positive(self, "mscale", "mscale_all_dim", "attention_factor")
        if self.high_freq_factor <= self.low_freq_factor:
            raise SpecaufError(
                f"high_freq_factor {self.high_freq_factor} and low_freq_factor {self.low_freq_factor}",
                "the first above the second",
                "change one of the two",
            )


@dataclass(frozen=True)
class Block:
    """What a decoder layer has beside grouped-query attention, a gated MLP and a norm before each of the two."""

    qk_norm: bool = False
    """RMSNorm of every head's queries and keys."""
    qkv_bias: bool = False
    """Biases of q_proj, k_proj and v_proj."""
    output_bias: bool = False
    """Of o_proj."""
    gated: bool = False
    """Gates, which q_proj makes too, of what heads have mixed."""
    sinks: bool = False
    """A score of every head for seeing nothing, which takes its share of the softmax."""
    centred: bool = False
    """Norms' parameters are their scales less 1."""
    outer_norms: bool = False
    """Norms of what attention and MLP write, too."""
    activation: Literal["silu", "gelu_pytorch_tanh"] = "silu"
    """Of the MLP's gates."""


BLOCKS = {
    "llama": Block(),
    "qwen2": Block(qkv_bias=True),
    "qwen3": Block(qk_norm=True),
    "qwen3_moe": Block(qk_norm=True),
    **dict.fromkeys(("qwen3_5", "qwen3_5_moe", "qwen3_next"), Block(qk_norm=True, gated=True, centred=True)),
    "gemma3": Block(qk_norm=True, centred=True, outer_norms=True, activation="gelu_pytorch_tanh"),
    "gpt_oss": Block(qkv_bias=True, output_bias=True, sinks=True),
}
"""By model_type of the target."""


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in the place of every layer's MLP."""

    num_experts: int
    """X."""
    num_experts_per_tok: int
    """k: those that a token meets."""
    moe_intermediate_size: int
    """F of each of them."""
    norm_topk_prob: bool
    """Whether the weights of a token's experts are brought to a sum of 1."""
    shared_expert_intermediate_size: int | None = None
    """F of one more that every token meets, through a gate; None for none."""
    swiglu_limit: float | None = None
    """Of gpt-oss, whose experts and router have biases: the size at which gates and values are cut."""

    def __post_init__(self):
        positive(self, "num_experts", "num_experts_per_tok", "moe_intermediate_size")
        positive(self, "shared_expert_intermediate_size", "swiglu_limit")
        if self.num_experts_per_tok > self.num_experts:
            raise SpecaufError(
                f"num_experts_per_tok {self.num_experts_per_tok} of num_experts {self.num_experts}",
                "at most all of them",
                "correct one of the two",
            )


@dataclass(frozen=True)
class Hybrid:
    """Layers with linear attention, gated delta nets, but for every `full_attention_interval`-th (Qwen3.5, Qwen3-Next).

    Such models turn a part of their other layers' heads by RoPE.
    """

    full_attention_interval: int
    linear_num_key_heads: int
    linear_num_value_heads: int
    """H of the linear layers."""
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_conv_kernel_dim: int
    """W: inputs that a convolution sees."""
    partial_rotary_factor: float
    interleaved: bool = False
    """Whether one projection makes queries, keys, values and gates, those of a key head side by side (Qwen3-Next)."""

    def __post_init__(self):
        positive(self, *(field.name for field in dataclasses.fields(self) if field.name != "interleaved"))
        if self.full_attention_interval < 2 or self.linear_conv_kernel_dim < 2 or self.partial_rotary_factor > 1:
            raise SpecaufError(f"{self}", "an interval and a kernel of at least 2, and a share of at most 1",
                               "correct the value")  # fmt: skip
        if self.linear_num_value_heads % self.linear_num_key_heads:
            raise SpecaufError(
                f"{self.linear_num_value_heads} linear value heads over {self.linear_num_key_heads} key heads",
                "a multiple",
                "change one of the two",
            )

    @property
    def channels(self) -> int:
        """C: of queries, keys and values of a linear layer, which a convolution mixes."""
        keys = self.linear_num_key_heads * self.linear_key_head_dim
        return 2 * keys + self.linear_num_value_heads * self.linear_value_head_dim

    @property
    def state(self) -> tuple[int, int, int]:
        """H, Dk, Dv."""
        return self.linear_num_value_heads, self.linear_key_head_dim, self.linear_value_head_dim
