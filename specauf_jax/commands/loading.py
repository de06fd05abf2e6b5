"""Datasets and models from users' folders, checked against each other before the work begins."""

import dataclasses

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from specauf_jax.architecture import Target
from specauf_jax.config import Dtype
from specauf_jax.data.dataset import read_manifest
from specauf_jax.data.tokenizer import Tokenizer, eos_token_ids, load_tokenizer
from specauf_jax.decoding.state import Decoding
from specauf_jax.errors import SpecaufError
from specauf_jax.models.cpu import serving_params
from specauf_jax.models.resolve import fitted
from specauf_jax.models.target import TargetStep
from specauf_jax.models.weights import drafter_config, load_drafter, load_target, target_config
from specauf_jax.sharding import batch_shards


def read_data(folder, target: Target | None = None) -> dict:
    """The manifest of a prepared dataset, checked against the target's vocabulary."""
    manifest = read_manifest(folder)
    if target is not None and manifest["vocab_size"] > target.vocab_size:
        raise SpecaufError(
            f"{folder} has a vocabulary of {manifest['vocab_size']} tokens, the target one of {target.vocab_size}",
            "a dataset made with the target's tokenizer",
            "run `specauf prepare --tokenizer` with the target's folder",
        )
    if target is not None and manifest["sequence_length"] > target.context_length:
        raise SpecaufError(
            f"{folder} has rows of {manifest['sequence_length']} tokens",
            f"at most the target's {target.context_length} positions",
            "prepare shorter rows with --sequence-length",
        )
    return manifest


@dataclasses.dataclass(frozen=True)
class Models:
    """Target, drafter (or None) and tokenizer, loaded over a mesh in serving form and checked against each other."""

    mesh: jax.sharding.Mesh
    target_params: dict
    drafter_params: dict | None
    tokenizer: Tokenizer
    decoding: Decoding
    """With the drafter, if there is one."""
    autoregressive: Decoding
    max_positions: int

    def check_room(self, requests, max_new_tokens: int) -> None:
        """Every request and its continuation must fit the target's positions."""
        longest = max(map(len, requests), default=0)
        if longest + max_new_tokens > self.max_positions:
            raise SpecaufError(
                f"a prompt of {longest} tokens and {max_new_tokens} new ones",
                f"together at most the target's {self.max_positions} positions",
                "shorten the prompt or lower --max-new-tokens",
            )


def load_target_with_bar(folder, dtype: Dtype, console: Console, mesh=None) -> tuple[dict, Target]:
    """`load_target` with a progress bar on a terminal."""
    columns = TextColumn("reading {task.description}"), BarColumn(bar_width=24), TaskProgressColumn()
    with Progress(
        *columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(str(folder), total=None)
        return load_target(folder, dtype, mesh, lambda read, total: bar.update(task, completed=read, total=total))


def check_rows(batch_size: int, mesh) -> None:
    """Rows that decode together must spread evenly over the mesh's batch axes."""
    if batch_size % batch_shards(mesh):
        raise SpecaufError(
            f"batch_size {batch_size} over {batch_shards(mesh)} parts of the mesh (replica × fsdp)",
            f"a multiple of {batch_shards(mesh)}",
            "change --batch-size, or take --mesh.tensor for a target that should be spread and few rows",
        )


def load_models(target: str, drafter: str | None, dtype: Dtype, mesh, console: Console) -> Models:
    """Everything that decoding needs, from folders; what does not fit is refused before the target is read."""
    tokenizer, config = load_tokenizer(target), target_config(target)
    resolved = None if drafter is None else fitted(drafter_config(drafter), config)
    layer_ids = resolved.target_layer_ids if resolved else (config.num_hidden_layers - 1,)
    target_params = serving_params(load_target_with_bar(target, dtype, console, mesh)[0])
    drafter_params = None if drafter is None else serving_params(load_drafter(drafter, dtype, mesh)[0])
    autoregressive = Decoding(target_step=TargetStep(config, layer_ids), stop_tokens=eos_token_ids(tokenizer))
    decoding = dataclasses.replace(autoregressive, drafter=resolved)
    return Models(mesh, target_params, drafter_params, tokenizer, decoding, autoregressive, config.context_length)
