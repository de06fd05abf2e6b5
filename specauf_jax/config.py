"""Every setting of the system: frozen, hashable dataclasses, each field with one default and a reader.

Architectures (`Target`, `Drafter`) and `Objective` are static data under `jit`. The other classes
are the arguments of one command each; `specauf COMMAND --help` prints the texts below them.
Letters (B S A K D H G E L F V) as in the README.
"""

import dataclasses
import difflib
import math
import typing
from dataclasses import dataclass
from typing import Literal

import tyro

from specauf_jax.errors import SpecaufError

ObjectiveName = Literal["full", "decay", "auf", "auf_decay", "griffin", "dpace"]
Dtype = Literal["float32", "bfloat16"]


def nearest(name: str, names) -> str:
    """A question about the closest of `names`, to append to a message; empty if none is close."""
    close = difflib.get_close_matches(name, list(names), 1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _positive(config, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise SpecaufError(f"{name} is {value}", "a number above 0", f"change {name}")


def _not_negative(config, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not value >= 0:
            raise SpecaufError(f"{name} is {value}", "0 or more", f"change {name}")


def _seed(config) -> None:
    if not 0 <= config.seed < 2**31:
        raise SpecaufError(f"seed is {config.seed}", "a whole number from 0 to 2147483647", "change seed")


def _choice(config, name: str, choices) -> None:
    value = getattr(config, name)
    if value not in choices:
        raise SpecaufError(
            f"{name} is {value!r}{nearest(str(value), choices)}", f"one of {', '.join(choices)}", f"change {name}"
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


@dataclass(frozen=True)
class Target:
    """Architecture of a Qwen3-style causal language model; field names are Hugging Face's."""

    vocab_size: int = 2048
    hidden_size: int = 128
    intermediate_size: int = 384
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 32
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    max_position_embeddings: int = 32_768
    tie_word_embeddings: bool = True

    def __post_init__(self):
        _positive(
            self,
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "rms_norm_eps",
            "rope_theta",
            "max_position_embeddings",
        )
        _check_heads(self)


@dataclass(frozen=True)
class Drafter:
    """Architecture of a DFlash drafter. Fields left at None follow the target (see `resolve_drafter`)."""

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
    max_position_embeddings: int | None = None

    def __post_init__(self):
        _positive(self, "num_hidden_layers")
        if self.block_size < 2:
            raise SpecaufError(
                f"drafter.block_size is {self.block_size}",
                "at least 2 (an anchor and one draft)",
                "set --drafter.block-size to 4, 8, 10 or 16",
            )
        if self.num_attention_heads is not None and self.num_key_value_heads is not None:
            _check_heads(self)


@dataclass(frozen=True)
class Objective:
    """Which slots of a block train, and how much."""

    name: ObjectiveName = "auf"
    gamma: float | None = None
    """Time constant of decay in slots; None takes 7, 5, 4 for K = 16, 10, 8 and K/2 otherwise."""
    griffin_top_n: int = 3
    """griffin: a slot counts as right when the label is among the drafter's n best tokens."""
    dpace_alpha: float = 0.5
    """dpace: smoothing of the confidence, s = (1 - alpha) q + alpha."""
    dpace_denominator: Literal["slots", "rows"] = "slots"
    """dpace: divide by the number of valid slots, or (as SpecForge does) by the batch rows."""

    def __post_init__(self):
        _choice(self, "name", typing.get_args(ObjectiveName))
        _choice(self, "dpace_denominator", ("slots", "rows"))
        _positive(self, "griffin_top_n")
        if self.gamma is not None:
            _positive(self, "gamma")
        if not 0 <= self.dpace_alpha <= 1:
            raise SpecaufError(f"objective.dpace_alpha is {self.dpace_alpha}", "a number from 0 to 1", "set it to 0.5")


@dataclass(frozen=True)
class Mesh:
    """Devices along the axes of the mesh; -1 (at most one axis) takes what is left."""

    replica: int = 1
    fsdp: int = -1
    tensor: int = 1


@dataclass(frozen=True)
class Optimisation:
    """Length, batch, optimiser and book-keeping of a training run."""

    steps: int = 1000
    batch_size: int = 8
    """Rows per optimiser step over the whole mesh, all accumulated parts together."""
    accumulation: int = 1
    """Parts that a batch is cut into, one after another; changes memory, not results."""
    learning_rate: float = 6e-4
    warmup_ratio: float = 0.04
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    seed: int = 0
    dtype: Dtype = "float32"
    """Compute precision; parameters and optimiser state stay float32."""
    log_every: int = 10
    checkpoint_every: int = 200
    keep_last: int = 2
    """Newest checkpoints to keep, beside the best one."""

    def __post_init__(self):
        _positive(self, "batch_size", "accumulation", "log_every", "checkpoint_every", "keep_last")
        _positive(self, "learning_rate", "clip_norm")
        _not_negative(self, "weight_decay")
        _seed(self)
        if self.steps < 0:
            raise SpecaufError(f"steps is {self.steps}", "0 (save the untrained weights) or more", "set it to 1000")
        if not 0 <= self.warmup_ratio < 1:
            raise SpecaufError(
                f"warmup_ratio is {self.warmup_ratio}", "a share of the steps in [0, 1)", "set it to 0.04"
            )
        if self.batch_size % self.accumulation:
            raise SpecaufError(
                f"batch_size {self.batch_size} does not divide into accumulation {self.accumulation} parts",
                "a multiple",
                "change one of the two",
            )


@dataclass(frozen=True)
class TrainOptimisation(Optimisation):
    """Settings of drafter training."""

    num_anchors: int = 512
    """A: blocks sampled per row."""
    anchor_chunk: int = 32
    """Blocks whose scores and logits exist at one time; memory against speed."""
    decode_every: int = 0
    """Steps between measurements of real decode tau on held-out prompts; 0 for never."""
    decode_files: tuple[str, ...] = ()
    """JSONL prompts to decode; none takes the dataset's own held-out prompts."""
    decode_prompts: int = 16
    """Prompts to decode, spread over the files."""
    decode_tokens: int = 64

    def __post_init__(self):
        super().__post_init__()
        _positive(self, "num_anchors", "anchor_chunk", "decode_prompts", "decode_tokens")
        _not_negative(self, "decode_every")


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; temperature 0 is greedy."""

    temperature: float = 0.0
    top_k: int = 0
    """Keep the k most likely tokens; 0 for all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens with at least this probability; 1 for all."""

    def __post_init__(self):
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise SpecaufError(
                f"temperature is {self.temperature}", "a number of at least 0", "use 0 for greedy decoding"
            )
        if self.top_k < 0:
            raise SpecaufError(f"top_k is {self.top_k}", "a count of at least 0", "use 0 to keep every token")
        if not 0 < self.top_p <= 1:
            raise SpecaufError(f"top_p is {self.top_p}", "a probability in (0, 1]", "use 1 to keep every token")


# ---------------------------------------------------------------------------------------------
# Commands


@dataclass(frozen=True)
class Prepare:
    """Turn conversations or text into a tokenised, packed TFDS dataset with loss masks.

    Give exactly one source: --input, --tfds or --corpus.
    """

    out: str
    """Folder to write: dataset/, tokenizer/, manifest.json and, for --corpus, prompts/NAME.jsonl."""
    input: tuple[str, ...] = ()
    """JSONL (ShareGPT `conversations` or OpenAI `messages`), text files, or folders of text."""
    tfds: str | None = None
    """Name of a TFDS dataset, such as 'my_dataset/config:1.0.0'."""
    tfds_split: str = "train"
    tfds_dir: str | None = None
    """TFDS data directory; None takes the library's default."""
    tfds_prompt_field: str | None = None
    """Field that holds the user's message; with --tfds-response-field."""
    tfds_response_field: str | None = None
    tfds_text_field: str | None = None
    """Field that holds plain text, instead of prompt and response."""
    corpus: Literal["stdlib"] | None = None
    """The running interpreter's own standard-library sources, with held-out domains."""
    corpus_bytes: int = 8_000_000
    """Most bytes of the embedded corpus to use."""
    tokenizer: str | None = None
    """Folder with a Hugging Face tokenizer.json; None trains a byte-level BPE on the source."""
    vocab_size: int = 2048
    """Vocabulary of the BPE that is trained."""
    sequence_length: int = 2048
    """S: tokens per packed row."""
    heldout_prompts: int = 48
    """Prompts per held-out domain of the embedded corpus."""
    prompt_length: int = 64
    """Tokens per held-out prompt."""
    max_bad_records: int = 0
    """Unusable records to tolerate; each is named with its file and line."""
    allow_uniform_mask: bool = False
    """Accept a conversation dataset whose loss mask is all 0 or all 1."""


@dataclass(frozen=True)
class Pretrain:
    """Train a small Qwen3-architecture target on a prepared dataset."""

    data: str
    """Folder written by `specauf prepare`."""
    out: str
    """Run folder: config.json, metrics.jsonl, TensorBoard events, checkpoints/ and target/ (Hugging Face layout)."""
    target: Target = Target()
    """vocab_size is taken from the dataset's tokenizer."""
    train: Optimisation = Optimisation(learning_rate=3e-3, weight_decay=0.1)
    mesh: Mesh = Mesh()


@dataclass(frozen=True)
class Regenerate:
    """Replace the responses of a dataset by the target's own, so that labels are on-policy."""

    data: str
    """Folder written by `specauf prepare`."""
    target: str
    """Target folder in Hugging Face layout."""
    out: str
    """Folder to write, with the same layout as --data."""
    documents: int = 0
    """Documents to regenerate, spread evenly over the dataset; 0 for all."""
    prompt_length: int = 64
    """Tokens kept at the start of a document without any unsupervised prefix."""
    max_new_tokens: int = 96
    batch_size: int = 64
    sampling: Sampling = Sampling()
    seed: int = 0
    dtype: Dtype = "float32"
    mesh: Mesh = Mesh()

    def __post_init__(self):
        _positive(self, "prompt_length", "max_new_tokens", "batch_size")
        _not_negative(self, "documents")
        _seed(self)


@dataclass(frozen=True)
class Train:
    """Train a DFlash drafter against a frozen target."""

    target: str
    """Target folder in Hugging Face layout."""
    data: str
    """Folder written by `specauf prepare` or `specauf regenerate`."""
    out: str
    """Run folder: config.json, metrics.jsonl, TensorBoard events, checkpoints/ and drafter/ (z-lab layout)."""
    drafter: Drafter = Drafter()
    objective: Objective = Objective()
    train: TrainOptimisation = TrainOptimisation()
    mesh: Mesh = Mesh()


@dataclass(frozen=True)
class Generate:
    """Write continuations of prompts, speculatively or token by token."""

    target: str
    prompts: str
    """JSONL: {"prompt": str} or {"turns": [...]} (chat template applied, turns answered one after another)."""
    drafter: str | None = None
    """Drafter folder in z-lab layout; not needed for --method autoregressive."""
    method: Literal["speculative", "autoregressive"] = "speculative"
    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    dtype: Dtype = "float32"
    batch_size: int = 16
    out: str | None = None
    """JSONL to write; without it the text streams to the terminal, the drafter's share in colour."""

    def __post_init__(self):
        _positive(self, "max_new_tokens", "batch_size")
        _seed(self)


@dataclass(frozen=True)
class Evaluate:
    """Measure tau, acceptance, exactness and speed of a drafter on prompt sets."""

    target: str
    drafter: str
    prompts: tuple[str, ...]
    """NAME=FILE.jsonl, one or more."""
    out: str
    """JSON to write: overall, sets, meta."""
    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    dtype: Dtype = "float32"
    batch_size: int = 16
    max_prompts: int = 0
    """Prompts used of each set, from its start; 0 for all."""
    repeats: int = 3
    """Timed passes over each set, after one warm-up pass."""

    def __post_init__(self):
        _positive(self, "max_new_tokens", "batch_size", "repeats")
        _not_negative(self, "max_prompts")
        _seed(self)


@dataclass(frozen=True)
class Export:
    """Write the drafter of a training run's checkpoint in z-lab layout."""

    run: str
    """Run folder of `specauf train`."""
    out: str
    """Drafter folder to write."""
    step: Literal["last", "best"] | int = "last"
    """Checkpoint to take."""


@dataclass(frozen=True)
class Report:
    """Compare runs on one self-contained HTML page."""

    runs: tyro.conf.Positional[tuple[str, ...]]
    """[NAME=]PATH[,PATH]: run folders (metrics.jsonl) and results of `specauf evaluate`."""
    out: str
    """HTML file to write."""


# ---------------------------------------------------------------------------------------------
# Derived settings


def default_target_layer_ids(num_target_layers: int, num_drafter_layers: int) -> tuple[int, ...]:
    """0-based ids of the tapped target layers (DFlash, arXiv 2602.06036): spread from 1 to N-3."""
    N, M = num_target_layers, num_drafter_layers
    if M == 1:
        return (N // 2,)
    return tuple(round(1 + i * (N - 4) / (M - 1)) for i in range(M))


def resolve_drafter(drafter: Drafter, target: Target, mask_token_id: int | None = None) -> Drafter:
    """Fill what the drafter leaves open from its target, and check that the two fit.

    Args:
      drafter: with any field at None.
      target: the target that it will serve.
      mask_token_id: the tokenizer's mask token, used when the drafter names none.

    Raises:
      SpecaufError: no mask token, or a field that cannot work with this target.
    """
    shared = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "rms_norm_eps",
        "rope_theta",
        "max_position_embeddings",
    )
    filled = {name: getattr(target, name) for name in shared if getattr(drafter, name) is None}
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


def decay_gamma(objective: Objective, block_size: int) -> float:
    """Time constant of the positional decay, in slots (DFlash's 7, 5, 4 for K = 16, 10, 8)."""
    if objective.gamma is not None:
        return objective.gamma
    return {16: 7.0, 10: 5.0, 8: 4.0}.get(block_size, block_size / 2)


# ---------------------------------------------------------------------------------------------
# (De)serialisation


def from_dict(cls, values: dict, where: str):
    """The inverse of `dataclasses.asdict`; unknown keys and wrong types are refused by name.

    Args:
      cls: a dataclass of this module.
      values: as read from JSON.
      where: the file's name, for messages.
    """
    if not isinstance(values, dict):
        raise SpecaufError(f"{where} is {values!r}", f"the fields of {cls.__name__}", "correct the value")
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in hints:
            raise SpecaufError(
                f"{where}: unknown field {key!r} of {cls.__name__}{nearest(key, hints)}",
                "a field of this version",
                "remove or rename the field",
            )
    return cls(**{key: _coerce(hints[key], value, f"{where}: {key}") for key, value in values.items()})


def _coerce(hint, value, where: str):
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, where)
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, type(int | None)) else (hint,)
    for option in options:
        if typing.get_origin(option) is tuple and isinstance(value, list | tuple):
            return tuple(value)
        if typing.get_origin(option) is Literal and value in typing.get_args(option):
            return value
        if option is float and type(value) is int:
            return float(value)
        if isinstance(option, type) and type(value) is option:
            return value
    raise SpecaufError(f"{where} is {value!r}", f"{hint}", "correct the value")
