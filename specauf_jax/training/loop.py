"""The loop around a jitted step: progress, metrics, checkpoints, resume."""

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import jax
from jax.sharding import NamedSharding
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter

from specauf_jax.config import Hosts, Optimisation
from specauf_jax.data.loader import Loader
from specauf_jax.distributed import Watch, is_primary
from specauf_jax.errors import SpecaufError, Stopped, at_work
from specauf_jax.files import AnyPath, GrowingFolder, parse_json, read_bytes, write_text
from specauf_jax.flops import PEAK_FLOPS
from specauf_jax.sharding import put_rows
from specauf_jax.training.blocks import Batch
from specauf_jax.training.checkpoint import Checkpoints, Damaged
from specauf_jax.training.step import TrainState, learning_rate_schedule

_STEPS_BEFORE_TRACE = 3  # the first one compiles


@dataclasses.dataclass
class Run:
    """What the loop needs of a training command."""

    out: AnyPath
    train: Optimisation
    hosts: Hosts
    flops: Callable[
        [int, dict], dict[str, float]
    ]  # a step's number and measures → its operations, as metrics name them
    config: dict  # stored with every checkpoint, and compared on resume
    environment: dict
    step: Callable[[int, TrainState, Batch], tuple[TrainState, dict]]  # jitted, of the step's number
    initialise: Callable[[], TrainState]  # jitted; not called where a checkpoint is restored
    like: TrainState  # shapes and shardings
    loader: Loader  # of each batch this process's `local_rows`
    batch_sharding: NamedSharding
    score: str  # the measure whose highest value (of "-name": lowest) marks the best checkpoint
    shown: tuple[str, ...]  # measures on the progress bar
    measure: Callable[[TrainState], dict] | None = None  # slower measures, every `measure_every` steps
    measure_every: int = 0
    changes: frozenset[int] = frozenset()  # steps with which another program begins, to be compiled


def train_loop(run: Run, console: Console) -> TrainState:
    """Train to `run.train.steps`, going on from the newest whole checkpoint if there is one.

    Raises:
      SpecaufError: the newest checkpoint is another run's.
      CannotGoOn: a non-finite loss, with the step and the culprit, or a row that cannot be read; checkpoints stay.
      IOFailed: of a disk or a network.
      Stopped: by SIGTERM, after saving.
    """
    checkpoints = Checkpoints(run.out / "checkpoints", run.train.keep_last)
    with contextlib.closing(checkpoints), Watch(run.hosts) as watch, GrowingFolder(run.out) as files:
        state, first = _resume(run, checkpoints, console)
        if is_primary():
            record = run.config | {"environment": run.environment}
            write_text(run.out / "config.json", json.dumps(record, indent=2, sort_keys=True) + "\n")
        log = MetricsLog(run, files.path, first)
        watch.beat()
        trace = Trace(run, files, first + _STEPS_BEFORE_TRACE, console)
        with at_work(), _progress(console) as progress, trace:
            bar = progress.add_task("", total=run.train.steps, completed=first, text="compiling")
            for number in range(first + 1, run.train.steps + 1):
                trace.before(number)
                # In the steady loop nothing goes between host and device but what is sent by name.
                with jax.transfer_guard("disallow"):
                    batch = log.waited_for(lambda: put_batch(next(run.loader), run))
                    state, metrics = run.step(number, state, batch)
                    log.add(number, metrics)
                    last = number == run.train.steps
                    stopping = watch.stopping(run.batch_sharding.mesh) and not last
                saving = last or stopping or number % run.train.checkpoint_every == 0
                changing = number in run.changes or number + 1 in run.changes  # lines of their own
                if saving or changing or number == first + 1 or number % run.train.log_every == 0:
                    text = log.write(number)
                    progress.update(bar, completed=number, text=text)
                    if not console.is_terminal and number % (10 * run.train.log_every) == 0:
                        console.print(f"step {number}/{run.train.steps}  {text}", highlight=False)
                if run.measure and (last or number % run.measure_every == 0):
                    log.write_measured(number, run.measure(state))
                if saving:  # log.write has checked the step: one that went wrong never becomes a checkpoint
                    score = log.score(run.score, number)
                    files.push()  # first: a resume drops lines after its checkpoint, but cannot make those before it
                    checkpoints.save(number, state, run.loader.get_state(), run.config, score)
                    log.restart_clock()
                if stopping:
                    checkpoints.wait()
                    saved = f"stopped by SIGTERM, saved at step {number} of {run.train.steps} in {run.out}"
                    raise Stopped(saved, run.hosts.stopped_code)
        return state


def put_batch(arrays: dict, run: Run) -> Batch:
    """Host rows as a Batch over the mesh; each process gives its own rows."""
    B = run.train.batch_size
    return Batch(**{name: put_rows(x, run.batch_sharding, B) for name, x in arrays.items()})


def _resume(run: Run, checkpoints: Checkpoints, console: Console) -> tuple[TrainState, int]:
    """State and step of the newest checkpoint that is whole; what is damaged is said, and moved aside."""
    state = None
    for step in reversed(checkpoints.steps()):
        try:
            state, iterator = checkpoints.restore(step, run.like, run.config)
        except Damaged as damage:
            checkpoints.set_aside(step, str(damage))
            continue
        break
    for damaged, where in checkpoints.aside.items():
        text = f"checkpoint {damaged} is damaged and was moved to {where}"
        console.print(text, style="yellow", highlight=False)
    if state is not None:
        run.loader.set_state(iterator)
        console.print(f"resuming {run.out} at step {step} of {run.train.steps}", highlight=False)
        return state, step
    return run.initialise(), 0


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("step {task.completed}/{task.total}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[text]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
        disable=not console.is_terminal,
    )


class Trace:
    """An XProf trace of `train.profile_steps` steps, once the run is warm, in `out/profile`."""

    def __init__(self, run: Run, files: GrowingFolder, after: int, console: Console):
        self._out, self._files, self._console, self._running = run.out / "profile", files, console, False
        self._first, self._last = after + 1, after + run.train.profile_steps

    def before(self, number: int) -> None:
        """To be called before each step."""
        if number == self._first and self._last >= self._first:
            jax.profiler.start_trace(self._files.path / "profile")
            self._running = True
        if number == self._last + 1:
            self._stop()

    def _stop(self) -> None:
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
            self._files.push()
            self._console.print(f"trace written to {self._out}, for XProf or TensorBoard", highlight=False)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._stop()


class MetricsLog:
    """metrics.jsonl and TensorBoard: means over the steps since the last line."""

    def __init__(self, run: Run, folder: Path, first: int):
        self._run, self._path = run, folder / "metrics.jsonl"
        self._newest: dict[str, tuple[int, float]] = {}  # of each measure: step and value
        if is_primary():
            _cut(run.out / "metrics.jsonl", self._path, first)
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first or None)
        self._window: list[dict] = []
        self._pending: tuple[int, dict] | None = None
        self._began = self._clock = time.perf_counter()
        self._waited = self._productive = 0.0
        self._warm = False

    def waited_for(self, work: Callable):
        """What `work` returns; its time counts as waiting for data."""
        begin = time.perf_counter()
        result = work()
        self._waited += time.perf_counter() - begin
        return result

    def add(self, step: int, metrics: dict) -> None:
        """Take a step's metrics; those of the step before are read now, while the device works on."""
        self.settle()
        self._pending = step, metrics

    def settle(self) -> None:
        """Wait for the newest metrics and check them."""
        if self._pending is None:
            return
        step, metrics = self._pending
        self._pending = None
        metrics = jax.device_get(metrics)
        nonfinite = metrics.pop("nonfinite")
        if not math.isfinite(metrics["loss"]) or any(nonfinite.values()):
            raise _diverged(step, metrics["loss"], [name for name, bad in nonfinite.items() if bad])
        self._window.append({name: float(value) for name, value in metrics.items()})

    def write(self, step: int) -> str:
        """One line of means; returns the text for the progress bar."""
        self.settle()
        now = time.perf_counter()
        seconds, window, self._window = now - self._clock, self._window, []
        means = {name: sum(m[name] for m in window) / len(window) for name in window[0]}
        means["learning_rate"] = float(learning_rate_schedule(self._run.train)(step - 1))
        # The first step of a process and of a program compiles: its time is real, but no step's.
        self._productive += seconds if self._warm and step not in self._run.changes else 0.0
        self._warm = True
        means |= self._speed(step, seconds / len(window), means)
        means |= {"data_wait": self._waited / seconds, "goodput": self._productive / (now - self._began)}
        self._emit(step, means)
        self.restart_clock()
        shown = "  ".join(f"{name} {means[name]:.3f}" for name in self._run.shown)
        return f"{shown}  {means['tokens_per_s']:,.0f} tokens/s"

    def _speed(self, step: int, step_s: float, means: dict) -> dict[str, float]:
        tokens = self._run.train.batch_size * self._run.config["sequence_length"]
        speed = {"step_s": step_s, "tokens_per_s": tokens / step_s}
        peak = PEAK_FLOPS.get(jax.devices()[0].device_kind)
        for part, count in self._run.flops(step, means).items():
            rate = count / step_s / jax.device_count()
            speed[f"tflop_per_s_{part}"] = rate / 1e12
            if peak:
                speed[f"mfu_{part}"] = rate / peak
        return speed

    def write_measured(self, step: int, measures: dict) -> None:
        """A line of slower measures; their time does not count into the speed of steps."""
        self._emit(step, measures)
        self.restart_clock()

    def restart_clock(self) -> None:
        """What was done since the last line counts as nothing but lost goodput."""
        self._clock, self._waited = time.perf_counter(), 0.0

    def score(self, name: str, step: int) -> float | None:
        """A measure (of "-name": negated) at this very step; None if it was not measured there."""
        sign, name = (-1, name[1:]) if name.startswith("-") else (1, name)
        at, value = self._newest.get(name, (None, 0.0))
        return sign * value if at == step else None

    def _emit(self, step: int, values: dict) -> None:
        self._newest |= {name: (step, value) for name, value in values.items()}
        if is_primary():
            with self._path.open("a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
            self._board.flush()


def _cut(log: AnyPath, path: Path, step: int) -> None:
    """Drop what a killed run logged after its last checkpoint, as those steps come again."""
    if not log.exists():
        return
    kept = []
    for line in read_bytes(log).decode(errors="replace").splitlines(keepends=True):
        try:
            row = parse_json(line)
        except ValueError:
            if not line.endswith("\n"):  # the kill cut the line itself
                continue
            row = None
        number = row.get("step") if isinstance(row, dict) else None
        if not isinstance(number, int) or number <= step:  # what somebody else wrote stays
            kept.append(line)
    write_text(path, "".join(kept))


def _diverged(step: int, loss, culprits: list[str]) -> SpecaufError:
    first = culprits[0] if culprits else "the loss itself"
    more = f" and {len(culprits) - 1} more" if len(culprits) > 1 else ""
    return SpecaufError(
        f"step {step}: loss is {loss}; not finite: {first}{more}",
        "finite numbers",
        "lower --train.learning-rate or raise the warm-up, then run again: it goes on from the last "
        "checkpoint, which is untouched (features not finite: the target's weights or dtype)",
    )
