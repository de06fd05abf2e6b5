"""`specauf train`: a DFlash or Domino drafter against a frozen target."""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np
from rich.console import Console

from specauf_jax.architecture import Drafter, Target, resolve_drafter
from specauf_jax.commands.loading import load_target_with_bar, read_data
from specauf_jax.commands.record import announce, run_record
from specauf_jax.commands.train_settings import Train
from specauf_jax.data.dataset import open_dataset
from specauf_jax.data.loader import make_loader
from specauf_jax.data.tokenizer import eos_token_ids, load_tokenizer
from specauf_jax.decoding.generate import generate
from specauf_jax.decoding.state import Decoding
from specauf_jax.environment import float32_precision
from specauf_jax.errors import SpecaufError
from specauf_jax.evaluation.measure import tau_micro
from specauf_jax.evaluation.prompts import encode_first_turn, read_prompts
from specauf_jax.files import as_path
from specauf_jax.flops import needed_flops, step_flops
from specauf_jax.models.drafter import init_drafter
from specauf_jax.models.target import TargetStep, target_shapes
from specauf_jax.models.weights import drafter_config, load_drafter, save_drafter, target_config
from specauf_jax.sharding import (
    batch_sharding,
    batch_shards,
    check_batch,
    local_rows,
    make_mesh,
    parameter_sharding,
    placed,
    replicated,
)
from specauf_jax.training.blocks import eligible_anchors
from specauf_jax.training.loop import Run, train_loop
from specauf_jax.training.loss import LossConfig
from specauf_jax.training.step import TrainState, init_state, lambda_base_schedule, make_optimizer, make_train_step

_DECODED_TOGETHER = 16  # prompts of the decode measure; more where the mesh spreads rows wider
_ROWS_LOOKED_AT = 64  # rows of a dataset that are searched for an anchor before training starts


def train(config: Train, console: Console) -> None:
    """Train, then write `out/drafter` in z-lab layout."""
    data, out = as_path(config.data), as_path(config.out)
    target = target_config(config.target)
    manifest = read_data(data, target)
    drafter = _drafter(config, target, manifest)
    config = with_anchors(config, drafter)
    _check_rows(config, drafter, manifest)
    mesh = make_mesh(config.mesh)
    check_batch(config.train.batch_size, config.train.accumulation, mesh)
    with float32_precision(config.train.dtype):
        record = run_record(config, manifest, drafter=dataclasses.asdict(drafter))
        run = make_run(config, drafter, target, manifest, mesh, record, console)
        state = train_loop(run, console)
    save_drafter(state.params, drafter, out / "drafter", provenance=provenance(record, config.train.steps))
    console.print(f"drafter written to {out / 'drafter'}", highlight=False)


@dataclasses.dataclass(frozen=True)
class PlacedStep:
    """The jitted step of a training run, with the shapes and shardings of what it takes."""

    loss: LossConfig
    jitted: Callable  # (state, target_params, batch) -> (state, metrics)
    random_state: Callable[[], TrainState]
    state: TrainState
    target_params: dict
    rows: jax.sharding.Sharding


def make_placed_step(config: Train, drafter: Drafter, target: Target, mesh: jax.sharding.Mesh) -> PlacedStep:
    """The step that `specauf train` runs; nothing is computed or placed yet. To be called with `mesh` in use."""
    settings = config.train
    loss = LossConfig(
        drafter=drafter,
        objective=config.objective,
        base_objective=config.base_objective,
        num_anchors=settings.num_anchors,
        slot_chunk=settings.slot_chunk,
        head_slots=settings.head_slots,
        dtype=settings.dtype,
        remat=settings.remat,
    )
    optimizer = make_optimizer(settings)

    def random_state():
        return init_state(init_drafter(drafter, jax.random.key(settings.seed)), optimizer)

    step = make_train_step(
        loss,
        target,
        optimizer,
        accumulation=settings.accumulation,
        seed=settings.seed,
        lambda_base=lambda_base_schedule(settings),
    )
    state = jax.eval_shape(random_state)
    target_params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, settings.dtype), target_shapes(target))
    state, target_params = (placed(tree, parameter_sharding(tree, mesh)) for tree in (state, target_params))
    rows = batch_sharding(mesh)
    jitted = jax.jit(
        step,
        in_shardings=(*map(_shardings, (state, target_params)), rows),
        out_shardings=(_shardings(state), replicated(mesh)),
        donate_argnums=0,
    )
    return PlacedStep(loss, jitted, random_state, state, target_params, rows)


def make_run(config: Train, drafter: Drafter, target: Target, manifest: dict, mesh, record, console: Console) -> Run:
    """Parameters, jitted step and data of a training run, spread over the mesh."""
    settings = config.train
    placed_step = make_placed_step(config, drafter, target, mesh)
    parts = step_flops(
        drafter,
        target,
        rows=settings.batch_size,
        sequence_length=manifest["sequence_length"],
        num_anchors=settings.num_anchors,
    )
    target_params, _ = load_target_with_bar(config.target, settings.dtype, console, mesh)

    def step(state, batch):
        with jax.set_mesh(mesh):  # for `spread_rows`
            return placed_step.jitted(state, target_params, batch)

    def initialise():
        sharding = _shardings(placed_step.state)
        if config.init_from is None:
            return jax.jit(placed_step.random_state, out_shardings=sharding)()
        params, _ = load_drafter(config.init_from, mesh=mesh)
        return jax.jit(lambda params: init_state(params, make_optimizer(settings)), out_shardings=sharding)(params)

    return Run(
        out=as_path(config.out),
        train=settings,
        hosts=config.hosts,
        flops=lambda means: needed_flops(parts, means["active_ratio"] if placed_step.loss.support_top_n else 1.0),
        config=record,
        environment=announce(as_path(config.out), mesh, console),
        step=step,
        loader=make_loader(
            config.data,
            settings.batch_size,
            settings.seed,
            rows=local_rows(placed_step.rows, settings.batch_size),
        ),
        initialise=initialise,
        like=placed_step.state,
        batch_sharding=placed_step.rows,
        score="decode_tau" if settings.decode_every else "tau",
        shown=("tau", "loss"),
        measure=_decode_measure(config, drafter, target, target_params, manifest, mesh),
        measure_every=settings.decode_every,
    )


def with_anchors(config: Train, drafter: Drafter) -> Train:
    """num_anchors in place of None: 512, for Domino 256."""
    if config.train.num_anchors is not None:
        return config
    anchors = 512 if drafter.projector_type == "dflash" else 256
    return dataclasses.replace(config, train=dataclasses.replace(config.train, num_anchors=anchors))


def provenance(record: dict, step: int) -> dict:
    """Where a drafter came from, for people and for checks; stored beside its weights."""
    drafter = Drafter(**{name: record["drafter"][name] for name in ("projector_type", "shift_label")})
    if drafter.shift_label:
        labels = "slot k predicts the token k + 1 after the anchor; every slot is trained"
    else:
        labels = "slot k predicts the token k after the anchor; slot 0 is not trained"
    domino = {"base_objective": record["base_objective"]} if drafter.projector_type == "domino" else {}
    return domino | {
        "objective": record["objective"],
        "init_from": record["init_from"],
        "steps": step,
        "seed": record["train"]["seed"],
        "target": record["target"],
        "data": record["data"],
        "tokenizer_sha256": record["tokenizer_sha256"],
        "template_sha256": record["template_sha256"],
        "labels": labels,
        "target_layer_ids": "0-based; id i is the residual output of layer i",
    }


def _shardings(tree):
    return jax.tree.map(lambda x: x.sharding, tree)


def _drafter(config: Train, target: Target, manifest: dict) -> Drafter:
    """The resolved architecture: of --drafter, or of the folder that training starts from."""
    if config.init_from is None:
        return resolve_drafter(config.drafter, target, manifest["mask_token_id"])
    found = resolve_drafter(drafter_config(config.init_from), target)
    for field in dataclasses.fields(Drafter):
        asked, has = getattr(config.drafter, field.name), getattr(found, field.name)
        if asked != field.default and asked != has:
            raise SpecaufError(
                f"--drafter.{field.name} {asked!r}, but {config.init_from} was trained with {has!r}",
                "the conventions of the drafter that training starts from",
                f"leave {field.name} out, or start from random weights without --init-from",
            )
    mask = manifest["mask_token_id"]
    if mask is not None and mask != found.mask_token_id and config.drafter.mask_token_id is None:
        raise SpecaufError(
            f"{config.init_from} was trained with mask token {found.mask_token_id}, the dataset's tokenizer has {mask}",
            "one mask token",
            f"pass --drafter.mask-token-id {found.mask_token_id} if the drafter's is right",
        )
    return found


def _check_rows(config: Train, drafter: Drafter, manifest: dict) -> None:
    S = manifest["sequence_length"]
    if drafter.block_size > S:
        raise SpecaufError(
            f"block_size {drafter.block_size} in rows of {S} tokens",
            "a block that fits a row",
            "lower --drafter.block-size or prepare longer rows",
        )
    if config.train.num_anchors >= S:
        raise SpecaufError(
            f"num_anchors {config.train.num_anchors} in rows of {S} tokens",
            f"at most {S - 1}",
            "lower --train.num-anchors",
        )
    rows = open_dataset(config.data)
    looked_at = [rows[i] for i in np.linspace(0, len(rows) - 1, min(len(rows), _ROWS_LOOKED_AT)).astype(int)]
    masks, ids = (np.stack([row[name] for row in looked_at]) for name in ("loss_mask", "document_ids"))
    if not eligible_anchors(masks, ids).any():
        raise SpecaufError(
            f"{config.data}: no eligible anchor in {len(looked_at)} rows",
            "rows with two supervised tokens in succession",
            "check the dataset's loss mask",
        )


def _decode_measure(config: Train, drafter: Drafter, target: Target, target_params, manifest: dict, mesh):
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
    tokenizer = load_tokenizer(as_path(config.data) / "tokenizer")
    share = -(-config.train.decode_prompts // len(files))
    prompts = [encode_first_turn(tokenizer, prompt) for file in files for prompt in read_prompts(file)[:share]]
    step = TargetStep(target, drafter.target_layer_ids)
    decoding = Decoding(target_step=step, drafter=drafter, stop_tokens=eos_token_ids(tokenizer))

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
