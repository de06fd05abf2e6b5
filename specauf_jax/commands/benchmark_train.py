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

from specauf_jax.architecture import ResolvedDrafter, Target
from specauf_jax.checks import unused
from specauf_jax.commands.benchmark_train_settings import BenchmarkTrain
from specauf_jax.commands.loading import drafter_to_train, load_target_with_bar
from specauf_jax.commands.record import announce
from specauf_jax.commands.train_settings import Train
from specauf_jax.config import another
from specauf_jax.data.dataset import read_manifest
from specauf_jax.data.loader import make_loader
from specauf_jax.distributed import is_primary
from specauf_jax.environment import describe_environment, float32_precision
from specauf_jax.evaluation.timing import spread
from specauf_jax.files import as_path, output_file, write_text
from specauf_jax.flops import PEAK_FLOPS, needed_flops, step_flops
from specauf_jax.known_targets import KNOWN_TARGETS
from specauf_jax.models.layers import cast
from specauf_jax.models.target import Head, init_target, target_head
from specauf_jax.models.weights import load_drafter, target_config
from specauf_jax.recipes import read_recipe
from specauf_jax.sharding import check_batch, local_rows, make_mesh, put_rows
from specauf_jax.training.blocks import Batch, eligible_anchors, make_blocks, predicting_states, sample_anchors
from specauf_jax.training.loss import LossConfig, block_hidden, loss_config, loss_fn
from specauf_jax.training.step import PlacedStep, place_drafter_step, with_target

_WARM_STEPS = 2


def benchmark_train(config: BenchmarkTrain, console: Console) -> dict:
    """Measure, print a table, write `config.out`; returns what was written."""
    out, recipe = output_file(config.out, config.config), read_recipe(Train, config.config)
    if _has_data(recipe):
        unused(config, "sequence_length", when=f"with the rows of {recipe.data}")
    start = recipe.init_from if config.drafter is None else config.drafter
    recipe = dataclasses.replace(recipe, init_from=start, mesh=config.mesh.over(recipe.mesh))
    measured = _measure(recipe, config, console)
    meta = describe_environment(make_mesh(recipe.mesh)) | {"dtype": recipe.train.dtype}
    meta |= {"config": dataclasses.asdict(config), "recipe": dataclasses.asdict(recipe)}
    results = {"training": measured, "meta": meta}
    if is_primary():
        write_text(out, json.dumps(results, indent=2) + "\n")
    return results


def _measure(recipe: Train, config: BenchmarkTrain, console: Console) -> dict:
    """Objective → what the README's table of a training benchmark says."""
    mesh = make_mesh(recipe.mesh)
    target, drafter = _architectures(recipe)
    check_batch(recipe.train.batch_size, recipe.train.accumulation, mesh)
    announce(recipe.target, mesh, console)
    own = recipe.objective
    with float32_precision(recipe.train.dtype):
        chosen = {name: another(own, name) for name in config.objectives}
        S = read_manifest(recipe.data)["sequence_length"] if _has_data(recipe) else config.sequence_length
        losses = {name: loss_config(drafter, objective, recipe.base_objective, recipe.train, S)
                  for name, objective in chosen.items()}  # fmt: skip
        placed = {name: place_drafter_step(loss, target, recipe.train, mesh) for name, loss in losses.items()}
        step = placed[config.objectives[0]]
        target_params = _target_params(recipe, step, target, mesh, console)
        batch = _batch(recipe, step, target, config.sequence_length)
        compiled = {name: p.step.lower(p.state, *p.frozen, batch).compile() for name, p in placed.items()}
        start = load_drafter(recipe.init_from, mesh=mesh)[0] if recipe.init_from else None
        states = {name: p.initialise(start) for name, p in placed.items()}
        seconds: dict[str, list[float]] = {name: [] for name in config.objectives}
        metrics: dict[str, dict] = {}
        repeats = range(_WARM_STEPS + config.repeats)
        for repeat in track(repeats, "timing", console=console, disable=not console.is_terminal):
            for name in config.objectives:
                begin = time.perf_counter()
                states[name], metrics[name] = jax.block_until_ready(compiled[name](states[name], target_params, batch))
                if repeat >= _WARM_STEPS:
                    seconds[name].append(time.perf_counter() - begin)
        measured = {}
        for name, loss in losses.items():
            parts = _parts(loss, states[name].params, target_params, batch, recipe, target, config.repeats)
            measured[name] = _measures(seconds[name], metrics[name], parts, compiled[name], loss, target, batch)
    _show(measured, console)
    return measured


def _architectures(recipe: Train) -> tuple[Target, ResolvedDrafter]:
    target = KNOWN_TARGETS.get(recipe.target) or target_config(recipe.target)
    mask = read_manifest(recipe.data)["mask_token_id"] if _has_data(recipe) else None
    return target, drafter_to_train(recipe, target, mask)


def _has_data(recipe: Train) -> bool:
    return bool(recipe.data) and (as_path(recipe.data) / "manifest.json").is_file()


def _target_params(recipe: Train, step: PlacedStep, target: Target, mesh, console: Console):
    if recipe.target not in KNOWN_TARGETS:
        return load_target_with_bar(recipe.target, recipe.train.dtype, console, mesh)[0]
    shardings = jax.tree.map(lambda x: x.sharding, step.frozen[0])

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


def _parts(
    config: LossConfig, params, target_params, batch: Batch, recipe: Train, target: Target, repeats: int
) -> dict:
    """Seconds of a step's parts, each compiled apart and run on one accumulated part, times their number."""
    count = recipe.train.accumulation
    part = jax.tree.map(lambda x: x[::count], batch)
    rng, head = jax.random.key(0), target_head(target_params)

    @jax.jit
    def targets(target_params, batch):
        return with_target(batch, target_params, config=config, target=target)

    @jax.jit
    def drafter(params, head: Head, batch):
        return jax.grad(loss_fn, has_aux=True)(params, head, batch, rng, config=config)[0]

    @jax.jit
    def hidden_and_blocks(params, head: Head, batch):
        eligible = eligible_anchors(batch.loss_mask, batch.document_ids)
        drawn = sample_anchors(rng, eligible, batch.document_ids, config.num_anchors)
        blocks = make_blocks(batch, *drawn, config=config.drafter)
        target_hidden = predicting_states(batch.target_hidden, blocks) if config.soft else None
        hidden = block_hidden(params, head, batch, blocks, config=config)[:, :, config.drafter.first_slot :]
        return hidden, blocks, target_hidden

    @jax.jit
    def lm_head(params, hidden, lm_head, blocks, target_hidden):
        def total(params, hidden):
            scores = config.drafter.head.training_scores(
                params,
                hidden,
                embedding=head.embedding,
                lm_head=lm_head,
                previous=blocks.previous,
                labels=blocks.labels,
                valid=blocks.valid,
                target_hidden=target_hidden,
                objectives=config.objectives,
                chunk=config.slot_chunk,
                skip=config.skip,
            )
            return sum(branch.loss.sum() for branch in scores.values())

        return jax.grad(total, argnums=(0, 1))(params, hidden)

    seconds = {"target": _median(targets, target_params, part, repeats=repeats)}
    part = targets(target_params, part)
    seconds["drafter"] = _median(drafter, params, head, part, repeats=repeats)
    hidden, *slots = hidden_and_blocks(params, head, part)
    matrix = jnp.asarray(head.lm_head, hidden.dtype)
    seconds["lm_head"] = _median(lm_head, cast(params, config.dtype), hidden, matrix, *slots, repeats=repeats)
    return {name: count * value for name, value in seconds.items()}


def _median(run: Callable, *arguments, repeats: int) -> float:
    jax.block_until_ready(run(*arguments))
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(run(*arguments))
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def _measures(seconds, metrics, parts, compiled, loss: LossConfig, target: Target, batch: Batch) -> dict:
    B, S = batch.tokens.shape
    median, active = statistics.median(seconds), float(metrics["active_ratio"])
    flops = step_flops(loss.drafter, target, rows=B, sequence_length=S, num_anchors=loss.num_anchors, soft=loss.soft)
    needed = sum(needed_flops(flops, active if loss.skips else 1.0).values())
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
