"""A training run's folder, what it says of itself, and the line at its start."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from typing import Literal

import jax
from rich.console import Console

from specauf_jax.distributed import is_primary
from specauf_jax.environment import describe_environment
from specauf_jax.errors import SpecaufError
from specauf_jax.files import AnyPath, absolute, as_path, check_apart, check_writable, read_json, sole_user
from specauf_jax.models.weights import check_drafter_folder, check_target_folder

_NOT_OURS = ("manifest.json", "tokenizer.json", "dataset_info.json", "*.safetensors", "*.safetensors.index.json")
_LOGS_BYTES = 16 * 2**20


@contextlib.contextmanager
def run_folder(out, trained: Literal["drafter", "target"], *inputs) -> Iterator[AnyPath]:
    """The folder of a training run, which no other process uses until the end; found fit before any work.

    Args:
      out: a user's.
      trained: what the run writes at its end, into a folder of this name.
      inputs: folders and files that the run reads; None where it reads nothing.

    Raises:
      SpecaufError: it holds a model, a dataset, another command's run or something that the run reads; or it cannot be
        written; or another process is at work in it.
    """
    out, check_replaceable = as_path(out), {"drafter": check_drafter_folder, "target": check_target_folder}[trained]
    if out.exists() and not out.is_dir():
        raise SpecaufError(f"{out} is no folder", "a run folder", "choose another --out")
    held = [path.name for pattern in _NOT_OURS for path in out.glob(pattern)] if out.exists() else []
    if not held and (out / "config.json").is_file():
        record = read_json(out / "config.json", "the settings of a run")
        ours = "train" in record and ("objective" in record) == (trained == "drafter")
        held = [] if ours else ["config.json of something else than such a run"]
    if held:
        raise SpecaufError(f"{out} holds {held[0]}", "a folder of its own for each run", "choose another --out")
    check_apart(out, *inputs)
    written = {absolute(out / name) for name in (trained, "checkpoints", "metrics.jsonl", "config.json", "tensorboard")}
    for read in (absolute(each) for each in inputs if each is not None):
        if written & {read, *read.parents}:
            raise SpecaufError(f"{out} is written while {read} is read", "a folder of its own for each run",
                               "choose another --out")  # fmt: skip
    check_replaceable(out / trained)
    with sole_user(out) if is_primary() else contextlib.nullcontext():
        yield out


def check_room(out: AnyPath, state, keep_last: int) -> None:
    """Refuse a disk that has no room for a run's checkpoints: the newest, the best, and the one being written."""
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    check_writable(out, (keep_last + 2) * size + _LOGS_BYTES)


def run_record(config, manifest: dict, **resolved) -> dict:
    """What a checkpoint must agree with: the command's config, what was resolved from it, the dataset."""
    record = json.loads(json.dumps(dataclasses.asdict(config) | resolved))
    return record | {
        name: manifest[name]
        for name in ("sequence_length", "tokenizer_sha256", "template_sha256", "template_args", "rows")
    }


def announce(out, mesh, console: Console) -> dict:
    """Print where and on what a command runs; returns the environment's description."""
    environment = describe_environment(mesh)
    shape = " ".join(f"{axis}={size}" for axis, size in environment["mesh"].items())
    console.print(
        f"{out}  {environment['devices']} × {environment['device']}, mesh {shape}, "
        f"jax {environment['versions']['jax']}, revision {environment['revision']}",
        highlight=False,
    )
    return environment
