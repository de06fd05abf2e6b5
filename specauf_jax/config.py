"""The method's settings: frozen, hashable dataclasses, each field with one default and a reader.

Commands put them together (`specauf_jax.commands.train_settings` and its like); `specauf COMMAND --help` prints the
texts below the fields. `Objective` and the architectures (`specauf_jax.architecture`) are static data under `jit`.
"""

import math
import typing
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from specauf_jax.checks import choice, not_negative, positive, seed, unused
from specauf_jax.errors import SpecaufError

ObjectiveName = Literal["full", "decay", "auf", "auf_decay", "griffin", "dpace"]
Dtype = Literal["float32", "bfloat16"]
Remat = Literal["none", "dots", "layers"]
HeadSlots = Literal["support", "all"]


@dataclass(frozen=True)
class Objective:
    """Which slots of a block train, and how much."""

    name: ObjectiveName = "auf"
    gamma: float | None = None
    """decay, auf_decay: time constant in slots; None takes 7, 5, 4 for K = 16, 10, 8 and K/2 otherwise."""
    griffin_top_n: int = 3
    """griffin: a slot counts as right when the label is among the drafter's n best tokens."""
    dpace_alpha: float = 0.5
    """dpace: smoothing of the confidence, s = (1 - alpha) q + alpha."""
    dpace_denominator: Literal["slots", "rows"] = "slots"
    """dpace: divide by the number of valid slots, or (as SpecForge does) by the batch rows."""
    witness: Literal["own", "base"] = "own"
    """Whose hits and misses count, for the final branch of domino: its own, or the base branch's (auf, auf_decay,
    griffin, dpace)."""

    @property
    def stop(self) -> int | None:
        """A block stops at the first label that is not among the drafter's so many best tokens; None: it never does."""
        return {"auf": 1, "auf_decay": 1, "griffin": self.griffin_top_n}.get(self.name)

    def __post_init__(self):
        choice(self, "name", typing.get_args(ObjectiveName))
        choice(self, "dpace_denominator", ("slots", "rows"))
        choice(self, "witness", ("own", "base"))
        positive(self, "griffin_top_n")
        if self.gamma is not None:
            positive(self, "gamma")
        if not 0 <= self.dpace_alpha <= 1:
            raise SpecaufError(f"objective.dpace_alpha is {self.dpace_alpha}", "a number from 0 to 1", "set it to 0.5")
        readers = {
            "gamma": ("decay", "auf_decay"),
            "griffin_top_n": ("griffin",),
            "dpace_alpha": ("dpace",),
            "dpace_denominator": ("dpace",),
            "witness": ("auf", "auf_decay", "griffin", "dpace"),
        }
        unread = (field for field, names in readers.items() if self.name not in names)
        unused(self, *unread, when=f"under objective {self.name}")


@dataclass(frozen=True)
class Mesh:
    """Devices along the axes of the mesh; -1 (at most one axis) takes what is left."""

    replica: int = 1
    fsdp: int = -1
    tensor: int = 1

    def over(self, other: "Mesh") -> "Mesh":
        """`other`, with this mesh's axes in the place of its own where they are not 0."""
        return Mesh(self.replica or other.replica, self.fsdp or other.fsdp, self.tensor or other.tensor)


@dataclass(frozen=True)
class Hosts:
    """Processes of a run. Cloud TPU, GKE and SLURM tell by themselves; elsewhere the first three say it."""

    coordinator: str | None = None
    """HOST:PORT of process 0."""
    count: int | None = None
    """Processes of the run."""
    index: int | None = None
    """This process, from 0."""
    join_s: int = 300
    """Seconds to wait for the others at the start."""
    heartbeat_s: int = 60
    """A process not heard of for so many seconds is dead, which ends the others."""
    stall_s: int = 900
    """A process that finishes no step for so many seconds ends itself, saying where it hangs."""
    stopped_code: int = 0
    """Exit code after SIGTERM, for launchers that start again what does not end with 0."""

    def __post_init__(self):
        positive(self, "join_s", "heartbeat_s", "stall_s")
        told = [value is not None for value in (self.coordinator, self.count, self.index)]
        if any(told) and not (all(told) and 0 <= self.index < self.count):
            raise SpecaufError(
                f"hosts.coordinator {self.coordinator}, count {self.count}, index {self.index}",
                "all three or none, and an index from 0 to count - 1",
                "correct --hosts",
            )


@dataclass(frozen=True)
class Optimisation:
    """Length, batch, optimiser and book-keeping of a training run."""

    steps: int = 1000
    """0 saves the untrained weights."""
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
    profile_steps: int = 0
    """Steps to trace for XProf, once the run is warm; 0 for none. Lands in out/profile."""
    mu_dtype: Dtype = "float32"
    """Of the optimiser's first moment; bfloat16 saves 2 bytes a parameter."""

    def __post_init__(self):
        positive(self, "batch_size", "accumulation", "log_every", "checkpoint_every", "keep_last")
        positive(self, "learning_rate", "clip_norm")
        not_negative(self, "steps", "weight_decay", "profile_steps")
        seed(self)
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

    num_anchors: int | None = None
    """A: blocks sampled per row; None takes 512, for domino 256, or all places of shorter rows."""
    slot_chunk: int = 256
    """Slots whose logits exist at one time, of every device."""
    head_slots: HeadSlots = "support"
    """Which slots meet the LM head under auf, auf_decay and griffin: those up to each block's first failure, or all,
    which costs a few times as much and tells common_token_accuracy. Domino and the other objectives need all."""
    remat: Remat = "none"
    """What the backward pass computes again instead of keeping it: nothing, all but products with weights (dots), or
    all of each drafter layer (layers). Changes memory and speed, not results."""
    decode_every: int = 0
    """Steps between measurements of real decode tau on held-out prompts; 0 for never. The best checkpoint is the best
    of those at which it was measured."""
    decode_files: tuple[str, ...] = ()
    """JSONL prompts to decode; none takes the dataset's own held-out prompts."""
    decode_prompts: int = 16
    """Prompts to decode, spread over the files."""
    decode_tokens: int = 64
    lambda_base_decay_ratio: float = 1.0
    """domino: share of the steps over which the base branch's weight in the loss falls from 1 to 0."""

    def __post_init__(self):
        super().__post_init__()
        positive(self, "num_anchors", "slot_chunk", "decode_prompts", "decode_tokens")
        not_negative(self, "decode_every", "lambda_base_decay_ratio")
        if not self.decode_every:
            unused(self, "decode_files", "decode_prompts", "decode_tokens", when="without decode_every")
        elif self.decode_every % self.checkpoint_every and self.checkpoint_every % self.decode_every:
            raise SpecaufError(
                f"decode_every {self.decode_every} with checkpoint_every {self.checkpoint_every}",
                "one a multiple of the other, so that tau is measured where checkpoints are saved and compared",
                "change one of the two",
            )


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen."""

    temperature: float = 0.0
    """0 always takes the most likely token."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 for all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens with at least this probability; 1 for all."""

    def __post_init__(self):
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise SpecaufError(
                f"temperature is {self.temperature}", "a number of at least 0", "use 0 for greedy decoding"
            )
        not_negative(self, "top_k")
        if not 0 < self.top_p <= 1:
            raise SpecaufError(f"top_p is {self.top_p}", "a probability in (0, 1]", "use 1 to keep every token")
        if self.temperature == 0:
            unused(self, "top_k", "top_p", when="at temperature 0")


VerifySlots = int | Literal["auto"] | None
"""Tokens verified per round: a number, the fastest as measured, or (None) all of the drafter's block."""

SamplingFlags = Annotated[Sampling, tyro.conf.arg(name="")]
"""A command's field of this type has flags without a prefix: --temperature, --top-k, --top-p."""


def decay_gamma(objective: Objective, block_size: int) -> float:
    """Time constant of the positional decay, in slots (DFlash's 7, 5, 4 for K = 16, 10, 8)."""
    if objective.gamma is not None:
        return objective.gamma
    return {16: 7.0, 10: 5.0, 8: 4.0}.get(block_size, block_size / 2)
