"""Architectures of targets and drafters, and what a drafter's head must offer. Static data under `jit`.

Field names are Hugging Face's; letters (B S A K D H G E L F V) as in the README.
"""

from __future__ import annotations

import abc
import typing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, NamedTuple

import tyro

from specauf_jax.checks import choice, positive, unused
from specauf_jax.errors import SpecaufError
from specauf_jax.parts import BLOCKS, Block, Experts, Hybrid, RopeScaling

if TYPE_CHECKING:  # help must come before JAX is loaded
    import jax
    from flax import nnx

    from specauf_jax.config import Objective
    from specauf_jax.objectives import ConfidenceScores, Scores

ModelType = Literal["qwen3", "qwen2", "llama", "qwen3_moe", "qwen3_5", "qwen3_5_moe", "qwen3_next", "gemma3", "gpt_oss"]
LayerType = Literal["full_attention", "sliding_attention"]
_OF_KINDS = {
    "experts": ("qwen3_moe", "qwen3_5_moe", "qwen3_next", "gpt_oss"),
    "hybrid": ("qwen3_5", "qwen3_5_moe", "qwen3_next"),
    "layer_types": ("gemma3", "gpt_oss"),
    "rope_local_base_freq": ("gemma3",),
    "query_pre_attn_scalar": ("gemma3",),
    "experts.swiglu_limit": ("gpt_oss",),
    "experts.shared_expert_intermediate_size": ("qwen3_5_moe", "qwen3_next"),
    "hybrid.interleaved": ("qwen3_next",),
}
"""What targets of these kinds have, and no others."""


@dataclass(frozen=True)
class Target:
    """Architecture of a causal language model; `specauf_jax.models.families` has a file of each kind."""

    convolution: ClassVar[None] = None
    """Of a drafter's layers alone."""

    model_type: ModelType = "qwen3"
    """What its layers are made of: `specauf_jax.parts.BLOCKS`."""
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
    """Where layers have a mixture of them; others have one MLP a layer, of intermediate_size."""
    hybrid: Annotated[Hybrid | None, tyro.conf.Suppress] = None
    """Where most layers have linear attention."""
    layer_types: Annotated[tuple[LayerType, ...] | None, tyro.conf.Suppress] = None
    """Attention of each layer (gemma3, gpt_oss); None makes all of them full_attention."""
    sliding_window: Annotated[int | None, tyro.conf.Suppress] = None
    """Of sliding_attention layers: a token sees itself and the sliding_window - 1 positions before it."""
    rope_local_base_freq: Annotated[float | None, tyro.conf.Suppress] = None
    """RoPE's base of sliding_attention layers, which is not scaled; None for that of all (gemma3)."""
    query_pre_attn_scalar: Annotated[int | None, tyro.conf.Suppress] = None
    """Scores are divided by its root; None takes head_dim (gemma3)."""

    def __post_init__(self):
        choice(self, "model_type", typing.get_args(ModelType))
        for name, kinds in _OF_KINDS.items():
            part, _, field = name.rpartition(".")
            place = getattr(self, part) if part else self
            found = getattr(place, field, None)
            if (self.model_type in kinds) != (found is not None and found is not False):
                raise SpecaufError(f"model_type {self.model_type} and {name} {found}",
                                   f"{name} of {' or '.join(kinds)}, and of no other",
                                   f"choose another model_type, or say {name} in a recipe")  # fmt: skip
        if self.model_type in ("qwen3_5_moe", "gpt_oss") and self.experts and not self.experts.norm_topk_prob:
            raise SpecaufError(f"model_type {self.model_type} and norm_topk_prob False", "True", "correct it")
        if self.sliding_window is not None and self.layer_types is None:
            raise SpecaufError("sliding_window without layer_types", "the layers that it is of", "leave it out")
        if self.num_hidden_layers % self.period:
            raise SpecaufError(f"{self.num_hidden_layers} layers with full attention in every {self.period}th",
                               "a multiple", "use another model")  # fmt: skip
        positive(self, "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        positive(self, "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "max_position_embeddings")
        positive(self, "sliding_window", "rope_local_base_freq", "query_pre_attn_scalar")
        _check_heads(self)
        _check_layer_types(self, "")
        if self.rotary_dim % 2:
            raise SpecaufError(f"RoPE turns {self.rotary_dim} numbers of a head", "an even number (it turns pairs)",
                               "correct partial_rotary_factor")  # fmt: skip

    @property
    def block(self) -> Block:
        """What its layers are made of."""
        return BLOCKS[self.model_type]

    @property
    def period(self) -> int:
        """Layers after which their kinds of parameters come again."""
        return self.hybrid.full_attention_interval if self.hybrid else 1

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Of each layer the tokens that a token sees, itself included; None for all."""
        if self.layer_types is None:
            return (None,) * self.num_hidden_layers
        return _windows(self.layer_types, self.sliding_window)

    @property
    def rotary_dim(self) -> int:
        """Numbers of a head that RoPE turns, the first ones."""
        return int(self.head_dim * self.hybrid.partial_rotary_factor) if self.hybrid else self.head_dim

    @property
    def context_length(self) -> int:
        """Positions that texts may take: max_position_embeddings, or what the scaling stretches pretraining's to."""
        scaling, most = self.rope_scaling, self.max_position_embeddings
        trained = scaling.original_max_position_embeddings or most
        told = self.model_type == "gemma3" or (scaling.rope_type == "llama3" and trained < most)
        if told:  # by files: the stretched length
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

    block: ClassVar[Block] = BLOCKS["qwen3"]
    experts: ClassVar[None] = None
    hybrid: ClassVar[None] = None
    period: ClassVar[int] = 1
    query_pre_attn_scalar: ClassVar[None] = None

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
        return _windows(self.layer_types, self.sliding_window)

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
    _check_layer_types(drafter, "drafter.")
    if "sliding_attention" not in (drafter.layer_types or ()):
        return
    assert drafter.sliding_window is not None
    if drafter.sliding_window < drafter.block_size:
        raise SpecaufError(  # no two systems agree on which slots of its own block such a window hides
            f"drafter.sliding_window is {drafter.sliding_window}, shorter than a block",
            f"at least block_size, {drafter.block_size}",
            "lengthen the window",
        )


def _windows(types: tuple[LayerType, ...], window: int | None) -> tuple[int | None, ...]:
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def _check_layer_types(config, where: str) -> None:
    types = config.layer_types or ()
    for kind in types:
        if kind not in typing.get_args(LayerType):
            raise SpecaufError(
                f"{where}layer_types has {kind!r}", f"{' or '.join(typing.get_args(LayerType))}", "correct it"
            )
    if config.layer_types is not None and len(types) != config.num_hidden_layers:
        raise SpecaufError(
            f"{len(types)} {where}layer_types for {config.num_hidden_layers} layers", "one for each", "correct it"
        )
    if "sliding_attention" in types and config.sliding_window is None:
        raise SpecaufError(
            f"{where}layer_types has sliding_attention, but there is no sliding_window",
            "the window in tokens",
            "set --drafter.sliding-window" if where else "add sliding_window",
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
