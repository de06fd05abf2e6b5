"""Checkpoints of everything that a run needs to go on bit for bit: state, data iterator, config.

Each carries a checksum of every array, over the numbers themselves: whatever happened to its files, and on whatever
mesh it is read, what comes back is what was saved, or is refused.
"""

import contextlib
import json
import time

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax import lax
from orbax.checkpoint import checkpoint_managers

from specauf_jax.distributed import everywhere, is_primary
from specauf_jax.errors import IOFailed, SpecaufError
from specauf_jax.files import absolute, move_folder, read_bytes
from specauf_jax.recipes import flatten

# What may differ between a run and its continuation: a name, or all that begins so. The first line changes no weight,
# the second one nothing but the order in which numbers are added.
_FREE = (
    *(
        "out",
        "hosts.",
        "train.log_every",
        "train.checkpoint_every",
        "train.keep_last",
        "train.decode_",
        "train.profile_",
    ),
    *("mesh.", "train.accumulation", "train.slot_chunk", "train.head_slots", "train.remat"),
)


_PATHS = ("target", "data", "init_from")


class Damaged(Exception):
    """A checkpoint that cannot be read, or does not hold what was saved."""


class Checkpoints:
    """The `checkpoints/` folder of a run. Each step appears whole or not at all, written in the background."""

    def __init__(self, folder, keep_last: int | None):
        """Keep the newest `keep_last` steps and the best; None only reads what is there.

        Steps whose score cannot be read, without which Orbax opens no folder, are set aside at once.
        """
        self.folder = absolute(folder)
        self.aside: dict[int, str] = {}
        """Damaged step → where it went and why."""
        for step, reason in _bad_scores(self.folder).items():
            if keep_last is None:
                raise SpecaufError(
                    f"checkpoint {self.folder / str(step)} is damaged: {reason}",
                    "whole checkpoints",
                    "run the training again, which sets it aside",
                )
            self._move_aside(step, reason)
        newest = checkpoint_managers.LatestN(keep_last)
        best = checkpoint_managers.BestN(get_metric_fn=_score, n=1, keep_checkpoints_without_metrics=False)
        options = ocp.CheckpointManagerOptions(
            best_fn=_score,
            best_mode="max",
            preservation_policy=checkpoint_managers.AnyPreservationPolicy([newest, best]),
            cleanup_tmp_directories=keep_last is not None,
            read_only=keep_last is None,
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def save(self, step: int, state, iterator: dict, config: dict, score: float | None) -> None:
        """Start writing; the arrays are copied before this returns. Without a score it is never the best."""
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            iterator=ocp.args.JsonSave(iterator),
            config=ocp.args.JsonSave(config),
            checksums=ocp.args.JsonSave(_checksums(state)),
        )
        with _storing(self.folder):
            self._manager.save(step, args=arguments, metrics=None if score is None else {"score": score})

    def latest(self) -> int | None:
        """The newest whole step."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """All whole steps, ascending."""
        return sorted(self._manager.all_steps())

    def best(self) -> int | None:
        """The step of highest score."""
        return self._manager.best_step()

    def restore(self, step: int, like, config: dict):
        """State and data iterator of a step; all processes call it together.

        Args:
          step: as from `steps`.
          like: the state's shapes and shardings (`specauf_jax.sharding.placed`).
          config: of the run that goes on.

        Raises:
          SpecaufError: the checkpoint is another run's.
          Damaged: in every process, if any of them cannot read its part or the checksums differ.
        """
        found, reason = {}, "another process cannot read it"
        try:
            found = self._read(step, config=ocp.args.JsonRestore())
            _check_config(self.folder, found["config"], config)
            items = {name: ocp.args.JsonRestore() for name in ("iterator", "checksums")}
            found = self._read(step, state=ocp.args.StandardRestore(like), **items)
        except Damaged as damage:
            found, reason = {}, str(damage)
        if not everywhere(bool(found)):
            raise Damaged(reason)
        wrong = [name for name, value in _checksums(found["state"]).items() if found["checksums"].get(name) != value]
        if wrong:
            raise Damaged(f"the numbers of {wrong[0]} and {len(wrong) - 1} more are not those that were saved")
        return found["state"], found["iterator"]

    def set_aside(self, step: int, reason: str) -> None:
        """Move a damaged step out of the way, into `damaged_checkpoints/` beside; all processes call it together."""
        self._move_aside(step, reason)
        self._manager.reload()

    def _move_aside(self, step: int, reason: str) -> None:
        aside = self.folder.parent / "damaged_checkpoints" / f"{step}.{int(time.time())}"
        if is_primary():
            move_folder(self.folder / str(step), aside)
        everywhere(True)  # no process looks again before it is gone
        self.aside[step] = f"{aside}: {reason}"

    def wait(self) -> None:
        """Until all that was saved is on disk."""
        with _storing(self.folder):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait until all is written."""
        self.wait()
        with _storing(self.folder):
            self._manager.close()

    def _read(self, step, **items) -> dict:
        # Every process for itself: with Orbax's barriers, one that fails would leave the others waiting in them.
        alone = ocp.options.MultiprocessingOptions(
            primary_host=jax.process_index(),
            active_processes={jax.process_index()},
            barrier_sync_key_prefix=f"restore_{jax.process_index()}",
        )
        options = ocp.CompositeOptions(multiprocessing_options=alone)
        handler = ocp.CompositeCheckpointHandler(*items, composite_options=options)
        with ocp.Checkpointer(handler, multiprocessing_options=alone) as reader:
            try:
                found = reader.restore(self.folder / str(step), args=ocp.args.Composite(**items))
                return {name: found[name] for name in items}
            except Exception as error:  # Orbax and TensorStore raise many kinds for damaged files
                raise Damaged(next(iter(str(error).strip().splitlines()), type(error).__name__)) from error


@contextlib.contextmanager
def _storing(folder):
    """Orbax and TensorStore tell of a full disk in many ways."""
    try:
        yield
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise IOFailed(f"no checkpoint could be written to {folder}: {reason}", "a whole write, and free space",
                       "look at the disk, then run again: the newest whole checkpoint counts") from error  # fmt: skip


def _bad_scores(folder) -> dict[int, str]:
    """Step → what is wrong with its score's file, if it has one."""
    bad = {}
    for path in folder.glob("*/metrics/metrics"):
        if not path.parent.parent.name.isdigit():  # somebody's copy, which Orbax passes over
            continue
        try:
            _score(json.loads(read_bytes(path)))
        except (ValueError, KeyError, TypeError) as error:
            bad[int(path.parent.parent.name)] = f"metrics: {error}"
    everywhere(True)  # no process moves anything before all have looked
    return bad


def _check_config(folder, saved: dict, current: dict) -> None:
    saved, current = flatten(saved), flatten(current)
    for settings in (saved, current):  # a path may be spelled in many ways
        settings |= {name: str(absolute(settings[name])) for name in _PATHS if isinstance(settings.get(name), str)}
    differing = sorted(
        key for key in saved.keys() | current.keys() if not key.startswith(_FREE) and saved.get(key) != current.get(key)
    )
    if differing:
        key = differing[0]
        raise SpecaufError(
            f"{folder} belongs to a run with {key} = {saved.get(key)!r}, not {current.get(key)!r}"
            + (f" (and {len(differing) - 1} more differences)" if differing[1:] else ""),
            "the settings that the run began with",
            "use another --out, or restore the settings",
        )


def _checksums(state) -> dict[str, int]:
    """Name of an array → checksum, whole numbers that no sharding changes."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): int(_checksum(leaf)) for path, leaf in leaves}


@jax.jit
def _checksum(x: jax.Array) -> jax.Array:
    """Σ hash(word, place) modulo 2³²: addition in any order gives the same, on any number of devices."""
    kinds = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
    words = lax.bitcast_convert_type(x, kinds[x.dtype.itemsize]).astype(jnp.uint32)
    place = jnp.zeros_like(words)
    for axis, size in enumerate(x.shape):
        place = place * jnp.uint32(size) + lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    h = words ^ (place * jnp.uint32(0x9E3779B1))  # then MurmurHash3's finaliser, which lets every bit reach every other
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return jnp.sum(h ^ (h >> 16), dtype=jnp.uint32)


def _score(metrics: dict) -> float:
    return metrics["score"]
