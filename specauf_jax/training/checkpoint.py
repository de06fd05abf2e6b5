"""Checkpoints of everything that a run needs to go on bit for bit: state, data iterator, config."""

import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers

from specauf_jax.errors import SpecaufError

# What may differ between a run and its continuation without changing a single weight.
_FREE = {
    "out",
    "train.log_every",
    "train.checkpoint_every",
    "train.keep_last",
    "train.decode_every",
    "train.decode_files",
    "train.decode_prompts",
    "train.decode_tokens",
}


class Checkpoints:
    """The `checkpoints/` folder of a run. Each step appears whole or not at all, written in the background."""

    def __init__(self, folder, keep_last: int | None):
        """Keep the newest `keep_last` steps and the best; None only reads what is there."""
        newest = checkpoint_managers.LatestN(keep_last)
        best = checkpoint_managers.BestN(get_metric_fn=_score, n=1, keep_checkpoints_without_metrics=False)
        options = ocp.CheckpointManagerOptions(
            best_fn=_score,
            best_mode="max",
            preservation_policy=checkpoint_managers.AnyPreservationPolicy([newest, best]),
            cleanup_tmp_directories=keep_last is not None,
            read_only=keep_last is None,
        )
        self.folder = epath.Path(folder).resolve()
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def save(self, step: int, state, iterator: dict, config: dict, score: float | None) -> None:
        """Start writing; the arrays are copied before this returns. Without a score it is never the best."""
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            iterator=ocp.args.JsonSave(iterator),
            config=ocp.args.JsonSave(config),
        )
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
        """State and data iterator of a step.

        Args:
          step: as from `latest`.
          like: the state's shapes and shardings (`specauf_jax.sharding.placed`).
          config: of the run that goes on.

        Raises:
          SpecaufError: the checkpoint is another run's, or damaged.
        """
        self._check_config(self.read_config(step), config)
        return self._read(step, state=ocp.args.StandardRestore(like), iterator=ocp.args.JsonRestore())

    def read_config(self, step: int) -> dict:
        """The config that the step was saved with."""
        return self._read(step, config=ocp.args.JsonRestore())[0]

    def close(self) -> None:
        """Wait until all is written."""
        self._manager.wait_until_finished()
        self._manager.close()

    def _read(self, step, **items):
        try:
            read = self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:  # Orbax and TensorStore raise many kinds for damaged files
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise SpecaufError(
                f"checkpoint {self.folder / str(step)} cannot be read: {reason}",
                "a whole checkpoint of this architecture",
                f"delete {self.folder / str(step)} to go on from the one before",
            ) from error
        return [read[name] for name in items]

    def _check_config(self, saved: dict, current: dict) -> None:
        saved, current = _flat(saved), _flat(current)
        differing = sorted(
            key for key in saved.keys() | current.keys() if key not in _FREE and saved.get(key) != current.get(key)
        )
        if differing:
            key = differing[0]
            raise SpecaufError(
                f"{self.folder} belongs to a run with {key} = {saved.get(key)!r}, not {current.get(key)!r}"
                + (f" (and {len(differing) - 1} more differences)" if differing[1:] else ""),
                "the settings that the run began with",
                "use another --out, or restore the settings",
            )


def _score(metrics: dict) -> float:
    return metrics["score"]


def _flat(config: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in config.items():
        nested = isinstance(value, dict)
        flat |= (
            _flat(value, f"{prefix}{key}.")
            if nested
            else {prefix + key: list(value) if isinstance(value, tuple) else value}
        )
    return flat
