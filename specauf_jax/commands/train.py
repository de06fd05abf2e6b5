"""`specauf train`: a drafter against a frozen target."""

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from specauf_jax.architecture import ResolvedDrafter, Target
from specauf_jax.checks import unused
from specauf_jax.commands.loading import check_requests, drafter_to_train, load_target_with_bar, read_data, warn
from specauf_jax.commands.record import announce, check_room, run_folder, run_record
from specauf_jax.commands.train_settings import Train
from specauf_jax.data.dataset import open_dataset
from specauf_jax.data.loader import make_loader
from specauf_jax.data.tokenizer import load_tokenizer, stop_token_ids, with_template_args
from specauf_jax.decoding.generate import generate
from specauf_jax.decoding.state import Decoding
from specauf_jax.environment import float32_precision
from specauf_jax.errors import SpecaufError
from specauf_jax.evaluation.doctor.engines import unserved_heads
from specauf_jax.evaluation.measure import tau_micro
from specauf_jax.evaluation.prompts import encode_first_turn, read_prompts
from specauf_jax.files import AnyPath, as_path
from specauf_jax.flops import needed_flops, step_flops
from specauf_jax.models.hf_drafter import write_drafter
from specauf_jax.models.target import target_step
from specauf_jax.models.weights import load_drafter, save_drafter, target_config
from specauf_jax.sharding import (
    batch_shards,
    check_batch,
    local_rows,
    make_mesh,
)
from specauf_jax.training.blocks import eligible_anchors
from specauf_jax.training.loop import Run, train_loop
from specauf_jax.training.loss import LossConfig, loss_config
from specauf_jax.training.origin import drafter_origin
from specauf_jax.training.step import place_drafter_step

_DECODED_TOGETHER = 16  # prompts of the decode measure; more where the mesh spreads rows wider
_ROWS_LOOKED_AT = 64  # rows of a dataset that are searched for an anchor before training starts


def train(config: Train, console: Console) -> None:
    """Train, then write `out/drafter` in z-lab layout."""
    inputs = config.target, config.data, config.init_from, *config.train.decode_files
    with run_folder(config.out, "drafter", *inputs) as out:
        _train(config, out, console)


def _train(config: Train, out: AnyPath, console: Console) -> None:
    data = as_path(config.data)
    target = target_config(config.target)
    manifest = read_data(data, target, config.target)
    drafter = drafter_to_train(config, target, manifest["mask_token_id"])
    _check_branches(config, drafter)
    _warn_of_heads(drafter, target, console)
    losses = {
        first: loss_config(drafter, objective, config.base_objective, config.train, manifest["sequence_length"])
        for first, objective in config.stages
    }
    _check_rows(config, losses[0], manifest, console)
    mesh = make_mesh(config.mesh)
    check_batch(config.train.batch_size, config.train.accumulation, mesh)
    with float32_precision(config.train.dtype):
        record = run_record(config, manifest, drafter=write_drafter(drafter))
        run = make_run(config, losses, target, manifest, mesh, record, console)
        state = train_loop(run, console)
    save_drafter(state.params, drafter, out / "drafter", provenance=drafter_origin(record, drafter, config.train.steps))
    console.print(f"drafter written to {out / 'drafter'}", highlight=False)


def make_run(
    config: Train, losses: dict[int, LossConfig], target: Target, manifest: dict, mesh, record, console: Console
) -> Run:
    """Parameters, jitted steps and data of a training run, spread over the mesh.

    `losses` gives the loss of the steps behind each number of steps.
    """
    settings, drafter = config.train, losses[0].drafter
    stages = {first: place_drafter_step(loss, target, settings, mesh) for first, loss in losses.items()}
    placed_step = stages[0]
    check_room(as_path(config.out), placed_step.state, settings.keep_last)

    def stage(number: int) -> int:
        return max(first for first in stages if first < number or first == 0)

    def flops(number: int, means: dict) -> dict[str, float]:
        loss = losses[stage(number)]
        counts = {"rows": settings.batch_size, "sequence_length": manifest["sequence_length"]}
        parts = step_flops(drafter, target, **counts, num_anchors=loss.num_anchors, soft=loss.soft)
        return needed_flops(parts, means["active_ratio"] if loss.skips else 1.0)

    target_params, _ = load_target_with_bar(config.target, settings.dtype, console, mesh)

    def initialise():
        return placed_step.initialise(config.init_from and load_drafter(config.init_from, mesh=mesh)[0])

    return Run(
        out=as_path(config.out),
        train=settings,
        hosts=config.hosts,
        flops=flops,
        config=record,
        environment=announce(as_path(config.out), mesh, console),
        step=lambda number, state, batch: stages[stage(number)].step(state, target_params, batch),
        loader=make_loader(
            config.data,
            settings.batch_size,
            settings.seed,
            rows=local_rows(placed_step.rows, settings.batch_size),
        ),
        initialise=initialise,
        like=placed_step.state,
        batch_sharding=placed_step.rows,
        changes=frozenset(first + 1 for first in stages if first),
        score="decode_tau" if settings.decode_every else "tau",
        shown=("tau", "loss"),
        measure=_decode_measure(config, drafter, target, target_params, manifest, mesh),
        measure_every=settings.decode_every,
    )


def _warn_of_heads(drafter: ResolvedDrafter, target: Target, console: Console) -> None:
    """Heads that a TPU engine which taps such a target will not run: better known before training than after."""
    if target.model_type in ("qwen3", "llama") and (found := unserved_heads(drafter, target)):
        warn(console, f"tpu-inference cannot run {found}")


def _check_branches(config: Train, drafter: ResolvedDrafter) -> None:
    """Refuse the settings of a base branch where none trains."""
    head, ratio = drafter.head, config.train.lambda_base_decay_ratio
    if head.lambda_base_decay_ratio is None:
        unused(config.train, "lambda_base_decay_ratio", when=f"by {head.title}, whose branches both train to the end")
    if head.base_ratio(ratio):
        return
    where = f"by a head without a base branch ({head.projector_type})"
    if "base" in head.branches:
        where = f"with lambda_base_decay_ratio 0{f', the default of {head.projector_type}' if ratio is None else ''}"
    else:
        unused(config.train, "lambda_base_decay_ratio", when=where)
    unused(config, "base_objective", when=where)
    for _, objective in config.stages:
        unused(objective, "witness", when=where)


def _check_rows(config: Train, loss: LossConfig, manifest: dict, console: Console) -> None:
    S = manifest["sequence_length"]
    if loss.drafter.block_size > S:
        raise SpecaufError(
            f"block_size {loss.drafter.block_size} in rows of {S} tokens",
            "a block that fits a row",
            "lower --drafter.block-size or prepare longer rows",
        )
    if loss.num_anchors >= S:
        raise SpecaufError(
            f"num_anchors {loss.num_anchors} in rows of {S} tokens",
            f"at most {S - 1}",
            "lower --train.num-anchors",
        )
    rows = open_dataset(config.data)
    looked_at = [rows[i] for i in np.linspace(0, len(rows) - 1, min(len(rows), _ROWS_LOOKED_AT)).astype(int)]
    masks, ids = (jnp.stack([row[name] for row in looked_at]) for name in ("loss_mask", "document_ids"))
    if not eligible_anchors(masks, ids).any():
        raise SpecaufError(
            f"{config.data}: no eligible anchor in {len(looked_at)} rows",
            "rows with two supervised tokens in succession",
            "check the dataset's loss mask",
        )
    _check_mask(config, loss.drafter.mask_token_id, manifest, looked_at, console)


def _check_mask(config: Train, mask: int, manifest: dict, rows: list[dict], console: Console) -> None:
    """Warn of a mask token that texts hold or may hold: in a block it stands for what is to be predicted."""
    held = sum(bool(np.any(row["tokens"][row["document_ids"] > 0] == mask)) for row in rows)
    if held:
        warn(console, f"mask token {mask} stands in {held} of the {len(rows)} rows looked at; choose one of no text")
    elif mask != manifest["mask_token_id"] and mask < manifest["vocab_size"]:
        tokenizer = load_tokenizer(as_path(config.data) / "tokenizer")
        if mask in tokenizer.stops or mask not in tokenizer.added_tokens_decoder:
            name = tokenizer.convert_ids_to_tokens(mask)
            warn(console, f"mask token {mask} is {name!r}, which texts may hold; choose one of no text")


def _decode_measure(config: Train, drafter: ResolvedDrafter, target: Target, target_params, manifest: dict, mesh):
    """state → tau of real decoding on held-out prompts; None if it is not asked for."""
    if not config.train.decode_every:
        return None
    files = config.train.decode_files or [str(as_path(config.data) / name) for name in manifest["prompts"].values()]
    if not files:
        raise SpecaufError(
            "train.decode_every is set, but the dataset has no held-out prompts",
            "prompts to decode",
            "pass --train.decode-files FILE.jsonl, or set --train.decode-every 0",
        )
    tokenizer = with_template_args(load_tokenizer(as_path(config.data) / "tokenizer"), manifest["template_args"])
    share = -(-config.train.decode_prompts // len(files))
    prompts = [encode_first_turn(tokenizer, prompt) for file in files for prompt in read_prompts(file)[:share]]
    check_requests(prompts, target, config.train.decode_tokens)
    step, stops = target_step(target, drafter.target_layer_ids), stop_token_ids(tokenizer, config.target)
    decoding = Decoding(target_step=step, drafter=drafter, stop_tokens=stops)

    def measure(state) -> dict:
        params = jax.tree.map(lambda x: x.astype(config.train.dtype), state.params)
        done = generate(
            params,
            target_params,
            prompts,
            config=decoding,
            max_new_tokens=config.train.decode_tokens,
            batch_size=-(-_DECODED_TOGETHER // batch_shards(mesh)) * batch_shards(mesh),
            mesh=mesh,
        )
        return {"decode_tau": tau_micro([generation.accepted for generation in done])}

    return measure
