"""`specauf benchmark-train`: the train step and its parts, timed under several objectives in one run."""

import dataclasses
import json
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from specauf_jax.architecture import KNOWN_TARGETS, Drafter, Target, resolve_drafter
from specauf_jax.checks import unused
from specauf_jax.commands.benchmark_train_settings import BenchmarkTrain
from specauf_jax.commands.loading import load_target_with_bar
from specauf_jax.commands.record import announce
from specauf_jax.commands.train import PlacedStep, make_placed_step, with_anchors
from specauf_jax.commands.train_settings import Train
from specauf_jax.config import Objective
from specauf_jax.data.dataset import read_manifest
from specauf_jax.data.loader import make_loader
from specauf_jax.distributed import is_primary
from specauf_jax.environment import describe_environment, float32_precision
from specauf_jax.evaluation.timing import spread
from specauf_jax.files import as_path, write_text
from specauf_jax.flops import PEAK_FLOPS, needed_flops, step_flops
from specauf_jax.kernels.lm_head import frozen_head_cross_entropy
from specauf_jax.models.drafter import init_drafter
from specauf_jax.models.target import Head, init_target, target_features, target_head
from specauf_jax.models.weights import drafter_config, load_drafter, target_config
from specauf_jax.recipes import read_recipe
from specauf_jax.sharding import check_batch, local_rows, make_mesh, put_rows
from specauf_jax.training.blocks import Batch, eligible_anchors, make_blocks, sample_anchors
from specauf_jax.training.loss import block_hidden, loss_fn
from specauf_jax.training.step import init_state, make_optimizer

_WARM_STEPS = 2


def benchmark_train(config: BenchmarkTrain, console: Console) -> dict:
    """Measure, print a table, write `config.out`; returns what was written."""
    recipe = read_recipe(Train, config.config)
    if _has_data(recipe):
        unused(config, "sequence_length", when=f"with the rows of {recipe.data}")
    start = recipe.init_from if config.drafter is None else config.drafter
    recipe = dataclasses.replace(recipe, init_from=start, mesh=config.mesh.over(recipe.mesh))
    measured = _measure(recipe, config, console)
    meta = describe_environment(make_mesh(recipe.mesh)) | {"dtype": recipe.train.dtype}
    meta |= {"config": dataclasses.asdict(config), "recipe": dataclasses.asdict(recipe)}
    results = {"training": measured, "meta": meta}
    if is_primary():
        write_text(config.out, json.dumps(results, indent=2) + "\n")
    return results


def _measure(recipe: Train, config: BenchmarkTrain, console: Console) -> dict:
    """Objective → what the README's table of a training benchmark says."""
    mesh = make_mesh(recipe.mesh)
    target, drafter = _architectures(recipe)
    recipe = with_anchors(recipe, drafter)
    check_batch(recipe.train.batch_size, recipe.train.accumulation, mesh)
    announce(recipe.target, mesh, console)
    with float32_precision(recipe.train.dtype), jax.set_mesh(mesh):
        own = recipe.objective
        recipes = {name: dataclasses.replace(recipe, objective=own if own.name == name else Objective(name))
                   for name in config.objectives}  # fmt: skip
        placed = {name: make_placed_step(r, drafter, target, mesh) for name, r in recipes.items()}
        step = placed[config.objectives[0]]
        target_params = _target_params(recipe, step, target, console)
        batch = _batch(recipe, step, target, config.sequence_length)
        compiled = {name: p.jitted.lower(p.state, step.target_params, batch).compile() for name, p in placed.items()}
        states = {name: _state(recipe, p, drafter, mesh) for name, p in placed.items()}
        seconds, metrics = {name: [] for name in config.objectives}, {}
        repeats = range(_WARM_STEPS + config.repeats)
        for repeat in track(repeats, "timing", console=console, disable=not console.is_terminal):
            for name in config.objectives:
                begin = time.perf_counter()
                states[name], metrics[name] = jax.block_until_ready(compiled[name](states[name], target_params, batch))
                if repeat >= _WARM_STEPS:
                    seconds[name].append(time.perf_counter() - begin)
        measured = {}
        for name, p in placed.items():
            parts = _parts(p, states[name].params, target_params, batch, recipe, target, config.repeats)
            measured[name] = _measures(seconds[name], metrics[name], parts, compiled[name], recipe, p, target, batch)
    _show(measured, console)
    return measured


def _architectures(recipe: Train) -> tuple[Target, Drafter]:
    target = KNOWN_TARGETS.get(recipe.target) or target_config(recipe.target)
    if recipe.init_from is not None:
        return target, resolve_drafter(drafter_config(recipe.init_from), target)
    mask = read_manifest(recipe.data)["mask_token_id"] if _has_data(recipe) else None
    return target, resolve_drafter(recipe.drafter, target, mask)


def _has_data(recipe: Train) -> bool:
    return bool(recipe.data) and (as_path(recipe.data) / "manifest.json").is_file()


def _target_params(recipe: Train, step: PlacedStep, target: Target, console: Console):
    if recipe.target not in KNOWN_TARGETS:
        return load_target_with_bar(recipe.target, recipe.train.dtype, console, jax.sharding.get_mesh())[0]
    shardings = jax.tree.map(lambda x: x.sharding, step.target_params)

    def random():
        return jax.tree.map(lambda x: x.astype(recipe.train.dtype), init_target(target, jax.random.key(0)))

    return jax.jit(random, out_shardings=shardings)()


def _batch(recipe: Train, step: PlacedStep, target: Target, sequence_length: int) -> Batch:
    B, mine = recipe.train.batch_size, local_rows(step.rows, recipe.train.batch_size)
    if _has_data(recipe):
        arrays = next(make_loader(recipe.data, B, recipe.train.seed, rows=mine))
    else:
        shape = (len(mine), sequence_length)
        # Ids below the mask token's of any published vocabulary, the same in every process.
        tokens = np.random.default_rng(0).integers(0, target.vocab_size // 2, (B, sequence_length), np.int32)[mine]
        positions = np.broadcast_to(np.arange(sequence_length, dtype=np.int32), shape)
        arrays = {"tokens": tokens, "loss_mask": np.ones(shape, bool), "document_ids": np.ones(shape, np.int32),
                  "positions": positions}  # fmt: skip
    return Batch(**{name: put_rows(x, step.rows, B) for name, x in arrays.items()})


def _state(recipe: Train, step: PlacedStep, drafter: Drafter, mesh):
    optimizer = make_optimizer(recipe.train)
    shardings = jax.tree.map(lambda x: x.sharding, step.state)
    if recipe.init_from is not None:
        return jax.jit(lambda p: init_state(p, optimizer), out_shardings=shardings)(
            load_drafter(recipe.init_from, mesh=mesh)[0]
        )
    return jax.jit(
        lambda: init_state(init_drafter(drafter, jax.random.key(recipe.train.seed)), optimizer),
        out_shardings=shardings,
    )()


def _parts(step: PlacedStep, params, target_params, batch: Batch, recipe: Train, target: Target, repeats: int) -> dict:
    """Seconds of a step's parts, each compiled apart and run on one accumulated part, times their number."""
    count, config = recipe.train.accumulation, step.loss
    part = jax.tree.map(lambda x: x[::count], batch)
    rng, head = jax.random.key(0), target_head(target_params)

    @jax.jit
    def features(target_params, batch):
        ids = config.drafter.target_layer_ids
        tokens = batch.tokens, batch.positions, batch.document_ids
        return target_features(target_params, *tokens, config=target, layer_ids=ids)

    @jax.jit
    def drafter(params, head: Head, batch):
        return jax.grad(loss_fn, has_aux=True)(params, head, batch, rng, config=config)[0]

    @jax.jit
    def hidden_and_blocks(params, head: Head, batch):
        eligible = eligible_anchors(batch.loss_mask, batch.document_ids)
        drawn = sample_anchors(rng, eligible, batch.document_ids, config.num_anchors)
        blocks = make_blocks(batch, *drawn, config=config.drafter)
        return block_hidden(params, head, batch, blocks, config=config)[:, :, config.drafter.first_slot :], blocks

    @jax.jit
    def lm_head(hidden, lm_head, blocks):
        def total(hidden):
            how = {"chunk": config.slot_chunk, "top_n": config.support_top_n}
            return frozen_head_cross_entropy(hidden, lm_head, blocks.labels, blocks.valid, **how)[0].sum()

        return jax.grad(total)(hidden)

    part = part.replace(features=features(target_params, part))
    seconds = {"target": _median(features, target_params, part.replace(features=None), repeats=repeats)}
    seconds["drafter"] = _median(drafter, params, head, part, repeats=repeats)
    if config.drafter.projector_type == "dflash":
        hidden, blocks = hidden_and_blocks(params, head, part)
        matrix = jnp.asarray(head.lm_head, hidden.dtype)
        seconds["lm_head"] = _median(lm_head, hidden, matrix, blocks, repeats=repeats)
    return {name: count * value for name, value in seconds.items()}


def _median(run: Callable, *arguments, repeats: int) -> float:
    jax.block_until_ready(run(*arguments))
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(run(*arguments))
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def _measures(seconds, metrics, parts, compiled, recipe: Train, step: PlacedStep, target: Target, batch: Batch) -> dict:
    B, S = batch.tokens.shape
    median, active = statistics.median(seconds), float(metrics["active_ratio"])
    flops = step_flops(step.loss.drafter, target, rows=B, sequence_length=S, num_anchors=recipe.train.num_anchors)
    needed = sum(needed_flops(flops, active if step.loss.support_top_n else 1.0).values())
    peak = PEAK_FLOPS.get(jax.devices()[0].device_kind)
    memory = compiled.memory_analysis()
    return {
        "step_s": spread(seconds),
        "rows_per_s": B / median,
        "tokens_per_s": B * S / median,
        "useful_tokens_per_s": int(batch.loss_mask.sum()) / median,
        "active_ratio": active,
        "peak_bytes": memory.argument_size_in_bytes + memory.temp_size_in_bytes,
        "mfu": needed / median / jax.device_count() / peak if peak else None,
        "flops": needed,
        "parts_s": parts | {"rest": median - parts["target"] - parts["drafter"]},
    }


def _show(measured: dict, console: Console) -> None:
    table = Table("objective", "s a step", "rows/s", "useful tokens/s", "active", "MiB", "target", "drafter", "LM head")
    for name, m in measured.items():
        parts = (m["parts_s"].get(part) for part in ("target", "drafter", "lm_head"))
        table.add_row(
            name,
            f"{m['step_s']['median']:.3f}",
            f"{m['rows_per_s']:.2f}",
            f"{m['useful_tokens_per_s']:,.0f}",
            f"{m['active_ratio']:.2f}",
            f"{m['peak_bytes'] / 2**20:,.0f}",
            *("—" if seconds is None else f"{seconds:.3f}" for seconds in parts),
        )
    console.print(table)
