"""`specauf pretrain`: a small target from a prepared dataset."""

import dataclasses

from rich.console import Console

from specauf_jax.checks import unused
from specauf_jax.commands.loading import read_data
from specauf_jax.commands.pretrain_settings import Pretrain
from specauf_jax.commands.record import announce, check_room, run_folder, run_record
from specauf_jax.data.loader import make_loader
from specauf_jax.data.tokenizer import copy_tokenizer
from specauf_jax.environment import float32_precision
from specauf_jax.files import AnyPath, as_path
from specauf_jax.flops import pretrain_flops
from specauf_jax.models.weights import save_target
from specauf_jax.sharding import check_batch, local_rows, make_mesh
from specauf_jax.training.loop import Run, train_loop
from specauf_jax.training.step import place_pretrain_step


def pretrain(config: Pretrain, console: Console) -> None:
    """Train, then write `out/target` in Hugging Face layout with the tokenizer."""
    with run_folder(config.out, "target", config.data) as out:
        _pretrain(config, out, console)


def _pretrain(config: Pretrain, out: AnyPath, console: Console) -> None:
    data, train = as_path(config.data), config.train
    manifest = read_data(data)
    if config.target.vocab_size != manifest["vocab_size"]:
        unused(config.target, "vocab_size", when=f"for a tokenizer of {manifest['vocab_size']} tokens")
    config = dataclasses.replace(config, target=dataclasses.replace(config.target, vocab_size=manifest["vocab_size"]))
    mesh = make_mesh(config.mesh)
    check_batch(train.batch_size, train.accumulation, mesh)
    placed = place_pretrain_step(config.target, train, mesh)
    check_room(out, placed.state, train.keep_last)
    parts = pretrain_flops(config.target, rows=train.batch_size, sequence_length=manifest["sequence_length"])
    with float32_precision(train.dtype):
        run = Run(
            out=out,
            train=train,
            hosts=config.hosts,
            flops=lambda *_: {"target": sum(parts.values())},
            config=run_record(config, manifest),
            environment=announce(out, mesh, console),
            step=lambda _, *arguments: placed.step(*arguments),
            loader=make_loader(
                data,
                train.batch_size,
                train.seed,
                rows=local_rows(placed.rows, train.batch_size),
            ),
            initialise=placed.initialise,
            like=placed.state,
            batch_sharding=placed.rows,
            score="-loss",
            shown=("loss", "accuracy"),
        )
        state = train_loop(run, console)
    save_target(state.params, config.target, out / "target", eos_token_id=manifest["eos_token_id"])
    copy_tokenizer(data / "tokenizer", out / "target")
    console.print(f"target written to {out / 'target'}", highlight=False)
