"""`specauf compile`: a recipe's train step and decode round, compiled for a TPU topology on a machine without one."""

import dataclasses
import json
import multiprocessing
import os
import threading
from multiprocessing.process import BaseProcess
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from rich.console import Console
from rich.table import Table

from specauf_jax.architecture import KNOWN_TARGETS, ResolvedDrafter, Target
from specauf_jax.commands.compile_settings import Compile
from specauf_jax.commands.train_settings import Train
from specauf_jax.decoding.generate import decode_round
from specauf_jax.decoding.rows import abstract_state
from specauf_jax.decoding.state import Decoding
from specauf_jax.environment import describe_environment, float32_precision
from specauf_jax.errors import SpecaufError
from specauf_jax.evaluation.xla_memory import measure
from specauf_jax.files import output_file, write_text
from specauf_jax.flops import PEAK_FLOPS, round_flops, step_flops
from specauf_jax.models.drafter import drafter_shapes
from specauf_jax.models.resolve import resolve_drafter
from specauf_jax.models.target import TargetStep, target_shapes
from specauf_jax.models.weights import target_config
from specauf_jax.recipes import read_recipe
from specauf_jax.sharding import batch_shards, check_batch, make_mesh, parameter_sharding, placed
from specauf_jax.training.blocks import Batch
from specauf_jax.training.loss import LossConfig, loss_config
from specauf_jax.training.step import place_drafter_step

_GIB = 2**30
_PROGRAMS = ("train", "decode")
# Of one device as JAX counts them: its name in PEAK_FLOPS, memory that XLA may use in bytes, how many are a chip.
_DEVICES = {
    "v5e": ("TPU v5 lite", 15.75 * _GIB, 1),
    "v5p": ("TPU v5", 95.0 * _GIB, 1),
    "v6e": ("TPU v6 lite", 31.25 * _GIB, 1),
    "tpu7x": ("TPU7x", 94.75 * _GIB, 2),
}


def compile_recipe(config: Compile, console: Console) -> int:
    """Print and write the report; returns the exit code: 1 if the step or the round does not fit."""
    out = None if config.out is None else output_file(config.out, config.config)
    kind = config.topology.partition(":")[0]
    if kind not in _DEVICES:
        raise SpecaufError(f"topology {config.topology!r}", f"one of {', '.join(_DEVICES)}, as in v5e:4x4",
                           "correct --topology")  # fmt: skip
    recipe, drafter, target, mesh = _resolved(config)
    report = _report(config, recipe, drafter, target, mesh, console)
    _show(report, recipe, console)
    if out is not None:
        meta = {"config": dataclasses.asdict(config), "recipe": dataclasses.asdict(recipe)}
        meta |= {name: describe_environment()[name] for name in ("versions", "revision")}
        write_text(out, json.dumps(report | {"meta": meta}, indent=2) + "\n")
    return int(not report["fits"])


def _resolved(config: Compile) -> tuple:
    """Recipe, drafter, target and mesh, checked."""
    recipe = _recipe(config)
    target = _target(recipe.target)
    drafter = resolve_drafter(recipe.drafter, target)
    mesh = make_mesh(recipe.mesh, _devices(config))
    check_batch(recipe.train.batch_size, recipe.train.accumulation, mesh)
    return recipe, drafter, target, mesh


def _report(config: Compile, recipe: Train, drafter: ResolvedDrafter, target: Target, mesh, console: Console) -> dict:
    """Everything that is written, but where it came from."""
    kind, hbm, per_chip = _DEVICES[config.topology.partition(":")[0]]
    speed = PEAK_FLOPS[kind]
    settings, S = recipe.train, config.sequence_length
    rows = -(-config.decode_batch_size // batch_shards(mesh)) * batch_shards(mesh)
    place = f"for {mesh.size} devices of {config.topology}"
    with console.status(f"compiling {place}"):
        train, decode = _measured(config, _PROGRAMS, rows)
    loss = _loss(recipe, drafter, S)
    counts = {"rows": settings.batch_size, "sequence_length": S, "num_anchors": loss.num_anchors}
    train |= _time(step_flops(drafter, target, **counts, soft=loss.soft), mesh.size * speed)
    decode |= _time(
        round_flops(drafter, target, rows=rows, context=config.decode_length, nodes=config.tree_nodes),
        mesh.size * speed,
    )
    for program in (train, decode):
        program["fits"] = program["peak_bytes"] <= hbm
    return {
        "fits": train["fits"] and decode["fits"],
        "peak_bytes": max(train["peak_bytes"], decode["peak_bytes"]),
        "hbm_bytes": int(hbm),
        "flops_per_step": train["flops"],
        "collectives": train["collectives"],
        "devices": mesh.size,
        "devices_per_chip": per_chip,
        "mesh": dict(mesh.shape),
        "rows": {"train": settings.batch_size, "decode": rows},
        "train": train,
        "decode": decode,
    }


def _measured(config: Compile, names, rows: int) -> list[dict]:
    """What each program needs. One that is left without code has a process of its own, which ends with its compiler."""
    if config.code:
        return [_measure(config, name, rows) for name in names]
    context = multiprocessing.get_context("spawn")
    started = []
    for name in names:
        ours, theirs = context.Pipe()
        process = context.Process(target=_tell, args=(theirs, config, name, rows), daemon=True)
        process.start()
        theirs.close()
        started.append((process, ours))
    try:
        return [_heard(pipe) for _, pipe in started]
    finally:
        for process, _ in started:
            process.kill()


def _tell(pipe, config: Compile, name: str, rows: int) -> None:
    """In a process of its own."""
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    try:
        pipe.send(_measure(config, name, rows))
    except Exception as error:
        pipe.send(error)
    os._exit(0)  # the compiler's threads are still at work


def _end_with(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)  # it was killed


def _heard(pipe) -> dict:
    result = pipe.recv()
    if isinstance(result, Exception):
        raise result
    return result


def _measure(config: Compile, name: str, rows: int) -> dict:
    recipe, drafter, target, mesh = _resolved(config)
    with float32_precision(recipe.train.dtype):
        if name == "train":
            program = _train_step(recipe, drafter, target, mesh, config.sequence_length)
        else:
            program = _decode_round(recipe, drafter, target, mesh, rows, config.decode_length, config.tree_nodes)
        return measure(*program, code=config.code)


def _recipe(config: Compile) -> Train:
    """The recipe with what the command line puts in its place."""
    recipe = read_recipe(Train, config.config)
    changes = {"batch_size": config.batch_size, "accumulation": config.accumulation}
    changes = {name: value for name, value in changes.items() if value is not None}
    mesh = config.mesh.over(recipe.mesh)
    if config.slices > 1 and not config.mesh.replica:
        mesh = dataclasses.replace(mesh, replica=config.slices)
    return dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, **changes), mesh=mesh)


def _target(name: str) -> Target:
    if (Path(name) / "config.json").is_file():
        return target_config(name)
    if name in KNOWN_TARGETS:
        return KNOWN_TARGETS[name]
    raise SpecaufError(
        f"target {name!r}", f"a folder with a config.json, or one of {', '.join(KNOWN_TARGETS)}", "correct the recipe"
    )


def _devices(config: Compile) -> list:
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # libtpu would ask a cloud machine's metadata server
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")  # and complain that there is none
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip is taken
    try:
        slices = {"num_slices": config.slices} if config.slices > 1 else {}
        return list(topologies.get_topology_desc(platform="tpu", topology_name=config.topology, **slices).devices)
    except Exception as error:  # whatever libtpu or the lack of it raises
        raise SpecaufError(
            f"no topology {config.topology!r}: {str(error).splitlines()[0]}",
            "libtpu, and a topology that it knows",
            "pip install -e '.[dryrun]', or correct --topology",
        ) from error


def _loss(recipe: Train, drafter: ResolvedDrafter, sequence_length: int) -> LossConfig:
    """Of objectives one after another the one that needs most."""
    losses = [loss_config(drafter, objective, recipe.base_objective, recipe.train, sequence_length)
              for _, objective in recipe.stages]  # fmt: skip
    return max(losses, key=lambda loss: (loss.soft, not loss.skips))


def _train_step(recipe: Train, drafter: ResolvedDrafter, target: Target, mesh, sequence_length: int):
    """The program, and its arguments as shapes with shardings."""
    step = place_drafter_step(_loss(recipe, drafter, sequence_length), target, recipe.train, mesh)

    def rows() -> Batch:
        numbers = jnp.zeros((recipe.train.batch_size, sequence_length), jnp.int32)
        return Batch(tokens=numbers, loss_mask=numbers > 0, document_ids=numbers, positions=numbers)

    shapes = jax.eval_shape(rows)
    batch = placed(shapes, jax.tree.map(lambda _: step.rows, shapes))
    arguments = (step.state, *step.frozen, batch)
    return step.step.lower(*arguments), arguments


def _decode_round(
    recipe: Train, drafter: ResolvedDrafter, target: Target, mesh, rows: int, length: int, nodes: int | None
):
    """As `_train_step`."""
    dtype = recipe.train.dtype
    shapes = (drafter_shapes(drafter), target_shapes(target))
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), shapes)
    params = placed(params, parameter_sharding(params, mesh))
    decoding = Decoding(TargetStep(target, drafter.target_layer_ids), drafter, tree_nodes=nodes)
    state = abstract_state(
        config=decoding, batch_size=rows, room=length + drafter.block_size - 1, dtype=dtype, mesh=mesh
    )
    arguments = (*params, state)
    return decode_round.lower(*arguments, config=decoding), arguments


def _time(parts: dict[str, float], speed: float) -> dict:
    """Operations, and the seconds that they take at least."""
    flops = sum(parts.values())
    seconds = {"at_100_percent": flops / speed, "at_40_percent": flops / speed / 0.4}
    return {"flops": flops, "flops_by_part": parts, "seconds": seconds}


# ---------------------------------------------------------------------------------------------
# What is shown


def _show(report: dict, recipe: Train, console: Console) -> None:
    mesh = " ".join(f"{axis}={size}" for axis, size in report["mesh"].items())
    console.print(f"{report['devices']} devices, {report['devices_per_chip']} a chip, mesh {mesh}", highlight=False)
    for name, program in (("train step", report["train"]), ("decode round", report["decode"])):
        _show_program(name, program, console)
    rows = report["rows"]
    console.print(f"rows: {rows['train']} a step in {recipe.train.accumulation} parts, {rows['decode']} that decode")
    room = report["hbm_bytes"] / _GIB
    advice = {"train step": _train_advice(recipe), "decode round": ["fewer --decode-batch-size", "more devices"]}
    for name, program in (("train step", report["train"]), ("decode round", report["decode"])):
        peak = program["peak_bytes"] / _GIB
        said = "fits" if program["fits"] else "does not fit"
        tried = "" if program["fits"] else f"; try {', '.join(advice[name])}"
        style = "green" if program["fits"] else "red"
        console.print(f"{name} {said}: {peak:.2f} of {room:.2f} GiB{tried}", style=style, highlight=False)


def _show_program(name: str, program: dict, console: Console) -> None:
    table = Table(name, "GiB per device")
    for part in ("argument", "temporary", "output", "code", "peak"):
        value = program[f"{part}_bytes"]
        table.add_row(part, "?" if value is None else f"{value / _GIB:.2f}")
    console.print(table)
    table = Table("collective", "times", "MiB")
    for kind, entry in program["collectives"].items():
        table.add_row(kind, f"{entry['count']:,}", f"{entry['bytes'] / 2**20:,.0f}")
    console.print(table)
    console.print("largest buffers:")
    for buffer in program["largest"]:
        line = f"{buffer['bytes'] / _GIB:8.2f} GiB {buffer['shape']} {buffer['name']}, {buffer['source'][-70:]}"
        console.print(line, highlight=False)
    parts = ", ".join(f"{part} {count / 1e12:,.1f}" for part, count in program["flops_by_part"].items())
    console.print(f"{program['flops'] / 1e12:,.1f} TFLOP ({parts})", highlight=False)
    whole, part = program["seconds"].values()
    console.print(f"{whole:.3g} s at 100 % of peak, {part:.3g} s at 40 %", highlight=False)


def _train_advice(recipe: Train) -> list[str]:
    advice = ['remat="layers"'] if recipe.train.remat != "layers" else []
    if recipe.train.mu_dtype == "float32":
        advice.append('mu_dtype="bfloat16"')
    return [*advice, f"accumulation above {recipe.train.accumulation}", "a smaller slot_chunk", "more devices"]
