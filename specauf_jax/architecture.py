"""Architectures of targets and drafters, and what a drafter's head must offer. Static data under `jit`.

Field names are Hugging Face's; letters (B S A K D H G E L F V) as in the README.
"""

from __future__ import annotations

import abc
import dataclasses
import typing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, NamedTuple

import tyro

from specauf_jax.checks import choice, positive, unused
from specauf_jax.errors import SpecaufError

if TYPE_CHECKING:  # help must come before JAX is loaded
    import jax
    from flax import nnx

    from specauf_jax.config import Objective
    from specauf_jax.objectives import ConfidenceScores, Scores

ModelType = Literal["qwen3", "qwen2", "llama", "qwen3_moe", "qwen3_5"]
RopeType = Literal["default", "linear", "llama3", "yarn"]
LayerType = Literal["full_attention", "sliding_attention"]


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

    def __post_init__(self):
        positive(self, "num_experts", "num_experts_per_tok", "moe_intermediate_size")
        if self.num_experts_per_tok > self.num_experts:
            raise SpecaufError(
                f"num_experts_per_tok {self.num_experts_per_tok} of num_experts {self.num_experts}",
                "at most all of them",
                "correct one of the two",
            )


@dataclass(frozen=True)
class Hybrid:
    """Layers with linear attention, gated delta nets, but for every `full_attention_interval`-th (Qwen3.5).

    Such models also gate attention, turn a part of its heads by RoPE, and hold norms' scales less 1.
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

    def __post_init__(self):
        positive(self, *(field.name for field in dataclasses.fields(self)))
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


@dataclass(frozen=True)
class Target:
    """Architecture of a causal language model: Qwen3, Qwen2.5, Llama 3, Qwen3-MoE or Qwen3.5."""

    convolution: ClassVar[None] = None
    """Of a drafter's layers alone."""

    model_type: ModelType = "qwen3"
    """The qwen3 kinds norm queries and keys per head, qwen2 adds biases to q, k and v, llama does neither."""
    vocab_size: int = 2048
    hidden_size: int = 128
    intermediate_size: int = 384
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 32
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling = RopeScaling()
    max_position_embeddings: int = 32_768
    tie_word_embeddings: bool = True
    experts: Annotated[Experts | None, tyro.conf.Suppress] = None
    """Of qwen3_moe; others have one MLP a layer, of intermediate_size."""
    hybrid: Annotated[Hybrid | None, tyro.conf.Suppress] = None
    """Of qwen3_5."""

    def __post_init__(self):
        choice(self, "model_type", typing.get_args(ModelType))
        for kind, name in (("qwen3_moe", "experts"), ("qwen3_5", "hybrid")):
            if (self.model_type == kind) != (getattr(self, name) is not None):
                raise SpecaufError(f"model_type {self.model_type} and {name} {getattr(self, name)}",
                                   f"{name} of a {kind}, and of no other",
                                   f"choose another model_type, or say {name} in a recipe")  # fmt: skip
        if self.num_hidden_layers % self.period:
            raise SpecaufError(f"{self.num_hidden_layers} layers with full attention in every {self.period}th",
                               "a multiple", "use another model")  # fmt: skip
        positive(self, "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        positive(self, "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "max_position_embeddings")
        _check_heads(self)
        if self.rotary_dim % 2:
            raise SpecaufError(f"RoPE turns {self.rotary_dim} numbers of a head", "an even number (it turns pairs)",
                               "correct partial_rotary_factor")  # fmt: skip

    @property
    def qk_norm(self) -> bool:
        """RMSNorm of every head's queries and keys."""
        return self.model_type in ("qwen3", "qwen3_moe", "qwen3_5")

    @property
    def period(self) -> int:
        """Layers after which their kinds come again."""
        return self.hybrid.full_attention_interval if self.hybrid else 1

    @property
    def rotary_dim(self) -> int:
        """Numbers of a head that RoPE turns, the first ones."""
        return int(self.head_dim * self.hybrid.partial_rotary_factor) if self.hybrid else self.head_dim

    @property
    def qkv_bias(self) -> bool:
        """Biases of q_proj, k_proj and v_proj."""
        return self.model_type == "qwen2"

    @property
    def context_length(self) -> int:
        """Positions that texts may take: max_position_embeddings, or what the scaling stretches pretraining's to."""
        scaling, most = self.rope_scaling, self.max_position_embeddings
        trained = scaling.original_max_position_embeddings or most
        if scaling.rope_type == "llama3" and trained < most:  # whose files tell the stretched length
            return most
        return max(most, int(trained * scaling.factor))


@dataclass(frozen=True)
class Drafter:
    """Settings of a drafter. Fields left at None follow the target (`specauf_jax.models.resolve.resolve_drafter`)."""

    block_size: int = 16
    """K: the anchor and K-1 drafts."""
    num_hidden_layers: int = 5
    mask_token_id: int | None = None
    """Token fed to the slots to be predicted; None takes the tokenizer's mask token."""
    target_layer_ids: tuple[int, ...] | None = None
    """Tapped 0-based target layers, ascending; None spreads one per drafter layer (method: DFlash)."""
    num_target_layers: int | None = None
    vocab_size: int | None = None
    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    rms_norm_eps: float | None = None
    rope_theta: float | None = None
    rope_scaling: Annotated[RopeScaling | None, tyro.conf.Suppress] = None
    max_position_embeddings: int | None = None
    layer_types: tuple[LayerType, ...] | None = None
    """Attention of each drafter layer; None makes all of them full_attention."""
    sliding_window: int | None = None
    """Of sliding_attention layers: a slot sees itself and the sliding_window - 1 positions before it."""
    projector_type: str = "dflash"
    """What makes drafts of the body's hidden states: dflash (the target's LM head alone), domino (a recurrent
    correction of its logits, slot by slot), dspark (a correction by the token before, and a confidence), or dflash2
    (convolutions over the block's slots, a choice among likely tokens). One file each in specauf_jax/models/heads."""
    head: tuple[str, ...] = ()
    """NAME=VALUE of that file's settings, where not the defaults. dflash: shift_label=false. domino: emb_dim=256
    gru_hidden_dim=1024 shift_label=true pure_draft_prefix_len=1. dspark: markov_rank=256 markov_head_type=vanilla (or
    gated, rnn) enable_confidence_head=true confidence_head_alpha=1.0 confidence_head_with_markov=true
    shift_label=true. dflash2: conv_kernel_size=2 conv_group_size=16 selector_rank=256 selector_top_k=16
    selector_loss_alpha=1.0 shift_label=false."""

    def __post_init__(self):
        check_drafter(self)
        if "sliding_attention" not in (self.layer_types or ()):
            unused(self, "sliding_window", when="without sliding_attention among layer_types")


class Speculator(NamedTuple):
    """A head in speculators' layout."""

    kind: str  # speculators_model_type
    architecture: str


@dataclass(frozen=True)
class Head(abc.ABC):
    """What makes logits and drafts of the body's hidden states: a frozen dataclass in one file of `models/heads`.

    Its fields are its settings, under the names that they have in a drafter's config.json. All arrays are those of a
    compute precision; `params` is the drafter's whole tree. B A N as in `specauf_jax.training.blocks`.
    """

    projector_type: ClassVar[str]
    """Its name in config.json and on the command line."""
    aliases: ClassVar[tuple[str, ...]] = ()
    """Other names of it in config.json."""
    title: ClassVar[str]
    """Its name for people."""
    architectures: ClassVar[tuple[str, ...]] = ("DFlashDraftModel",)
    """Names in config.json: the one that serving engines know, and the one that SpecForge trains where it differs."""
    speculator: ClassVar[Speculator | None] = None
    """What it is in speculators' layout; None where that has no place for it."""
    tensors: ClassVar[dict[str, str]] = {}
    """Names of its tensors in files, by our names, where the general rule (`models/tensors.py`) does not give them."""
    top_level: ClassVar[tuple[str, ...]] = ()
    """Settings that are written at the top level of config.json too, beside dflash_config."""
    absent: ClassVar[dict[str, bool | float]] = {}
    """What it means where config.json leaves out a setting; others must be there."""
    attention_mode: ClassVar[bool] = False
    """Whether its config.json says gqa or mha too, which its sizes tell."""
    early_prefix: ClassVar[str | None] = None
    """What stood before its tensors' names in early files."""
    branches: ClassVar[tuple[str, ...]] = ("final",)
    """Sets of logits that can train, each with an objective of its own; decoding follows `final`."""
    hard_branches: ClassVar[tuple[str, ...]] = ()
    """Those that compare with labels alone."""
    lambda_base_decay_ratio: ClassVar[float | None] = 1.0
    """Share of the steps over which a base branch trains, where the settings leave it open; 0 for not at all. None
    where it trains to the end, whatever they say."""
    rolls: ClassVar[bool] = True
    """Whether the logits of a draft depend on the drafts before it."""
    skips_slots: ClassVar[bool] = False
    """Whether training may leave out the slots behind a block's first failure."""
    num_anchors: ClassVar[int] = 512
    """A, where the settings leave it open."""
    engines: ClassVar[dict[str, tuple[Literal["no", "differently"], str]]] = {}
    """Engine → "no" or "differently" (it decodes as the variant `plain`), and why; others serve it."""

    @property
    @abc.abstractmethod
    def first_slot(self) -> int:
        """The slot that predicts the token after the anchor: 1, or 0 where slot k predicts the token k + 1 after it."""

    @property
    def convolution(self) -> tuple[int, int] | None:
        """T and channels that share a kernel, of the convolutions over a block's slots in its layers; None for none."""
        return None

    def check(self, drafter: ResolvedDrafter) -> None:
        """Raise SpecaufError where its settings do not fit the drafter's."""
        return None

    def base_ratio(self, given: float | None) -> float:
        """Share of the steps over which its base branch trains: as given, or its default; 0 without such a branch."""
        if "base" not in self.branches:
            return 0.0
        if self.lambda_base_decay_ratio is None:
            return 1.0
        return self.lambda_base_decay_ratio if given is None else given

    def shares(self, lambda_base) -> tuple:
        """What the loss of the final and of the base branch count, where both train."""
        return 1 - lambda_base, lambda_base

    @property
    def unread(self) -> tuple[str, ...]:
        """Settings that have no effect beside its others."""
        return ()

    @property
    def confidence_weight(self) -> float:
        """What the loss of its confidence counts; 0 for a head that says none."""
        return 0.0

    @abc.abstractmethod
    def modules(self, drafter: ResolvedDrafter, rngs: nnx.Rngs) -> dict[str, nnx.Module]:
        """Its parameters, as modules by their place in the drafter's tree."""

    @abc.abstractmethod
    def training_scores(
        self,
        params: dict,
        hidden: jax.Array,
        *,
        embedding: jax.Array,
        lm_head: jax.Array,
        previous: jax.Array,
        labels: jax.Array,
        valid: jax.Array,
        target_hidden: jax.Array | None,
        objectives: dict[str, Objective],
        chunk: int,
        skip: bool,
    ) -> dict[str, Scores | ConfidenceScores]:
        """What each branch says of the gold tokens, and of the target's distribution where its objective is soft.

        Args:
          params: of the drafter.
          hidden: `[B, A, N, D]`, the body's, of the slots that have a label.
          embedding: `[V, D]`, the target's.
          lm_head: `[D, V]`, the target's.
          previous: int32 `[B, A, N]`, the token before each label.
          labels: int32 `[B, A, N]`.
          valid: bool `[B, A, N]`.
          objectives: branch → what it trains on, of the branches that train.
          target_hidden: as for `specauf_jax.kernels.lm_head.frozen_head_scores`; None where nothing compares with the
            target's distribution.
          chunk, skip: likewise.

        Returns:
          Branch → LabelScores or SoftScores of `[B, A, N]`; `confidence` → ConfidenceScores where it has a weight.
        """

    @abc.abstractmethod
    def first_state(self, shape: tuple[int, ...], dtype) -> jax.Array:
        """What `next_logits` remembers before the first draft: `[*shape, R]`, R = 0 for a head without memory."""

    @abc.abstractmethod
    def next_logits(
        self, params: dict, state: jax.Array, token: jax.Array, n, hidden: jax.Array, logits: jax.Array, *, embedding
    ) -> tuple[jax.Array, jax.Array]:
        """What draft n is chosen from.

        Args:
          params: of the drafter.
          state: `[..., R]`, as from `first_state` or from the draft before.
          token: int32 `[...]`, the one before the draft; the anchor's for draft 0.
          n: int [].
          hidden: `[..., D]` of the slot that predicts the draft; leading axes may be 1.
          logits: float32 `[..., V]`, the target's LM head on `hidden`.
          embedding: `[V, D]`, the target's.

        Returns:
          The state for the draft after it, and float32 `[..., V]` logits.
        """

    def confidence(self, params: dict, hidden: jax.Array, previous: jax.Array) -> jax.Array | None:
        """How sure it is that the target will accept each draft, if those before it are accepted.

        Args:
          params: of the drafter.
          hidden: `[..., N, D]`, the body's, of the slots that predict the drafts.
          previous: int32 `[..., N]`, the token before each draft.

        Returns:
          float32 `[..., N]` logits of the probability; None for a head that says none.
        """
        return None

    def draft_flops(self, drafter: ResolvedDrafter) -> dict[str, float]:
        """Floating-point operations of its own for one draft, by part."""
        return {}

    def variants(self) -> list[tuple[Literal["labels", "plain"], str, Head]]:
        """(kind, name, head) of the usual mistakes, for the doctor to decode: the other convention, the body alone."""
        return []


@dataclass(frozen=True)
class ResolvedDrafter:
    """Architecture of a drafter, complete. Fields as in `Drafter`."""

    block_size: int
    num_hidden_layers: int
    mask_token_id: int
    target_layer_ids: tuple[int, ...]
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling
    max_position_embeddings: int
    layer_types: tuple[LayerType, ...]
    head: Head
    sliding_window: int | None = None
    num_target_layers: int | None = None
    """None where a file does not tell it."""

    qk_norm: ClassVar[bool] = True
    qkv_bias: ClassVar[bool] = False
    experts: ClassVar[None] = None
    hybrid: ClassVar[None] = None
    period: ClassVar[int] = 1

    def __post_init__(self):
        check_drafter(self)

    @property
    def rotary_dim(self) -> int:
        return self.head_dim

    @property
    def convolution(self) -> tuple[int, int] | None:
        """As of the head."""
        return self.head.convolution

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Of each layer the tokens a slot sees, itself included; None for all."""
        return tuple(self.sliding_window if kind == "sliding_attention" else None for kind in self.layer_types)

    @property
    def first_slot(self) -> int:
        """The slot that predicts the token after the anchor: 0 with shifted labels, else 1."""
        return self.head.first_slot

    @property
    def num_labels(self) -> int:
        """N: slots of a block that are trained, K-1 or (shifted) K; label n is the token n + 1 after the anchor."""
        return self.block_size - self.first_slot


def check_drafter(drafter: Drafter | ResolvedDrafter) -> None:
    """What can be wrong with a drafter's fields by themselves.

    Raises:
      SpecaufError: naming the field.
    """
    positive(drafter, "num_hidden_layers", "num_target_layers", "sliding_window")
    positive(drafter, "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    positive(drafter, "head_dim", "rms_norm_eps", "rope_theta", "max_position_embeddings")
    if drafter.block_size < 2:
        raise SpecaufError(
            f"drafter.block_size is {drafter.block_size}",
            "at least 2 (an anchor and one draft)",
            "set --drafter.block-size to 4, 8, 10 or 16",
        )
    if None not in (drafter.num_attention_heads, drafter.num_key_value_heads, drafter.head_dim):
        _check_heads(drafter)
    types = drafter.layer_types or ()
    for kind in types:
        if kind not in typing.get_args(LayerType):
            raise SpecaufError(
                f"drafter.layer_types has {kind!r}", f"{' or '.join(typing.get_args(LayerType))}", "correct it"
            )
    if types and len(types) != drafter.num_hidden_layers:
        raise SpecaufError(
            f"{len(types)} drafter.layer_types for {drafter.num_hidden_layers} layers", "one for each", "correct it"
        )
    if "sliding_attention" not in types:
        return
    if drafter.sliding_window is None:
        raise SpecaufError(
            "drafter.layer_types has sliding_attention, but there is no sliding_window",
            "the window in tokens",
            "set --drafter.sliding-window",
        )
    if drafter.sliding_window < drafter.block_size:
        raise SpecaufError(  # no two systems agree on which slots of its own block such a window hides
            f"drafter.sliding_window is {drafter.sliding_window}, shorter than a block",
            f"at least block_size, {drafter.block_size}",
            "lengthen the window",
        )


def _check_heads(config) -> None:
    if config.num_attention_heads % config.num_key_value_heads:
        raise SpecaufError(
            f"{config.num_attention_heads} query heads over {config.num_key_value_heads} key/value heads",
            "a multiple",
            "change num_attention_heads or num_key_value_heads",
        )
    if config.head_dim % 2:
        raise SpecaufError(f"head_dim is {config.head_dim}", "an even number (RoPE turns pairs)", "change head_dim")


_QWEN3 = Target(vocab_size=151_936, hidden_size=4096, intermediate_size=12_288, num_hidden_layers=36,
                num_attention_heads=32, num_key_value_heads=8, head_dim=128, rope_theta=1e6,
                max_position_embeddings=40_960, tie_word_embeddings=False)  # fmt: skip
KNOWN_TARGETS = {
    "Qwen3-4B": dataclasses.replace(_QWEN3, hidden_size=2560, intermediate_size=9728, tie_word_embeddings=True),
    "Qwen3-8B": _QWEN3,
    "Qwen3-32B": dataclasses.replace(
        _QWEN3, hidden_size=5120, intermediate_size=25_600, num_hidden_layers=64, num_attention_heads=64
    ),
    "Qwen3-30B-A3B": dataclasses.replace(
        _QWEN3,
        model_type="qwen3_moe",
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=48,
        num_key_value_heads=4,
        experts=Experts(128, 8, 768, True),
    ),
    "Qwen3.5-9B": dataclasses.replace(
        _QWEN3,
        model_type="qwen3_5",
        vocab_size=248_320,
        num_hidden_layers=32,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=256,
        rope_theta=1e7,
        max_position_embeddings=262_144,
        hybrid=Hybrid(4, 16, 32, 128, 128, 4, 0.25),
    ),
}
"""Architectures of published targets, for what needs no weights (their config.json on Hugging Face)."""
