"""`specauf compile`: the train step of a recipe, compiled ahead of time for a TPU topology on a machine without one."""

import dataclasses
import json
import math
import os
import re
import tempfile
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from rich.console import Console
from rich.table import Table

from specauf_jax.architecture import KNOWN_TARGETS, Target, resolve_drafter
from specauf_jax.commands.setup import float32_precision
from specauf_jax.commands.train import make_placed_step, with_anchors
from specauf_jax.config import Compile, Train, read_recipe
from specauf_jax.environment import describe_environment
from specauf_jax.errors import SpecaufError
from specauf_jax.files import write_text
from specauf_jax.models.weights import target_config
from specauf_jax.sharding import check_batch, make_mesh
from specauf_jax.training.blocks import Batch
from specauf_jax.training.flops import step_flops

_GIB = 2**30
# Of one device as JAX counts them: memory that XLA may use in bytes, and bfloat16 FLOP/s (Google Cloud's TPU pages).
_CHIPS = {
    "v5e": (15.75 * _GIB, 197e12),
    "v5p": (95.0 * _GIB, 459e12),
    "v6e": (31.25 * _GIB, 918e12),
    "tpu7x": (94.75 * _GIB, 1153e12),
}
_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
_LARGEST = 8


def compile_step(config: Compile, console: Console) -> int:
    """Print and write the report; returns the exit code: 1 if the step does not fit."""
    kind = config.topology.partition(":")[0]
    if kind not in _CHIPS:
        raise SpecaufError(f"topology {config.topology!r}", f"one of {', '.join(_CHIPS)}, as in v5e:4x4",
                           "correct --topology")  # fmt: skip
    recipe = read_recipe(Train, config.config)
    target = _target(recipe.target)
    drafter = resolve_drafter(recipe.drafter, target)
    recipe = with_anchors(recipe, drafter)
    devices = _devices(config)
    if config.slices > 1:
        recipe = dataclasses.replace(recipe, mesh=dataclasses.replace(recipe.mesh, replica=config.slices))
    mesh = make_mesh(recipe.mesh, devices)
    check_batch(recipe.train.batch_size, recipe.train.accumulation, mesh)
    hbm, peak_flops = _CHIPS[kind]
    with (
        console.status(f"compiling for {len(devices)} devices of {config.topology}"),
        float32_precision(recipe.train.dtype),
    ):
        memory = _compile(recipe, drafter, target, mesh, config.sequence_length)
    parts = step_flops(drafter, target, rows=recipe.train.batch_size, sequence_length=config.sequence_length,
                       num_anchors=recipe.train.num_anchors)  # fmt: skip
    seconds = sum(parts.values()) / len(devices) / peak_flops
    report = {
        "fits": memory["peak_bytes"] <= hbm,
        "hbm_bytes": int(hbm),
        **memory,
        "flops_per_step": sum(parts.values()),
        "flops_by_part": parts,
        "step_seconds": {"at_100_percent": seconds, "at_40_percent": seconds / 0.4},
        "devices": len(devices),
        "mesh": dict(mesh.shape),
    }
    _show(report, recipe, console)
    if config.out is not None:
        meta = {"config": dataclasses.asdict(config), "recipe": dataclasses.asdict(recipe)}
        meta["versions"] = describe_environment()["versions"]
        write_text(config.out, json.dumps(report | {"meta": meta}, indent=2) + "\n")
    return int(not report["fits"])


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
    try:
        slices = {"num_slices": config.slices} if config.slices > 1 else {}
        return list(topologies.get_topology_desc(platform="tpu", topology_name=config.topology, **slices).devices)
    except Exception as error:  # whatever libtpu or the lack of it raises
        raise SpecaufError(
            f"no topology {config.topology!r}: {str(error).splitlines()[0]}",
            "libtpu, and a topology that it knows",
            "pip install 'specauf-jax[dryrun]', or correct --topology",
        ) from error


def _compile(recipe: Train, drafter, target: Target, mesh, sequence_length: int) -> dict:
    """Bytes per device, largest buffers and collectives of the compiled step."""
    step = make_placed_step(recipe, drafter, target, mesh)
    names = ("tokens", "loss_mask", "document_ids", "positions")
    batch = Batch(**{
        name: jax.ShapeDtypeStruct((recipe.train.batch_size, sequence_length),
                                   jnp.bool_ if name == "loss_mask" else jnp.int32, sharding=step.rows)
        for name in names
    })  # fmt: skip
    arguments = (step.state, step.target_params, batch)
    held = sum(map(_device_bytes, jax.tree.leaves(arguments)))
    with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as dump:
        lowered = step.jitted.lower(*arguments)
        options = {"xla_dump_to": dump, "xla_dump_hlo_as_text": True}
        try:
            sizes = lowered.compile(compiler_options=options).memory_analysis()
        except jax.errors.JaxRuntimeError as error:
            found = re.search(r"\(([\d.]+)([KMG])\) exceeds available HBM", str(error))
            if found is None:
                raise
            needed = int(float(found[1]) * {"K": 2**10, "M": 2**20, "G": 2**30}[found[2]])
            sizes = None
        text = "".join(path.read_text() for path in Path(dump).glob("*jit_step*after_optimizations.txt"))
    if sizes is None:  # the compiler gave up for want of room, and says only how much the temporaries need
        return {"argument_bytes": held, "temporary_bytes": needed, "output_bytes": None, "code_bytes": None,
                "peak_bytes": held + needed, "collectives": {}, "largest": []}  # fmt: skip
    collectives, largest = _read(text)
    peak = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    peak += sizes.temp_size_in_bytes + sizes.generated_code_size_in_bytes
    return {
        "argument_bytes": sizes.argument_size_in_bytes,
        "temporary_bytes": sizes.temp_size_in_bytes,
        "output_bytes": sizes.output_size_in_bytes,
        "code_bytes": sizes.generated_code_size_in_bytes,
        "peak_bytes": peak,
        "collectives": collectives,
        "largest": largest,
    }


def _device_bytes(x: jax.ShapeDtypeStruct) -> int:
    return math.prod(x.sharding.shard_shape(x.shape)) * np.dtype(x.dtype).itemsize


def _read(text: str) -> tuple[dict, list]:
    """Collectives by kind (count and bytes of results, a loop's body once), and the largest temporary buffers."""
    collectives, buffers = {}, Counter()
    for line in text.splitlines():
        found = re.match(r"\s*(?:ROOT )?%\S+ = (\(?)(\w+)\[([\d,]*)\].*? ([\w-]+)\(", line)
        if found is None or found[2] not in _BYTES:
            continue
        name = found[4].removesuffix("-start")
        if name in _COLLECTIVES:
            result = line.partition(f" {found[4]}(")[0]
            entry = collectives.setdefault(name, {"count": 0, "bytes": 0})
            entry["count"] += 1
            entry["bytes"] += max(_bytes(*shape) for shape in re.findall(r"(\w+)\[([\d,]*)\]", result))
        elif not found[1] and name in ("fusion", "copy", "dot", "convolution", "dynamic-update-slice"):
            source = re.search(r'op_name="([^"]*)"', line)
            shape = f"{found[2]}[{found[3]}]"
            buffers[_bytes(found[2], found[3]), shape, source[1][-60:] if source else ""] += 1
    largest = [{"bytes": size, "shape": shape, "source": source} for size, shape, source in sorted(buffers)[::-1]]
    return collectives, largest[:_LARGEST]


def _bytes(dtype: str, shape: str) -> int:
    return _BYTES.get(dtype, 0) * math.prod(int(n) for n in shape.split(",") if n)


# ---------------------------------------------------------------------------------------------
# What is shown


def _show(report: dict, recipe: Train, console: Console) -> None:
    table = Table("per device", "GiB")
    for name in ("argument", "temporary", "output", "code", "peak", "hbm"):
        value = report[f"{name}_bytes"]
        table.add_row(name, "?" if value is None else f"{value / _GIB:.2f}")
    console.print(table)
    table = Table("collective", "in the program", "MiB (a loop's body once)")
    for name, entry in report["collectives"].items():
        table.add_row(name, str(entry["count"]), f"{entry['bytes'] / 2**20:,.0f}")
    console.print(table)
    table = Table("largest buffers", "GiB", "from")
    for buffer in report["largest"]:
        table.add_row(buffer["shape"], f"{buffer['bytes'] / _GIB:.2f}", buffer["source"])
    console.print(table)
    parts = ", ".join(f"{name} {count / 1e12:,.0f}" for name, count in report["flops_by_part"].items())
    console.print(f"{report['flops_per_step'] / 1e12:,.0f} TFLOP a step ({parts})", highlight=False)
    whole, part = report["step_seconds"].values()
    console.print(f"{whole:.2f} s a step at 100 % of peak, {part:.2f} s at 40 %", highlight=False)
    peak, room = report["peak_bytes"] / _GIB, report["hbm_bytes"] / _GIB
    if report["fits"]:
        console.print(f"fits: {peak:.2f} of {room:.2f} GiB", style="green", highlight=False)
        return
    advice = ['remat="layers"'] if recipe.train.remat != "layers" else []
    advice += [f"accumulation above {recipe.train.accumulation}", "a smaller anchor_chunk", "more devices"]
    console.print(f"does not fit: {peak:.2f} of {room:.2f} GiB; try {', '.join(advice)}", style="red", highlight=False)
