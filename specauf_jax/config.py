"""Every setting of the system: frozen, hashable dataclasses, each field with one default and a reader.

`Objective` and the architectures (`specauf_jax.architecture`) are static data under `jit`. The other
classes are the arguments of one command each; `specauf COMMAND --help` prints the texts below them.
"""

import math
import typing
from dataclasses import dataclass
from typing import Literal

import tyro

from specauf_jax.architecture import Drafter, Target
from specauf_jax.checks import choice, not_negative, positive, seed
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
    """Time constant of decay in slots; None takes 7, 5, 4 for K = 16, 10, 8 and K/2 otherwise."""
    griffin_top_n: int = 3
    """griffin: a slot counts as right when the label is among the drafter's n best tokens."""
    dpace_alpha: float = 0.5
    """dpace: smoothing of the confidence, s = (1 - alpha) q + alpha."""
    dpace_denominator: Literal["slots", "rows"] = "slots"
    """dpace: divide by the number of valid slots, or (as SpecForge does) by the batch rows."""
    witness: Literal["own", "base"] = "own"
    """Whose hits and misses count, for the final branch of domino: its own, or the base branch's."""

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


@dataclass(frozen=True)
class Mesh:
    """Devices along the axes of the mesh; -1 (at most one axis) takes what is left."""

    replica: int = 1
    fsdp: int = -1
    tensor: int = 1


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
        not_negative(self, "weight_decay", "profile_steps")
        seed(self)
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

    num_anchors: int | None = None
    """A: blocks sampled per row; None takes 512, for domino 256."""
    slot_chunk: int = 256
    """Slots whose logits exist at one time, of every device."""
    head_slots: HeadSlots = "support"
    """Which slots meet the LM head under auf, auf_decay and griffin: those up to each block's first failure, or all,
    which costs a few times as much and tells common_token_accuracy. Domino and the other objectives need all."""
    remat: Remat = "none"
    """What the backward pass computes again instead of keeping it: nothing, all but products with weights (dots), or
    all of each drafter layer (layers). Changes memory and speed, not results."""
    decode_every: int = 0
    """Steps between measurements of real decode tau on held-out prompts; 0 for never."""
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
    hosts: Hosts = Hosts()


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
    hosts: Hosts = Hosts()

    def __post_init__(self):
        positive(self, "prompt_length", "max_new_tokens", "batch_size")
        not_negative(self, "documents")
        seed(self)


@dataclass(frozen=True)
class Train:
    """Train a DFlash or Domino drafter against a frozen target."""

    target: str
    """Target folder in Hugging Face layout."""
    data: str
    """Folder written by `specauf prepare` or `specauf regenerate`."""
    out: str
    """Run folder: config.json, metrics.jsonl, TensorBoard events, checkpoints/ and drafter/ (z-lab layout)."""
    drafter: Drafter = Drafter()
    init_from: str | None = None
    """Drafter folder (z-lab layout) to fine-tune with a fresh optimiser; --drafter may only repeat what it says."""
    objective: Objective = Objective()
    base_objective: Objective = Objective()
    """domino: objective of the base branch; --objective is the final branch's."""
    train: TrainOptimisation = TrainOptimisation()
    mesh: Mesh = Mesh()
    hosts: Hosts = Hosts()


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
    mesh: Mesh = Mesh()
    hosts: Hosts = Hosts()

    def __post_init__(self):
        positive(self, "max_new_tokens", "batch_size")
        seed(self)


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
    mesh: Mesh = Mesh()
    hosts: Hosts = Hosts()

    def __post_init__(self):
        positive(self, "max_new_tokens", "batch_size", "repeats")
        not_negative(self, "max_prompts")
        seed(self)


@dataclass(frozen=True)
class Benchmark:
    """Measure speed and latency of decoding: the target alone, prompt lookup, drafters, at several batch sizes.

    Greedy; every method in turn within each repeat, so that a machine's moods hit all alike. Or of training, with
    --train: whole steps under several objectives, and their parts.
    """

    out: str
    """JSON to write: decoding or training, meta."""
    target: str | None = None
    """Target folder in Hugging Face layout."""
    prompts: str | None = None
    """JSONL as for `specauf generate`; of several turns the first."""
    drafters: tuple[str, ...] = ()
    """NAME=DIR: drafter folders in z-lab layout. With --train one, whose weights the step starts from: they decide how
    many slots `auf` needs."""
    train: str | None = None
    """Recipe of `specauf train` to measure in place of decoding. Its target may be Qwen3-4B, Qwen3-8B or Qwen3-32B,
    with random weights; without its data rows are full of random tokens."""
    objectives: tuple[ObjectiveName, ...] = ("auf", "decay")
    """With --train: one after another within each repeat."""
    sequence_length: int = 3072
    """With --train and no data: S."""
    batch_sizes: tuple[int, ...] = (1, 4, 16, 64)
    """Rows that decode together."""
    max_prompts: int = 16
    """Prompts at each batch size, from the file's start, or a batch if that is more; a short file is used again."""
    max_new_tokens: int = 128
    repeats: int = 5
    """Timed passes of every method, after one to warm up."""
    lookup_block_size: int = 8
    """Prompt lookup: tokens verified per round."""
    lookup_ngram: int = 3
    """Prompt lookup: most tokens that an earlier place must share with the end of the text."""
    dtype: Dtype = "float32"
    mesh: Mesh = Mesh()
    hosts: Hosts = Hosts()

    def __post_init__(self):
        positive(self, "max_prompts", "max_new_tokens", "repeats", "lookup_ngram", "sequence_length")
        if self.train is None and None in (self.target, self.prompts):
            raise SpecaufError(
                "neither --train nor both --target and --prompts",
                "what to measure",
                "pass --train RECIPE.py, or those two",
            )
        if self.train is not None and (len(self.drafters) > 1 or not self.objectives):
            raise SpecaufError(
                f"--train with {len(self.drafters)} drafters and {len(self.objectives)} objectives",
                "at most one drafter, at least one objective",
                "measure one after another",
            )
        if self.lookup_block_size < 2:
            raise SpecaufError(f"lookup_block_size is {self.lookup_block_size}", "at least 2", "set it to 8")
        if not self.batch_sizes or min(self.batch_sizes) < 1 or len({*self.batch_sizes}) < len(self.batch_sizes):
            raise SpecaufError(f"batch_sizes {self.batch_sizes}", "different counts of rows", "pass 1 4 16 64")


@dataclass(frozen=True)
class Export:
    """Write a drafter for other systems, from a training run or a drafter folder.

    Give exactly one source: --run or --drafter.
    """

    out: str
    """Drafter folder to write."""
    run: str | None = None
    """Run folder of `specauf train`."""
    step: Literal["last", "best"] | int = "last"
    """Checkpoint of the run to take."""
    drafter: str | None = None
    """Drafter folder in z-lab or SpecForge layout."""
    layout: Literal["zlab", "specforge", "speculators"] = "zlab"
    """zlab: SGLang, vLLM, tpu-inference, sglang-jax. specforge: the same, but Domino under DominoDraftModel, the name
    that SpecForge trains. speculators: plain DFlash with its own keys; names the target."""
    dtype: Dtype = "float32"
    """Of the file."""
    target: str | None = None
    """Target folder, for --layout speculators; None takes the run's."""

    def __post_init__(self):
        if (self.run is None) == (self.drafter is None):
            raise SpecaufError(
                "both --run and --drafter" if self.run else "neither --run nor --drafter",
                "one source",
                "pass the run folder of `specauf train`, or a drafter folder",
            )


@dataclass(frozen=True)
class Doctor:
    """Check a drafter folder against its target, by reading and by decoding; exit code 1 on an error."""

    target: str
    """Target folder in Hugging Face layout."""
    drafter: str
    """Drafter folder in z-lab or SpecForge layout."""
    prompts: str | None = None
    """JSONL as for `specauf generate`, best like those of the drafter's use; None takes 16 built-in texts."""
    max_prompts: int = 32
    """Prompts decoded under every reading of the folder; 0 only reads the files."""
    max_new_tokens: int = 48
    single_ids: bool = True
    """Also decode with each target layer id off by one, not only with all of them."""
    batch_size: int = 16
    dtype: Dtype = "float32"
    out: str | None = None
    """JSON to write: findings, measured, engines, summary, meta."""

    def __post_init__(self):
        positive(self, "max_new_tokens", "batch_size")
        not_negative(self, "max_prompts")


@dataclass(frozen=True)
class Compile:
    """Compile a recipe's train step and decode round for a TPU topology, without a TPU. Exit code 1: no room."""

    config: str
    """--config RECIPE.py of `specauf train`; its target: a folder with config.json, Qwen3-4B, Qwen3-8B or Qwen3-32B."""
    topology: str
    """Such as v5e:4x4, v5p:2x2x4, v6e:4x4 or tpu7x:2x2x4; counts chips, of which a tpu7x has two devices."""
    slices: int = 1
    """Slices of that topology; the axis `replica` runs over them."""
    mesh: Mesh = Mesh(replica=0, fsdp=0, tensor=0)
    """Axes that are not 0 take the place of the recipe's."""
    batch_size: int | None = None
    """Rows per optimiser step over the whole mesh; None takes the recipe's."""
    accumulation: int | None = None
    """Parts that a batch is cut into; None takes the recipe's."""
    sequence_length: int = 3072
    """S: tokens per packed row."""
    decode_batch_size: int = 64
    """Rows that decode together; more where the mesh spreads rows wider."""
    decode_length: int = 4096
    """Tokens of each row that decodes, prompt and continuation; its caches have room for them."""
    code: bool = True
    """Generate code too, which takes most of the time and tells its bytes (about 0.1 GiB for Qwen3-8B)."""
    out: str | None = None
    """JSON to write: fits, peak_bytes, hbm_bytes, flops_per_step, collectives, and the same for train and decode."""

    def __post_init__(self):
        positive(self, "slices", "sequence_length", "batch_size", "accumulation", "decode_batch_size")
        if self.decode_length < 2:
            raise SpecaufError(f"decode_length is {self.decode_length}", "at least 2", "set it to 4096")


@dataclass(frozen=True)
class Report:
    """Compare runs on one self-contained HTML page."""

    runs: tyro.conf.Positional[tuple[str, ...]]
    """[NAME=]PATH[,PATH]: run folders (metrics.jsonl) and results of `specauf evaluate`."""
    out: str
    """HTML file to write."""
    benchmark: str | None = None
    """JSON of `specauf benchmark`, for plots of speed against batch size."""


# ---------------------------------------------------------------------------------------------
# Derived settings


def decay_gamma(objective: Objective, block_size: int) -> float:
    """Time constant of the positional decay, in slots (DFlash's 7, 5, 4 for K = 16, 10, 8)."""
    if objective.gamma is not None:
        return objective.gamma
    return {16: 7.0, 10: 5.0, 8: 4.0}.get(block_size, block_size / 2)
