"""The method's settings: frozen, hashable dataclasses, each field with one default and a reader.

Commands put them together (`specauf_jax.commands.train_settings` and its like); `specauf COMMAND --help` prints the
texts below the fields. `Objective` and the architectures (`specauf_jax.architecture`) are static data under `jit`.
"""

import dataclasses
import math
import typing
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from specauf_jax.checks import choice, not_negative, positive, seed, unused
from specauf_jax.errors import SpecaufError

ObjectiveName = Literal["full", "decay", "auf", "auf_decay", "griffin", "dpace", "survival", "first_error"]
LossName = Literal["ce", "kl", "tv", "lk", "nla"]
OptimizerName = Literal["adamw", "muon"]
Dtype = Literal["float32", "bfloat16"]
Remat = Literal["none", "dots", "layers"]
HeadSlots = Literal["support", "all"]


@dataclass(frozen=True)
class Objective:
    """Which slots of a block train, how much, and on what."""

    name: ObjectiveName = "auf"
    loss: str = "ce"
    """Loss of a slot, or a mix such as ce=0.1,tv=0.9: cross-entropy of the label (ce), or what compares with the
    target's own distribution: KL divergence (kl), the probability that sampling rejects (tv), its mix with KL (lk), the
    negative log of acceptance (nla)."""
    temperature: float = 1.0
    """kl, tv, lk, nla, survival: of the target's distribution alone; below 1 sharpens it. At 1 tv is what sampling at
    temperature 1 rejects."""
    gamma: float | None = None
    """decay, auf_decay, first_error: time constant in slots; None takes 7, 5, 4 for K = 16, 10, 8 and K/2 otherwise."""
    failures: int = 1
    """auf, auf_decay, griffin: a block stops at its n-th failure."""
    floor: float = 0.0
    """auf, auf_decay, griffin: weight of slots behind the stop. Above 0 every slot meets the LM head, and counts in the
    support's measures."""
    tree_nodes: int | None = None
    """auf, auf_decay: a block stops where its labels leave the draft tree of so many nodes, as far as their ranks tell
    (`specauf_jax.objectives.tree_mask`), not at its first failure. Every slot meets the LM head."""
    griffin_top_n: int = 3
    """griffin: a slot counts as right when the label is among the drafter's n best tokens."""
    dpace_alpha: float = 0.5
    """dpace: smoothing of the confidence, s = (1 - alpha) q + alpha."""
    dpace_denominator: Literal["slots", "rows"] = "slots"
    """dpace: divide by the number of valid slots, or (as SpecForge does) by the batch rows."""
    focal: float = 1.0
    """first_error: extra weight of a block's first failure."""
    chain: float = 0.1
    """first_error: weight of the expected accepted length."""
    witness: Literal["own", "base"] = "own"
    """Whose hits and misses count, for the final branch of a head with a base branch: its own, or the base branch's
    (all but full and decay)."""

    @property
    def stop(self) -> int | None:
        """A label that is not among the drafter's so many best tokens is a failure, and stops the block (`failures`);
        None: nothing does."""
        return {"auf": 1, "auf_decay": 1, "griffin": self.griffin_top_n}.get(self.name)

    @property
    def skips(self) -> bool:
        """Slots behind the stop have no weight, so that nothing need be computed for them."""
        return self.stop is not None and self.floor == 0 and self.tree_nodes is None

    @property
    def losses(self) -> dict[LossName, float]:
        """Loss → its weight in the mix.

        Raises:
          SpecaufError: `loss` is not of this form.
        """
        found: dict = {}
        for part in self.loss.split(","):
            name, equals, weight = part.partition("=")
            try:
                found[name] = float(weight) if equals else 1.0
            except ValueError:
                found[name] = math.nan
        known = all(name in typing.get_args(LossName) and 0 < weight < math.inf for name, weight in found.items())
        if not known or len(found) < self.loss.count(",") + 1 or (len(found) == 1 and "=" in self.loss):
            raise SpecaufError(
                f"objective.loss is {self.loss!r}",
                f"one of {', '.join(typing.get_args(LossName))}, or several with positive weights, each once",
                "write it as kl, or as ce=0.1,tv=0.9",
            )
        return found

    @property
    def soft(self) -> bool:
        """It needs the target's distribution, not only the label."""
        return self.name == "survival" or self.soft_loss

    @property
    def soft_loss(self) -> bool:
        """A part of the loss does."""
        return any(name != "ce" for name in self.losses)

    def __post_init__(self):
        choice(self, "name", typing.get_args(ObjectiveName))
        choice(self, "dpace_denominator", ("slots", "rows"))
        choice(self, "witness", ("own", "base"))
        _ = self.losses  # checks them
        positive(self, "griffin_top_n", "failures", "temperature", "tree_nodes")
        not_negative(self, "focal", "chain")
        if self.gamma is not None:
            positive(self, "gamma")
        if not 0 <= self.dpace_alpha <= 1:
            raise SpecaufError(f"objective.dpace_alpha is {self.dpace_alpha}", "a number from 0 to 1", "set it to 0.5")
        if not 0 <= self.floor <= 1:
            raise SpecaufError(f"objective.floor is {self.floor}", "a number from 0 to 1", "set it to 0.1")
        stopping = ("auf", "auf_decay", "griffin")
        readers = {
            "gamma": ("decay", "auf_decay", "first_error"),
            "failures": stopping,
            "floor": stopping,
            "tree_nodes": ("auf", "auf_decay"),
            "griffin_top_n": ("griffin",),
            "dpace_alpha": ("dpace",),
            "dpace_denominator": ("dpace",),
            "focal": ("first_error",),
            "chain": ("first_error",),
            "witness": (*stopping, "dpace", "survival", "first_error"),
        }
        unread = (field for field, names in readers.items() if self.name not in names)
        unused(self, *unread, when=f"under objective {self.name}")
        if self.tree_nodes is not None:
            unused(self, "failures", when="with tree_nodes, which say where a block stops")
        if not self.soft:
            unused(self, "temperature", when=f"under objective {self.name} with loss {self.loss}")


def one_after_another(text: str, objective: Objective, steps: int) -> list[tuple[int, Objective]]:
    """The objectives of `decay@0,auf@0.8`, each with the number of steps before it.

    That of `objective`'s name is `objective` itself; the others share its loss.

    Raises:
      SpecaufError: the text is not of this form.
    """
    stages = [part.partition("@")[::2] for part in text.split(",")]
    try:
        shares = [float(share) for _, share in stages]
    except ValueError:
        shares = []
    if not shares or shares[0] != 0 or any(not a < b < 1 for a, b in zip(shares, shares[1:], strict=False)):
        raise SpecaufError(
            f"objectives is {text!r}", "NAME@SHARE,…, shares of the steps that rise from 0 and stay below 1",
            "write it as decay@0,auf@0.8",
        )  # fmt: skip
    return [(round(share * steps), another(objective, name)) for (name, _), share in zip(stages, shares, strict=True)]


def another(objective: Objective, name) -> Objective:
    """The objective of this name with the same loss; of the same name, itself."""
    if name == objective.name:
        return objective
    other = Objective(name, objective.loss)
    return dataclasses.replace(other, temperature=objective.temperature) if other.soft else other


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
    optimizer: OptimizerName = "adamw"
    """muon orthogonalises the momentum of matrices, with steps as large as AdamW's, which the rest keeps."""
    mu_dtype: Dtype = "float32"
    """Of the optimiser's first moment; bfloat16 saves 2 bytes a parameter."""

    def __post_init__(self):
        choice(self, "optimizer", typing.get_args(OptimizerName))
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
    """A: blocks sampled per row; None takes 512, for domino and dflash2 256, or all places of shorter rows."""
    slot_chunk: int = 256
    """Slots whose logits exist at one time, of every device."""
    head_slots: HeadSlots = "support"
    """Which slots meet the LM head under auf, auf_decay and griffin: those up to each block's first failure, or all,
    which costs a few times as much and tells common_token_accuracy. Other heads than dflash, and the other objectives,
    need all."""
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
    lambda_base_decay_ratio: float | None = None
    """domino, dspark: share of the steps over which the base branch's weight in the loss falls from 1 to 0, or 0 for no
    base branch; None takes 1 for domino, 0 for dspark. dflash2 trains both to the end."""

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


MOST_TREE_NODES = 4096
"""Of a draft tree: more would not fit any device's memory at a vocabulary's logits for each."""
VerifySlots = int | Literal["auto"] | None
"""Tokens verified per round: a number, the fastest as measured, or (None) all of the drafter's block."""

SamplingFlags = Annotated[Sampling, tyro.conf.arg(name="")]
"""A command's field of this type has flags without a prefix: --temperature, --top-k, --top-p."""


def decay_gamma(objective: Objective, block_size: int) -> float:
    """Time constant of the positional decay, in slots (DFlash's 7, 5, 4 for K = 16, 10, 8)."""
    if objective.gamma is not None:
        return objective.gamma
    return {16: 7.0, 10: 5.0, 8: 4.0}.get(block_size, block_size / 2)
