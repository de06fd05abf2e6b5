"""`specauf export`: a drafter folder from any checkpoint of a training run."""

from pathlib import Path

import jax
from rich.console import Console

from specauf_jax.architecture import Drafter
from specauf_jax.commands.train import provenance
from specauf_jax.config import Export, TrainOptimisation, from_dict
from specauf_jax.errors import SpecaufError
from specauf_jax.files import existing_folder, read_json
from specauf_jax.models.drafter import init_drafter
from specauf_jax.models.weights import save_drafter
from specauf_jax.sharding import placed
from specauf_jax.training.checkpoint import Checkpoints
from specauf_jax.training.step import TrainState, init_state, make_optimizer


def export(config: Export, console: Console) -> None:
    """Write `config.out` in z-lab layout."""
    run = existing_folder(config.run, "a run of `specauf train`")
    record = read_json(run / "config.json", "the settings of `specauf train`")
    if "objective" not in record or not (run / "checkpoints").is_dir():
        raise SpecaufError(
            f"{run} is not a run of `specauf train`",
            "config.json of a drafter, and checkpoints/",
            "pass the --out of `specauf train`",
        )
    record.pop("environment", None)
    drafter = from_dict(Drafter, record["drafter"], str(run / "config.json"))
    optimizer = make_optimizer(from_dict(TrainOptimisation, record["train"], str(run / "config.json")))
    checkpoints = Checkpoints(run / "checkpoints", keep_last=None)
    try:
        step = {"last": checkpoints.latest, "best": checkpoints.best}.get(config.step, lambda: config.step)()
        if step is None or step not in checkpoints.steps():
            raise SpecaufError(
                f"{run} has no checkpoint {config.step}",
                f"one of {checkpoints.steps()}",
                "pass --step last, best or one of these",
            )
        state, _ = checkpoints.restore(step, _abstract_state(drafter, optimizer), record)
    finally:
        checkpoints.close()
    save_drafter(state.params, drafter, Path(config.out), provenance=provenance(record, step))
    console.print(f"step {step} of {run} written to {config.out}", highlight=False)


def _abstract_state(drafter: Drafter, optimizer) -> TrainState:
    """Shapes of a training state, for one device."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.eval_shape(lambda: init_state(init_drafter(drafter, jax.random.key(0)), optimizer))
    return placed(shapes, jax.tree.map(lambda _: device, shapes))
