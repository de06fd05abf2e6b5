"""`specauf export`: a drafter folder for other systems, from a training run's checkpoint or another folder."""

import jax
from rich.console import Console

from specauf_jax.architecture import ResolvedDrafter
from specauf_jax.commands.export_settings import Export
from specauf_jax.config import TrainOptimisation
from specauf_jax.errors import SpecaufError
from specauf_jax.files import as_path, check_apart, existing_folder, read_json
from specauf_jax.models.drafter import init_drafter
from specauf_jax.models.hf_drafter import read_drafter
from specauf_jax.models.weights import check_drafter_folder, load_drafter, save_drafter
from specauf_jax.recipes import from_dict
from specauf_jax.sharding import placed
from specauf_jax.training.checkpoint import Checkpoints, Damaged
from specauf_jax.training.origin import drafter_origin
from specauf_jax.training.step import TrainState, init_state, make_optimizer


def export(config: Export, console: Console) -> None:
    """Write `config.out`."""
    check_apart(config.out, config.drafter, config.target, config.run and as_path(config.run) / "checkpoints")
    check_drafter_folder(config.out)
    if config.drafter is not None:
        params, drafter = load_drafter(config.drafter)
        origin = as_path(config.drafter) / "specauf.json"
        facts = read_json(origin, "a drafter's origin") if origin.is_file() else None
        source, target = config.drafter, config.target
    else:
        params, drafter, facts, source = _from_run(config)
        target = config.target or facts["target"]
    save_drafter(
        params, drafter, config.out, provenance=facts, layout=config.layout, dtype=config.dtype, verifier=target
    )
    console.print(f"{source} written to {config.out}", highlight=False)


def _from_run(config: Export) -> tuple[dict, ResolvedDrafter, dict, str]:
    """Parameters, architecture and origin of a run's checkpoint, and what to call it."""
    run = existing_folder(config.run, "a run of `specauf train`")
    record = read_json(run / "config.json", "the settings of `specauf train`")
    if "objective" not in record or not (run / "checkpoints").is_dir():
        raise SpecaufError(
            f"{run} is not a run of `specauf train`",
            "config.json of a drafter, and checkpoints/",
            "pass the --out of `specauf train`",
        )
    record.pop("environment", None)
    drafter = read_drafter(record["drafter"], str(run / "config.json"))
    optimizer = make_optimizer(from_dict(TrainOptimisation, record["train"], str(run / "config.json")))
    checkpoints = Checkpoints(run / "checkpoints", keep_last=None)
    try:
        named = {"last": checkpoints.latest, "best": checkpoints.best}
        step = config.step if isinstance(config.step, int) else named[config.step]()
        if step is None or step not in checkpoints.steps():
            raise SpecaufError(
                f"{run} has no checkpoint {config.step}",
                f"one of {checkpoints.steps()}",
                "pass --step last, best or one of these",
            )
        state, _ = checkpoints.restore(step, _abstract_state(drafter, optimizer), record)
    except Damaged as damage:
        raise SpecaufError(
            f"{run}/checkpoints/{step} cannot be read: {damage}",
            "a whole checkpoint of this architecture",
            f"pass --step with another one of {checkpoints.steps()}",
        ) from damage
    finally:
        checkpoints.close()
    return state.params, drafter, drafter_origin(record, drafter, step), f"step {step} of {run}"


def _abstract_state(drafter: ResolvedDrafter, optimizer) -> TrainState:
    """Shapes of a training state, for one device."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.eval_shape(lambda: init_state(init_drafter(drafter, jax.random.key(0)), optimizer))
    return placed(shapes, jax.tree.map(lambda _: device, shapes))
