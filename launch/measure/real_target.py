"""Which objective trains the best drafter for a pretrained target? Trains and measures all.

    python launch/measure/real_target.py --target DIR --data DIR --out DIR

launch/measure/real_target.sh makes target and data and calls this; real_target_report.py prints tables of it.
All arms of a seed learn from the same rows in the same order, at the same anchors, from the same weights. The target
reads each row once, for all arms and epochs, and DIR keeps its features. At --points equally distant steps every arm
decodes a few prompts, after the last one all prompts, at temperature 0 (with draft trees too) and 1, always in float32,
so that texts that part are faults and not rounding. Run again, it goes on where it stopped, bit for bit.
"""

import argparse
import contextlib
import dataclasses
import functools
import io
import json
import math
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from specauf_jax.architecture import Drafter, ResolvedDrafter, Target
from specauf_jax.commands.loading import check_requests, read_data
from specauf_jax.config import Objective, OptimizerName, Sampling, TrainOptimisation
from specauf_jax.data.dataset import open_dataset
from specauf_jax.data.packing import Document, document_positions, pack
from specauf_jax.data.tokenizer import Tokenizer, load_tokenizer
from specauf_jax.decoding.generate import generate
from specauf_jax.decoding.rows import Generation
from specauf_jax.decoding.state import Decoding
from specauf_jax.environment import describe_environment, float32_precision
from specauf_jax.errors import SpecaufError
from specauf_jax.evaluation.exactness import compare
from specauf_jax.evaluation.measure import acceptance_measures, outside_loops, tau_micro
from specauf_jax.evaluation.prompts import encode_first_turn, read_prompts
from specauf_jax.files import check_writable, sole_user, write_bytes, write_text
from specauf_jax.models.cpu import serving_params
from specauf_jax.models.drafter import init_drafter
from specauf_jax.models.resolve import resolve_drafter
from specauf_jax.models.target import target_head, target_step
from specauf_jax.models.weights import load_target, save_drafter
from specauf_jax.training.blocks import Batch
from specauf_jax.training.checkpoint import Checkpoints
from specauf_jax.training.loss import LossConfig, loss_config, loss_fn
from specauf_jax.training.origin import drafter_origin
from specauf_jax.training.step import (
    TrainState,
    init_state,
    lambda_base_schedule,
    make_optimizer,
    make_train_step,
    with_target,
)

LOG_EVERY = 10
FILE_ROWS = 64  # rows of a file of features
HELD_OUT_ROWS = 64  # that tell the accuracy
CURVE_SETS = 3  # sets of prompts that are decoded at every point
HEADS = {
    "domino": ("emb_dim=64", "gru_hidden_dim=256"),
    "dspark": ("markov_rank=64",),
    "dflash2": ("selector_rank=64",),
}
SETTINGS = ("target", "data", "arms", "every_seed", "seeds", "steps", "batch_size", "anchors", "layers", "block_size",
            "learning_rate", "dtype", "points", "point_prompts", "eval_tokens", "tree_nodes",
            "tree_temperature")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to train."""

    objective: Objective
    base: Objective = Objective()  # of Domino's base branch
    head: str = "dflash"
    block_size: int | None = None  # K, if not --block-size
    optimizer: OptimizerName = "adamw"
    late: bool = False
    """Begins after four fifths of the steps, as the arm `decay` was then."""


ARMS = {
    "decay": Arm(Objective("decay")),
    "full": Arm(Objective("full")),
    "dpace": Arm(Objective("dpace")),
    "auf": Arm(Objective("auf")),
    "auf_decay": Arm(Objective("auf_decay")),
    "griffin": Arm(Objective("griffin", griffin_top_n=2)),
    "decay_auf": Arm(Objective("auf"), late=True),
    "domino_baseline": Arm(Objective("decay"), Objective("decay"), head="domino"),
    "domino_b_auf_d": Arm(Objective("decay"), Objective("auf_decay"), head="domino"),
    "decay_k16": Arm(Objective("decay"), block_size=16),
    "auf_k16": Arm(Objective("auf"), block_size=16),
}
STUDY = (*ARMS,)
ARMS |= {  # others, for --arms
    "auf_kl": Arm(Objective("auf", "kl")),
    "auf_tv": Arm(Objective("auf", "ce=0.1,tv=0.9")),
    "auf_lk": Arm(Objective("auf", "lk")),
    "survival_tv": Arm(Objective("survival", "tv")),
    "survival_kl": Arm(Objective("survival", "kl")),
    "decay_kl": Arm(Objective("decay", "kl")),
    "decay_tv": Arm(Objective("decay", "ce=0.1,tv=0.9")),
    "dpace_kl": Arm(Objective("dpace", "kl")),
    "auf_floor": Arm(Objective("auf", floor=0.1)),
    "auf_second": Arm(Objective("auf", failures=2)),
    "first_error": Arm(Objective("first_error")),
    "auf_muon": Arm(Objective("auf"), optimizer="muon"),
    "decay_muon": Arm(Objective("decay"), optimizer="muon"),
    "auf_tree": Arm(Objective("auf", tree_nodes=32)),
    "auf_decay_tree": Arm(Objective("auf_decay", tree_nodes=32)),
    "dspark": Arm(Objective("decay", "ce=0.1,tv=1.8"), head="dspark"),
    "dspark_decay": Arm(Objective("decay"), head="dspark"),
    "dspark_auf": Arm(Objective("auf"), head="dspark"),
    "dflash2": Arm(Objective("decay"), Objective("decay"), head="dflash2"),
    "dflash2_b_auf": Arm(Objective("decay"), Objective("auf"), head="dflash2"),
}
EVERY_SEED = ("decay", "dpace", "auf")


def main() -> None:
    arguments = parse_arguments()
    try:
        if not arguments.check:
            with sole_user(arguments.out), float32_precision(arguments.dtype):
                run(open_study(arguments))
    except TimeIsUp as stopped:
        print(f"real_target: time is up before {stopped}; the same command goes on from there")
    except SpecaufError as error:
        sys.exit(f"real_target: {error}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for everything")
    add("--target", required=True, help="target folder")
    add("--data", nargs="+", required=True, help="datasets of the target's own answers, in rows of equal length")
    add("--benchmarks", type=Path, help="folder of NAME.jsonl with prompts, beside the held-out ones of the data")
    add("--seconds", type=float, default=math.inf, help="stop after so many: saved, exit code 0")
    add("--arms", nargs="+", choices=ARMS, default=[*STUDY], metavar="ARM", help=f"of {', '.join(ARMS)}")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of --every-seed; the other arms take the first")
    add("--every-seed", nargs="+", choices=ARMS, default=[*EVERY_SEED], metavar="ARM", help=" ".join(EVERY_SEED))
    add("--steps", type=int, default=1500)
    add("--batch-size", type=int, default=4, help="rows of a step")
    add("--anchors", type=int, default=64, help="of a row")
    add("--layers", type=int, default=2, help="of a drafter")
    add("--block-size", type=int, default=8, help="K of all arms but those of K = 16")
    add("--learning-rate", type=float, default=1e-3)
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of training")
    add("--save-every", type=int, default=50, help="steps")
    add("--points", type=int, default=5, help="steps at which the arms decode, the last one among them")
    add("--eval-prompts", type=int, default=40, help="of each set, after the last step")
    add("--point-prompts", type=int, default=12, help=f"of each of {CURVE_SETS} sets, at the points before it")
    add("--eval-tokens", type=int, default=128, help="most new tokens of a prompt")
    add("--eval-batch-size", type=int, default=16)
    add("--tree-nodes", type=int, nargs="+", default=[], metavar="N", help="draft trees to decode with at the end, too")
    add("--tree-temperature", type=float, default=1.0, help="of the distribution that trees are made by")
    add("--check", action="store_true", help="only read the arguments")
    arguments = parser.parse_args()
    arguments.arms = [name for name in ARMS if name in arguments.arms]
    arguments.every_seed = [name for name in arguments.arms if name in arguments.every_seed]
    if any(ARMS[name].late for name in arguments.arms) and "decay" not in arguments.arms:
        parser.error("decay_auf begins as decay: name both arms")
    if min(arguments.tree_nodes, default=1) < 1 or len({*arguments.tree_nodes}) < len(arguments.tree_nodes):
        parser.error(f"--tree-nodes {arguments.tree_nodes}: different numbers of at least 1")
    if not 0 < arguments.tree_temperature < math.inf or (arguments.tree_temperature != 1 and not arguments.tree_nodes):
        parser.error(f"--tree-temperature {arguments.tree_temperature}: a finite number above 0, with --tree-nodes")
    return arguments


class TimeIsUp(Exception):
    """Says before what."""


# ---------------------------------------------------------------------------------------------
# What all arms share


@dataclasses.dataclass(frozen=True, eq=False)
class Study:
    """Arguments, and what is loaded once."""

    arguments: argparse.Namespace
    end: float  # of time.monotonic()
    target: Target
    params: dict
    serving: dict  # in float32
    rows: dict[str, np.ndarray]  # of all datasets: [rows, S]
    mask: int
    stops: tuple[int, ...]
    prompts: dict[str, list[list[int]]]  # of each set: token ids
    record: dict  # what a checkpoint must agree with

    def steps(self, arm: Arm) -> TrainOptimisation:
        a = self.arguments
        return TrainOptimisation(a.steps, a.batch_size, learning_rate=a.learning_rate, dtype=a.dtype,
                                 num_anchors=a.anchors, optimizer=arm.optimizer)  # fmt: skip

    def drafter(self, arm: Arm) -> ResolvedDrafter:
        size, settings = arm.block_size or self.arguments.block_size, HEADS.get(arm.head, ())
        drafter = Drafter(size, self.arguments.layers, self.mask, projector_type=arm.head, head=settings)
        return resolve_drafter(drafter, self.target)

    @property
    def taps(self) -> tuple[int, ...]:
        """Of every arm the same."""
        return self.drafter(ARMS["decay"]).target_layer_ids

    @property
    def soft(self) -> bool:
        """An arm learns from the target's distribution."""
        return any(self.loss(ARMS[name]).soft for name in self.arguments.arms)

    def loss(self, arm: Arm, **changes) -> LossConfig:
        length = self.rows["tokens"].shape[1]
        loss = loss_config(self.drafter(arm), arm.objective, arm.base, self.steps(arm), length)
        return dataclasses.replace(loss, **changes)

    def arms(self, seed: int, step: int) -> list[str]:
        """Arms of a seed that have made this step."""
        first, late = seed == self.arguments.seeds[0], step > 4 * self.arguments.steps // 5
        known = [name for name in ARMS if name in self.arguments.arms and (first or name in self.arguments.every_seed)]
        return [name for name in known if late or not ARMS[name].late]

    def check_time(self, work: str) -> None:
        if time.monotonic() > self.end:
            raise TimeIsUp(work)


def open_study(arguments: argparse.Namespace) -> Study:
    """Load the target, the rows and the prompts, and write down what the study is, or check that it is the same."""
    end, folder = time.monotonic() + arguments.seconds, arguments.target
    tokenizer = load_tokenizer(folder)
    params, target = load_target(folder, arguments.dtype)
    manifests = {name: read_data(name, target, folder) for name in arguments.data}
    read = [source[i] for source in map(open_dataset, arguments.data) for i in range(len(source))]
    rows = {name: np.stack([row[name] for row in read]) for name in ("tokens", "loss_mask", "document_ids")}
    mask = mask_token(tokenizer, [m["mask_token_id"] for m in manifests.values()], rows)
    prompts = read_sets(arguments, tokenizer, manifests)
    check_requests([p for chosen in prompts.values() for p in chosen], target, arguments.eval_tokens)
    record = {name: getattr(arguments, name) for name in SETTINGS} | {"mask_token_id": mask}
    for name in ("rows", "documents", "supervised_tokens"):
        record[name] = sum(manifests[folder][name] for folder in arguments.data)
    record |= {name: manifests[arguments.data[0]][name] for name in ("tokenizer_sha256", "template_sha256")}
    record |= {"prompts": {name: len(p) for name, p in prompts.items()}, "curve_sets": curve_sets(prompts)}
    path = arguments.out / "study.json"
    if path.exists() and (found := json.loads(path.read_text())) | record != found:
        raise SpecaufError(f"{path} is of a study with other settings", json.dumps(record), "choose another --out")
    write_text(path, json.dumps(record | {"environment": describe_environment()}, indent=2) + "\n")
    serving = params if arguments.dtype == "float32" else load_target(folder, "float32")[0]
    serving, stops = serving_params(serving), tokenizer.stops
    study = Study(arguments, end, target, params, serving, rows, mask, stops, prompts, record)
    print(f"real_target: {record['rows']} rows, mask token {mask}, layers {study.taps} of the target, "
          f"prompts {record['prompts']}, {jax.devices()[0].device_kind}", flush=True)  # fmt: skip
    return study


def mask_token(tokenizer: Tokenizer, known: list[int | None], rows: dict) -> int:
    """The data's mask token, or the first special token that ends no answer; it must not stand in the data."""
    held = {*np.unique(rows["tokens"][rows["document_ids"] > 0]).tolist(), *tokenizer.stops}
    special = [i for i, token in sorted(tokenizer.added_tokens_decoder.items()) if token.special]
    free = [token for token in (special if known[0] is None else known[:1]) if token not in held]
    if not free:
        raise SpecaufError("every special token stands in the data", "one for the mask", "use a tokenizer with more")
    return free[0]


def read_sets(arguments: argparse.Namespace, tokenizer: Tokenizer, manifests: dict) -> dict[str, list[list[int]]]:
    """Set → prompts as token ids (of several turns the first)."""
    files = {name: Path(folder) / file for folder, m in manifests.items() for name, file in m["prompts"].items()}
    if arguments.benchmarks is not None:
        files |= {path.stem: path for path in sorted(arguments.benchmarks.glob("*.jsonl"))}
    if not files:
        raise SpecaufError("no prompts", "held-out ones of the data, or benchmarks", "pass --benchmarks DIR")
    lines = [line for file in files.values() for line in file.read_text().splitlines()[:2]]
    write_text(arguments.out / "prompts.jsonl", "\n".join(lines) + "\n")  # for `specauf benchmark`
    chosen = {name: read_prompts(file)[: arguments.eval_prompts] for name, file in files.items()}
    return {name: [encode_first_turn(tokenizer, prompt) for prompt in prompts] for name, prompts in chosen.items()}


def curve_sets(prompts: dict) -> list[str]:
    """The sets of the curves: GSM8K, then held-out ones, which stand before other benchmarks."""
    return sorted(prompts, key=lambda name: name != "gsm8k")[:CURVE_SETS]


def run(study: Study) -> None:
    """Everything that is not there yet, point by point."""
    a = study.arguments
    store_features(study)
    for step in sorted({max(a.steps * i // a.points, 1) for i in range(1, a.points + 1)}):
        for seed in a.seeds:
            open_ = missing(study, seed, step)
            states = train(study, seed, step) if open_ else {}
            for name, what in open_:
                measure(study, name, seed, step, what, states[name].params)
    print("real_target: everything is trained and measured")


# ---------------------------------------------------------------------------------------------
# Training


def train(study: Study, seed: int, until: int) -> dict[str, TrainState]:
    """The arms' states after step `until`, from the newest checkpoint on."""
    a, folder = study.arguments, study.arguments.out / f"seed_{seed}"
    with contextlib.closing(Checkpoints(folder / "checkpoints", keep_last=1)) as checkpoints:
        begin = checkpoints.latest() or 0
        if begin > until:
            raise SpecaufError(f"{folder} is at step {begin}, and measures of step {until} are missing",
                               "measures of every point before training goes on", "choose another --out")  # fmt: skip
        states = initial_states(study, seed, begin)
        if begin:
            like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), states)
            states, _ = checkpoints.restore(begin, like, study.record)
        for number in range(begin + 1, until + 1):
            row = {"step": number} | one_step(study, seed, number, states)
            late = time.monotonic() > study.end
            saving = late or number == until or number % a.save_every == 0
            if saving or number % LOG_EVERY == 0:
                with (folder / "steps.jsonl").open("a") as log:
                    log.write(json.dumps(row) + "\n")
                taus = ", ".join(f"{name} {tau:.2f}" for name, tau in row["tau"].items())
                total = sum(row["seconds"].values())
                print(f"seed {seed}: step {number} of {a.steps}, {total:.2f} s; tau {taus}", flush=True)
            if saving:
                checkpoints.save(number, states, {}, study.record, float(number))
            if late and number < until:
                raise TimeIsUp(f"step {number + 1} of {a.steps} of seed {seed}")
    return states


def initial_states(study: Study, seed: int, step: int) -> dict[str, TrainState]:
    """Of all arms that have made this step (at 0: that will make the first one)."""
    states = {}
    for name in study.arms(seed, step):
        params = init_drafter(study.drafter(ARMS[name]), jax.random.key(seed))
        state = init_state(params, make_optimizer(study.steps(ARMS[name])))
        # On its device by name, as the step returns it: else the second step would be compiled anew.
        states[name] = jax.device_put(state, jax.devices()[0])
    return states


def one_step(study: Study, seed: int, number: int, states: dict[str, TrainState]) -> dict:
    """Every arm's step on one batch, in place; the seconds and the tau of each arm."""
    names, seconds, taus = study.arms(seed, number), {}, {}
    states |= {name: jax.tree.map(jnp.copy, states["decay"]) for name in names if name not in states}
    batch = batch_of(study, row_numbers(study, seed, number - 1))
    for name in names:
        clock = time.perf_counter()
        update = update_of(study.loss(ARMS[name]), study.target, study.steps(ARMS[name]))
        states[name], metrics = update(states[name], study.params, batch, np.uint32(seed))
        loss, taus[name] = float(metrics["loss"]), float(metrics["tau"])
        if not math.isfinite(loss):
            raise SpecaufError(f"step {number} of {name}: loss is {loss}", "a finite number", "lower --learning-rate")
        seconds[name] = time.perf_counter() - clock
    return {"seconds": seconds, "tau": taus}


@functools.cache
def update_of(loss: LossConfig, target: Target, train: TrainOptimisation):
    """`(state, target_params, batch with features, seed) -> (state, metrics)`, compiled once for all seeds."""

    def update(state, target_params, batch, seed):
        options = {"seed": seed, "lambda_base": lambda_base_schedule(train, loss.drafter.head)}
        return make_train_step(loss, target, make_optimizer(train), **options)(state, target_params, batch)

    return jax.jit(update, donate_argnums=0)


def row_numbers(study: Study, seed: int, number: int) -> list[int]:
    """The rows of a step, shuffled anew in each epoch."""
    count, size = len(study.rows["tokens"]), study.arguments.batch_size
    places = [divmod(number * size + i, count) for i in range(size)]
    order = {epoch: np.random.default_rng([seed, epoch]).permutation(count) for epoch, _ in places}
    return [int(order[epoch][i]) for epoch, i in places]


def batch_of(study: Study, numbers: list[int]) -> Batch:
    """Rows with what was stored of the target."""
    stored = np.stack([np.load(path_of_features(study, n), mmap_mode="r")[n % FILE_ROWS] for n in numbers])
    stored = jax.device_put(stored.view(jnp.dtype(study.arguments.dtype)), jax.devices()[0])
    width = len(study.taps) * study.target.hidden_size
    hidden = stored[..., width:] if study.soft else None
    return dataclasses.replace(rows_of(study, numbers), features=stored[..., :width], target_hidden=hidden)


def path_of_features(study: Study, number: int) -> Path:
    return study.arguments.out / "features" / f"{number // FILE_ROWS * FILE_ROWS}.npy"


def store_features(study: Study) -> None:
    """The target reads every row, FILE_ROWS of them for each file; files that are there stay."""
    count, size = len(study.rows["tokens"]), study.arguments.batch_size
    width = (len(study.taps) + study.soft) * study.target.hidden_size * jnp.dtype(study.arguments.dtype).itemsize
    missing = sum(not path_of_features(study, first).exists() for first in range(0, count, FILE_ROWS))
    check_writable(study.arguments.out / "features", missing * FILE_ROWS * study.rows["tokens"].shape[1] * width)
    for first in range(0, count, FILE_ROWS):
        path, end, found, seconds = path_of_features(study, first), min(first + FILE_ROWS, count), [], []
        if path.exists():
            continue
        for start in range(first, end, size):
            study.check_time(f"the target's features of row {first} of {count}")
            clock = time.perf_counter()
            batch = with_features(study, rows_of(study, list(range(start, min(start + size, end)))))
            states = (batch.features, batch.target_hidden) if study.soft else (batch.features,)
            states = np.concatenate(jax.device_get(states), axis=-1)
            found.append(states.astype(jnp.dtype(study.arguments.dtype)))
            seconds.append(time.perf_counter() - clock)
        np.save(file := io.BytesIO(), np.concatenate(found).view(np.uint8))
        write_bytes(path, file.getvalue())
        row = {"rows": end, "seconds": statistics.median(seconds)}
        with (study.arguments.out / "features.jsonl").open("a") as log:
            log.write(json.dumps(row) + "\n")
        print(f"features of {end} of {count} rows, {row['seconds']:.2f} s for {size}", flush=True)


def rows_of(study: Study, numbers: list[int]) -> Batch:
    return as_batch({name: x[numbers] for name, x in study.rows.items()})


def as_batch(rows: dict[str, np.ndarray]) -> Batch:
    return jax.device_put(Batch(**rows, positions=document_positions(rows["document_ids"])), jax.devices()[0])


def with_features(study: Study, batch: Batch) -> Batch:
    """A batch with what the target has to say; with its last states if an arm needs them."""
    arm = ARMS["decay_kl" if study.soft else "decay"]
    return targets_of(batch, study.params, config=study.loss(arm), target=study.target)


targets_of = jax.jit(with_target, static_argnames=("config", "target"))


# ---------------------------------------------------------------------------------------------
# Measuring


def missing(study: Study, seed: int, step: int) -> list[tuple[str, str]]:
    """(arm, what) at a point that was not measured: decoding at temperature 0, and at the end all else."""
    a = study.arguments
    heat = "" if a.tree_temperature == 1 else f" at {a.tree_temperature:g}"
    every = ("t0", "blocks", *(f"tree {nodes}{heat}" for nodes in a.tree_nodes), "t1") if step == a.steps else ("t0",)
    open_ = [(name, what) for what in every for name in study.arms(seed, step)]
    return [(name, what) for name, what in open_ if not path_of(study, name, seed, step, what).exists()]


def path_of(study: Study, name: str, seed: int, step: int, what: str) -> Path:
    return study.arguments.out / "measured" / f"{name}_{seed}" / f"{step}_{what.replace(' ', '_')}.json"


def measure(study: Study, name: str, seed: int, step: int, what: str, params: dict) -> None:
    """One part of an arm's measures at a point, written when it is done; the first one at the end saves the drafter."""
    own, last = own_answers(study), step == study.arguments.steps
    study.check_time(f"measuring {name} of seed {seed} after step {step} ({what})")
    begin = time.monotonic()
    if what == "blocks":
        found = {"blocks": of_blocks(study, ARMS[name], params)}
        shown = f"accuracy {found['blocks']['common_token_accuracy']:.3f}"
    else:
        count = None if last else study.arguments.point_prompts
        sets = {key: study.prompts[key][:count] for key in (study.prompts if last else curve_sets(study.prompts))}
        config = decoding_of(study, study.drafter(ARMS[name]))
        if what.startswith("tree"):
            nodes, heat = int(what.split()[1]), study.arguments.tree_temperature
            config = dataclasses.replace(config, tree_nodes=nodes, tree_temperature=heat)
        found = {"sets": of_sets(study, config, params, sets, own, temperature=float(what == "t1"))}
        shown = f"tau {tau_micro([h for values in found['sets'].values() for h in values['accepted']]):.3f}"
    if last and what == "t0":
        export(study, name, seed, params)
    save(path_of(study, name, seed, step, what), {"arm": name, "seed": seed, "step": step, "what": what} | found)
    print(f"{name} of seed {seed} after step {step}, {what}: {shown}, {time.monotonic() - begin:.0f} s", flush=True)


def save(path: Path, values: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(values) + "\n")


def export(study: Study, name: str, seed: int, params: dict) -> None:
    arm, drafter = ARMS[name], study.drafter(ARMS[name])
    record = study.record | {"init_from": None, "train": {"seed": seed}, "data": " ".join(study.record["data"])}
    record |= {"objective": dataclasses.asdict(arm.objective), "base_objective": dataclasses.asdict(arm.base)}
    origin = drafter_origin(record, drafter, study.arguments.steps)
    save_drafter(params, drafter, study.arguments.out / "drafters" / f"{name}_{seed}", provenance=origin)


@float32_precision("float32")
def of_sets(study: Study, config: Decoding, params: dict, sets: dict, own: dict, temperature: float) -> dict:
    """Set → measures of decoding; of every prompt its rounds' accepted drafts, and those of rounds outside loops."""
    params = serving_params(params)
    measures, K, size = {}, config.block_size, study.arguments.eval_batch_size
    for key, found in decode(study, config, params, sets, temperature).items():
        values = measures[key] = acceptance_measures(found, K) | {"block_size": K}
        values["accepted"] = [g.accepted for g in found]
        values["outside"] = [outside_loops(g.prompt, g.tokens, g.accepted) for g in found]
        if temperature == 0:
            values |= compare(found, own[key][: len(found)], study.serving, config, size, None).results()
    return measures


def decoding_of(study: Study, drafter: ResolvedDrafter | None) -> Decoding:
    return Decoding(target_step=target_step(study.target, study.taps), drafter=drafter, stop_tokens=study.stops)


def decode(study: Study, config: Decoding, params, sets: dict, temperature: float) -> dict[str, list[Generation]]:
    """Continuations of every set's prompts, all decoded together."""
    prompts = [prompt for chosen in sets.values() for prompt in chosen]
    settings = {"max_new_tokens": study.arguments.eval_tokens, "batch_size": study.arguments.eval_batch_size}
    found = iter(generate(params, study.serving, prompts, config=config, sampling=Sampling(temperature), **settings))
    return {name: [next(found) for _ in chosen] for name, chosen in sets.items()}


@functools.cache
@float32_precision("float32")
def own_answers(study: Study) -> dict[str, list[Generation]]:
    """The target's own greedy answers to all prompts, once for all arms."""
    path = study.arguments.out / "own.json"
    if not path.exists():
        study.check_time("the target's own answers")
        found = decode(study, decoding_of(study, None), None, study.prompts, 0.0)
        save(path, {name: [dataclasses.asdict(g) for g in answers] for name, answers in found.items()})
    return {name: [Generation(**g) for g in answers] for name, answers in json.loads(path.read_text()).items()}


@functools.cache
def own_batches(study: Study) -> list[Batch]:
    """Those answers as packed rows, up to HELD_OUT_ROWS of them, with features."""
    length, size = study.rows["tokens"].shape[1], study.arguments.batch_size
    answers = [g for found in own_answers(study).values() for g in found if len(g.prompt) < length]
    texts = [(np.asarray(g.prompt + g.tokens, np.int32)[:length], len(g.prompt)) for g in answers]
    rows = list(pack([Document(text, np.arange(len(text)) >= start) for text, start in texts], length))
    rows = [rows[i] for i in np.linspace(0, len(rows) - 1, min(len(rows), HELD_OUT_ROWS)).astype(int)]
    groups = [rows[first : first + size] for first in range(0, len(rows), size)]
    stacked = [{key: np.stack([row[key] for row in group]) for key in group[0]} for group in groups]
    return [with_features(study, as_batch(rows)) for rows in stacked]


def of_blocks(study: Study, arm: Arm, params: dict) -> dict[str, float]:
    """Measures of blocks in the target's own answers, the same for all arms of equal K; every slot is read."""
    full, batches = Objective("full"), enumerate(own_batches(study))
    config = study.loss(dataclasses.replace(arm, base=full), objective=full, head_slots="all")
    sums = [block_sums(params, study.params, batch, jax.random.key(i), config=config) for i, batch in batches]
    return {key: float(value) for key, value in jax.tree.map(lambda *x: sum(x), *sums).measures().items()}


@functools.partial(jax.jit, static_argnames="config")
def block_sums(params, target_params, batch: Batch, rng, *, config: LossConfig):
    return loss_fn(params, target_head(target_params), batch, rng, config=config)[1]


if __name__ == "__main__":
    main()
