"""Architectures of targets and drafters, and how a drafter follows its target. Static data under `jit`.

Field names are Hugging Face's; letters (B S A K D H G E L F V) as in the README.
"""

import dataclasses
import typing
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from specauf_jax.checks import choice, not_negative, positive
from specauf_jax.errors import SpecaufError

ModelType = Literal["qwen3", "qwen2", "llama"]
RopeType = Literal["default", "linear", "llama3", "yarn"]
LayerType = Literal["full_attention", "sliding_attention"]
ProjectorType = Literal["dflash", "domino"]


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
class Target:
    """Architecture of a dense causal language model: Qwen3, Qwen2.5 or Llama 3."""

    model_type: ModelType = "qwen3"
    """qwen3 norms queries and keys per head, qwen2 adds biases to q, k and v, llama does neither."""
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

    def __post_init__(self):
        choice(self, "model_type", typing.get_args(ModelType))
        positive(self, "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        positive(self, "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "max_position_embeddings")
        _check_heads(self)

    @property
    def qk_norm(self) -> bool:
        """RMSNorm of every head's queries and keys."""
        return self.model_type == "qwen3"

    @property
    def qkv_bias(self) -> bool:
        """Biases of q_proj, k_proj and v_proj."""
        return self.model_type == "qwen2"


@dataclass(frozen=True)
class Drafter:
    """Architecture of a DFlash or Domino drafter. Fields left at None follow the target (see `resolve_drafter`)."""

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
    projector_type: ProjectorType = "dflash"
    """domino adds a recurrent correction of the logits, slot by slot."""
    shift_label: bool | None = None
    """domino: slot k predicts the token after its own position (the public drafters' way; None takes it)."""
    pure_draft_prefix_len: int = 1
    """domino: drafts before the first corrected one."""
    emb_dim: int = 256
    """domino: rank of the correction."""
    gru_hidden_dim: int = 1024
    """domino, R: width of the recurrent state."""

    qk_norm: typing.ClassVar[bool] = True
    qkv_bias: typing.ClassVar[bool] = False

    def __post_init__(self):
        positive(self, "num_hidden_layers", "num_target_layers", "sliding_window", "emb_dim", "gru_hidden_dim")
        positive(self, "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
        positive(self, "head_dim", "rms_norm_eps", "rope_theta", "max_position_embeddings")
        not_negative(self, "pure_draft_prefix_len")
        choice(self, "projector_type", typing.get_args(ProjectorType))
        if self.block_size < 2:
            raise SpecaufError(
                f"drafter.block_size is {self.block_size}",
                "at least 2 (an anchor and one draft)",
                "set --drafter.block-size to 4, 8, 10 or 16",
            )
        if self.num_attention_heads is not None and self.num_key_value_heads is not None and self.head_dim is not None:
            _check_heads(self)
        self._check_windows()
        if self.shift_label and self.projector_type == "dflash":
            raise SpecaufError(
                "drafter.shift_label with projector_type dflash",
                "shifted labels under domino only: no engine serves a plain DFlash drafter that has them",
                "set --drafter.projector-type domino, or leave shift_label out",
            )

    def _check_windows(self):
        types = self.layer_types or ()
        for kind in types:
            if kind not in typing.get_args(LayerType):
                raise SpecaufError(
                    f"drafter.layer_types has {kind!r}", f"{' or '.join(typing.get_args(LayerType))}", "correct it"
                )
        if types and len(types) != self.num_hidden_layers:
            raise SpecaufError(
                f"{len(types)} drafter.layer_types for {self.num_hidden_layers} layers", "one for each", "correct it"
            )
        if "sliding_attention" in types and self.sliding_window is None:
            raise SpecaufError(
                "drafter.layer_types has sliding_attention, but there is no sliding_window",
                "the window in tokens",
                "set --drafter.sliding-window",
            )
        if "sliding_attention" in types and self.sliding_window < self.block_size:
            raise SpecaufError(  # no two systems agree on which slots of its own block such a window hides
                f"drafter.sliding_window is {self.sliding_window}, shorter than a block",
                f"at least block_size, {self.block_size}",
                "lengthen the window",
            )

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Of each layer the tokens a slot sees, itself included; None for all."""
        types = self.layer_types or ("full_attention",) * self.num_hidden_layers
        return tuple(self.sliding_window if kind == "sliding_attention" else None for kind in types)

    @property
    def first_slot(self) -> int:
        """The slot that predicts the token after the anchor: 0 with shifted labels, else 1."""
        return 0 if self.shift_label else 1

    @property
    def num_labels(self) -> int:
        """N: slots of a block that are trained, K-1 or (shifted) K; label n is the token n + 1 after the anchor."""
        return self.block_size - self.first_slot


def _check_heads(config) -> None:
    if config.num_attention_heads % config.num_key_value_heads:
        raise SpecaufError(
            f"{config.num_attention_heads} query heads over {config.num_key_value_heads} key/value heads",
            "a multiple",
            "change num_attention_heads or num_key_value_heads",
        )
    if config.head_dim % 2:
        raise SpecaufError(f"head_dim is {config.head_dim}", "an even number (RoPE turns pairs)", "change head_dim")


def default_target_layer_ids(num_target_layers: int, num_drafter_layers: int) -> tuple[int, ...]:
    """0-based ids of the tapped target layers (DFlash, arXiv 2602.06036): spread from 1 to N-3."""
    N, M = num_target_layers, num_drafter_layers
    if M == 1:
        return (N // 2,)
    return tuple(round(1 + i * (N - 4) / (M - 1)) for i in range(M))


_SHARED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "max_position_embeddings",
)


def resolve_drafter(drafter: Drafter, target: Target, mask_token_id: int | None = None) -> Drafter:
    """Fill what the drafter leaves open from its target, and check that the two fit.

    Args:
      drafter: with any field at None.
      target: the target that it will serve.
      mask_token_id: the tokenizer's mask token, used when the drafter names none.

    Raises:
      SpecaufError: no mask token, or a field that cannot work with this target.
    """
    filled = {name: getattr(target, name) for name in _SHARED if getattr(drafter, name) is None}
    if drafter.mask_token_id is None:
        if mask_token_id is None:
            raise SpecaufError(
                "no mask token: drafter.mask_token_id is unset and the tokenizer has none",
                "the id of a token that never occurs in text",
                "pass --drafter.mask-token-id ID",
            )
        filled["mask_token_id"] = mask_token_id
    if drafter.target_layer_ids is None:
        filled["target_layer_ids"] = default_target_layer_ids(target.num_hidden_layers, drafter.num_hidden_layers)
    if drafter.layer_types is None:
        filled["layer_types"] = ("full_attention",) * drafter.num_hidden_layers
    if drafter.shift_label is None:
        filled["shift_label"] = drafter.projector_type == "domino"
    filled["num_target_layers"] = target.num_hidden_layers
    if drafter.num_target_layers not in (None, target.num_hidden_layers):
        raise SpecaufError(
            f"the drafter was made for a target of {drafter.num_target_layers} layers, this one has "
            f"{target.num_hidden_layers}",
            "the target that the drafter was trained with",
            "pass that target's folder",
        )
    drafter = dataclasses.replace(drafter, **filled)
    _check_fit(drafter, target)
    return drafter


def _check_fit(drafter: Drafter, target: Target) -> None:
    for name in ("hidden_size", "vocab_size"):
        found, expected = getattr(drafter, name), getattr(target, name)
        if found != expected:
            raise SpecaufError(
                f"drafter.{name} is {found}",
                f"the target's {expected} (embedding and LM head are shared)",
                "use the target that the drafter was made for",
            )
    ids = drafter.target_layer_ids
    if not ids or list(ids) != sorted(set(ids)) or ids[0] < 0 or ids[-1] >= target.num_hidden_layers:
        raise SpecaufError(
            f"drafter.target_layer_ids is {list(ids)}",
            f"ascending, distinct 0-based ids below the target's {target.num_hidden_layers} layers",
            "set --drafter.target-layer-ids (the default needs a target with 3 layers more than the drafter)",
        )
    if not 0 <= drafter.mask_token_id < target.vocab_size:
        raise SpecaufError(
            f"drafter.mask_token_id is {drafter.mask_token_id}",
            f"an id below the vocabulary's {target.vocab_size}",
            "set --drafter.mask-token-id",
        )


_QWEN3 = Target(vocab_size=151_936, hidden_size=4096, intermediate_size=12_288, num_hidden_layers=36,
                num_attention_heads=32, num_key_value_heads=8, head_dim=128, rope_theta=1e6,
                max_position_embeddings=40_960, tie_word_embeddings=False)  # fmt: skip
KNOWN_TARGETS = {
    "Qwen3-4B": dataclasses.replace(_QWEN3, hidden_size=2560, intermediate_size=9728, tie_word_embeddings=True),
    "Qwen3-8B": _QWEN3,
    "Qwen3-32B": dataclasses.replace(
        _QWEN3, hidden_size=5120, intermediate_size=25_600, num_hidden_layers=64, num_attention_heads=64
    ),
}
"""Architectures of published targets, for what needs no weights (their config.json on Hugging Face)."""
