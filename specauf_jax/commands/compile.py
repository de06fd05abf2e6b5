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

from specauf_jax.architecture import ResolvedDrafter, Target
from specauf_jax.commands.compile_settings import COSTLIEST, Compile
from specauf_jax.commands.train_settings import Train
from specauf_jax.decoding.generate import decode_round
from specauf_jax.decoding.rows import abstract_state
from specauf_jax.decoding.state import Decoding
from specauf_jax.environment import describe_environment, float32_precision
from specauf_jax.errors import SpecaufError
from specauf_jax.evaluation.xla_memory import measure
from specauf_jax.evaluation.xla_time import Cycles, read_cycles
from specauf_jax.files import output_file, write_text
from specauf_jax.flops import PEAK_FLOPS, round_flops, step_flops
from specauf_jax.kernels.attention import TILE
from specauf_jax.known_targets import KNOWN_TARGETS
from specauf_jax.models.drafter import drafter_shapes
from specauf_jax.models.resolve import resolve_drafter
from specauf_jax.models.target import target_shapes, target_step
from specauf_jax.models.weights import target_config
from specauf_jax.recipes import read_recipe
from specauf_jax.sharding import batch_shards, check_batch, make_mesh, parameter_sharding, placed
from specauf_jax.training.blocks import Batch
from specauf_jax.training.loss import LossConfig, loss_config
from specauf_jax.training.step import place_drafter_step

_GIB = 2**30
_PROGRAMS = {"train": "train step", "decode": "decode round"}


@dataclasses.dataclass(frozen=True)
class _Device:
    """One device as JAX counts them. Rates by Google's pages on each version, of a half chip where that is a device."""

    kind: str  # in PEAK_FLOPS
    memory: float  # bytes that XLA may use
    per_chip: int
    clock: float  # Hz: the peak, over what its matrix units multiply and add in a cycle
    bandwidth: float  # bytes/s of its memory
    links: float  # bytes/s to its neighbours in a slice, all links together


_DEVICES = {
    "v5e": _Device("TPU v5 lite", 15.75 * _GIB, 1, 1.5e9, 819e9, 200e9),
    "v5p": _Device("TPU v5", 95.0 * _GIB, 1, 1.75e9, 2765e9, 600e9),
    "v6e": _Device("TPU v6 lite", 31.25 * _GIB, 1, 1.75e9, 1638e9, 448e9),
    "tpu7x": _Device("TPU7x", 94.75 * _GIB, 2, 2.2e9, 3690e9, 600e9),
}
_TRAFFIC = {"all-reduce": 2}  # bytes that pass a device's links for each byte of the result, about; 1 for others


def compile_recipe(config: Compile, console: Console) -> int:
    """Print and write the report; returns the exit code: 1 if the step or the round does not fit."""
    out = None if config.out is None else output_file(config.out, config.config)
    kind = config.topology.partition(":")[0]
    if kind not in _DEVICES:
        raise SpecaufError(f"topology {config.topology!r}", f"one of {', '.join(_DEVICES)}, as in v5e:4x4",
                           "correct --topology")  # fmt: skip
    recipe, drafter, target, mesh = _resolved(config)
    report = _report(config, recipe, drafter, target, mesh, console)
    _show(report, recipe, config.operations, console)
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
    device = _DEVICES[config.topology.partition(":")[0]]
    speed = PEAK_FLOPS[device.kind]
    settings, S = recipe.train, config.sequence_length
    rows = -(-config.decode_batch_size // batch_shards(mesh)) * batch_shards(mesh)
    place = f"for {mesh.size} devices of {config.topology}"
    with console.status(f"compiling {place}"):
        names = [name for name in _PROGRAMS if config.only in (None, name)]
        found = dict(zip(names, _measured(config, names, rows), strict=True))
    loss = _loss(recipe, drafter, S)
    counts = {"rows": settings.batch_size, "sequence_length": S, "num_anchors": loss.num_anchors}
    operations = {
        "train": step_flops(drafter, target, **counts, soft=loss.soft),
        "decode": round_flops(drafter, target, rows=rows, context=config.decode_length, nodes=config.tree_nodes),
    }
    for name, program in found.items():
        program |= _operations(operations[name], mesh.size * speed)
        program["fits"] = program["peak_bytes"] <= device.memory
        program["time"] = _time(program, device, program.pop("cycles"), program.pop("turns"))
    return {
        "fits": all(program["fits"] for program in found.values()),
        "peak_bytes": max(program["peak_bytes"] for program in found.values()),
        "hbm_bytes": int(device.memory),
        "devices": mesh.size,
        "devices_per_chip": device.per_chip,
        "mesh": dict(mesh.shape),
        "rows": {"train": settings.batch_size, "decode": rows},
        **found,
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
            loss = _loss(recipe, drafter, config.sequence_length)
            blocks = loss.num_anchors * recipe.train.batch_size // (recipe.train.accumulation * batch_shards(mesh))
            turns = -(-blocks // loss.slot_chunk)  # of the LM head's loop over blocks, a slot of each; or all slots
            data = {"lm_head": (turns, turns * drafter.num_labels)} if loss.skips else {}
        else:
            program = _decode_round(recipe, drafter, target, mesh, rows, config.decode_length, config.tree_nodes)
            data = {"attention": (1, -(-config.decode_length // TILE))}
        found, text = measure(*program, code=config.code)
        return found | {"cycles": None if text is None else read_cycles(text, data), "turns": data}


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
    decoding = Decoding(target_step(target, drafter.target_layer_ids), drafter, tree_nodes=nodes)
    state = abstract_state(
        config=decoding, batch_size=rows, room=length + drafter.block_size - 1, dtype=dtype, mesh=mesh
    )
    arguments = (*params, state)
    return decode_round.lower(*arguments, config=decoding), arguments


def _operations(parts: dict[str, float], speed: float) -> dict:
    """Operations, and the seconds that they take at least."""
    flops = sum(parts.values())
    seconds = {"at_100_percent": flops / speed, "at_40_percent": flops / speed / 0.4}
    return {"flops": flops, "flops_by_part": parts, "seconds": seconds}


def _time(program: dict, device: _Device, cycles: Cycles | None, turns: dict[str, tuple[int, int]]) -> dict | None:
    """Seconds of one call at least and at most, and what they are made of; None where the compiler has no estimates.

    compiler: its estimate, by scope. costliest: its estimate of single operations, at most. kernels: operations at the
    peak and at 40 % of it, by part, of what Pallas kernels compute. collectives: their bytes by the links' rate, of
    those that nothing runs beside, and of all. memory: the arguments read once. utilisation: operations needed, by the
    peak over the most seconds and the least; of the LM head, at least no more than its fewest turns need.
    """
    if cycles is None or not cycles.most:
        return None
    least, most = map(Cycles.by_scope, (cycles.least, cycles.most))
    compiler = {scope: [least[scope] / device.clock, count / device.clock] for scope, count in most.items()}
    costliest = [operation._asdict() | {"seconds": count / device.clock}
                 for operation, count in cycles.most.most_common(COSTLIEST)]  # fmt: skip
    called = {operation.scope.rpartition("/")[2] for operation in cycles.kernels} & {"attention", "experts"}
    shares = {part: [program["flops_by_part"][part] / program["flops"] * seconds
                     for seconds in program["seconds"].values()] for part in sorted(called)}  # fmt: skip
    sent = [(_TRAFFIC.get(kind, 1) * entry["bytes"], entry["beside_bytes"] / max(entry["bytes"], 1))
            for kind, entry in program["collectives"].items() if kind != "send"]  # fmt: skip
    collectives = [sum(size * (1 - beside) for size, beside in sent), sum(size for size, _ in sent)]
    collectives = [size / device.links for size in collectives]
    memory = program["argument_bytes"] / device.bandwidth
    parts = [*compiler.values(), *shares.values()]
    total = [max(sum(pair[i] for pair in parts), memory) + collectives[i] for i in (0, 1)]
    fewest, all_turns = turns.get("lm_head", (1, 1))
    spared = program["flops_by_part"]["lm_head"] / program["flops"] * (1 - fewest / all_turns)
    peak = program["seconds"]["at_100_percent"]
    return {"total": total, "compiler": compiler, "costliest": costliest, "kernels": shares, "collectives": collectives,
            "memory": memory, "utilisation": [peak / total[1], peak * (1 - spared) / total[0]]}  # fmt: skip


# ---------------------------------------------------------------------------------------------
# What is shown


def _show(report: dict, recipe: Train, operations: int, console: Console) -> None:
    mesh = " ".join(f"{axis}={size}" for axis, size in report["mesh"].items())
    console.print(f"{report['devices']} devices, {report['devices_per_chip']} a chip, mesh {mesh}", highlight=False)
    programs = [(title, report[name]) for name, title in _PROGRAMS.items() if name in report]
    for name, program in programs:
        _show_program(name, program, operations, console)
    rows = report["rows"]
    console.print(f"rows: {rows['train']} a step in {recipe.train.accumulation} parts, {rows['decode']} that decode")
    room = report["hbm_bytes"] / _GIB
    advice = {"train step": _train_advice(recipe), "decode round": ["fewer --decode-batch-size", "more devices"]}
    for name, program in programs:
        peak = program["peak_bytes"] / _GIB
        said = "fits" if program["fits"] else "does not fit"
        tried = "" if program["fits"] else f"; try {', '.join(advice[name])}"
        style = "green" if program["fits"] else "red"
        console.print(f"{name} {said}: {peak:.2f} of {room:.2f} GiB{tried}", style=style, highlight=False)


def _show_program(name: str, program: dict, operations: int, console: Console) -> None:
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
    _show_time(program["time"], operations, console)


def _show_time(time: dict | None, operations: int, console: Console) -> None:
    if time is None:
        console.print("time: not known without the finished program's code", highlight=False)
        return
    table = Table("time of one call", "at least, ms", "at most, ms")
    rows = sorted(time["compiler"].items(), key=lambda row: -row[1][1])
    rows = [(f"{scope or 'elsewhere'}, by the compiler", *pair) for scope, pair in rows]
    rows += [(f"{part} in Pallas kernels, at 100 and 40 % of peak", *pair) for part, pair in time["kernels"].items()]
    rows += [
        ("collectives, that nothing runs beside and all", *time["collectives"]),
        ("all arguments read once", *[time["memory"]] * 2),
    ]
    for name, *pair in [*rows, ("together", *time["total"])]:
        table.add_row(name, *(f"{1e3 * seconds:,.2f}" for seconds in pair))
    console.print(table)
    low, high = time["utilisation"]
    console.print(f"that is {100 * low:.0f} to {100 * high:.0f} % of peak", highlight=False)
    if operations:
        console.print("costliest operations:")
    for operation in time["costliest"][:operations]:
        name, scope, shape, source = (operation[part] for part in ("name", "scope", "shape", "source"))
        what = f"{scope or 'elsewhere'} {name} {shape[:60]} {source[-70:]}"
        console.print(f"{1e3 * operation['seconds']:8.2f} ms {what}", highlight=False, markup=False)


def _train_advice(recipe: Train) -> list[str]:
    advice = ['remat="layers"'] if recipe.train.remat != "layers" else []
    if recipe.train.mu_dtype == "float32":
        advice.append('mu_dtype="bfloat16"')
    return [*advice, f"accumulation above {recipe.train.accumulation}", "a smaller slot_chunk", "more devices"]
