"""Datasets and models from users' folders, checked against each other before the work begins."""

import dataclasses

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from specauf_jax.architecture import Drafter, ResolvedDrafter, Target
from specauf_jax.checks import template_arguments
from specauf_jax.commands.train_settings import Train
from specauf_jax.config import Dtype, VerifySlots
from specauf_jax.data.chat import clock_notes
from specauf_jax.data.dataset import read_manifest
from specauf_jax.data.tokenizer import Tokenizer, differing, hashes, load_tokenizer, with_template_args
from specauf_jax.decoding.state import Decoding
from specauf_jax.distributed import from_primary
from specauf_jax.errors import SpecaufError
from specauf_jax.evaluation.prompts import Prompt, encode_first_turn
from specauf_jax.evaluation.timing import fastest_width
from specauf_jax.files import as_path, existing_folder, read_json
from specauf_jax.models.cpu import serving_params
from specauf_jax.models.heads import head_settings, make_head
from specauf_jax.models.resolve import fitted, resolve_drafter
from specauf_jax.models.target import target_step
from specauf_jax.models.weights import drafter_config, load_drafter, load_target, target_config
from specauf_jax.sharding import batch_shards


def read_data(folder, target: Target | None = None, target_folder=None) -> dict:
    """The manifest of a prepared dataset, checked against the target: its tokenizer, vocabulary and positions."""
    manifest = read_manifest(folder)
    if target is None:
        return manifest
    _check_tokenizer(folder, manifest, target_folder)
    largest = manifest["largest_token_id"]
    largest = manifest["vocab_size"] - 1 if largest is None else largest
    if largest >= target.vocab_size:
        raise SpecaufError(
            f"{folder} holds token {largest}, the target has {target.vocab_size} of them",
            "a dataset made with the target's tokenizer",
            "run `specauf prepare --tokenizer` with the target's folder",
        )
    if manifest["sequence_length"] > target.context_length:
        raise SpecaufError(
            f"{folder} has rows of {manifest['sequence_length']} tokens",
            f"at most the target's {target.context_length} positions",
            "prepare shorter rows with --sequence-length",
        )
    return manifest


def _check_tokenizer(folder, manifest: dict, target) -> None:
    """Refuse data of another tokenizer than the target's; of another chat template, if it holds conversations."""
    if not (as_path(target) / "tokenizer.json").is_file():
        return  # nothing to compare with
    if hashes(target) == (manifest["tokenizer_sha256"], manifest["template_sha256"]):
        return
    found = differing(as_path(folder) / "tokenizer", target)
    if found == "tokenizer" or (found and manifest["supervised_share"] < 1):
        raise SpecaufError(
            f"{folder} was made with another {found} than that of {target}",
            "the target's own, so that drafters see what the target will see",
            "run `specauf prepare --tokenizer` with the target's folder, after correcting what is wrong in it",
        )


def read_origin(drafter) -> dict:
    """What a drafter of ours says of its training; nothing for those of others."""
    provenance = existing_folder(drafter, "a drafter") / "specauf.json"
    return read_json(provenance, "a drafter's origin") if provenance.is_file() else {}


def with_arguments(tokenizer: Tokenizer, given: tuple[str, ...], origin: dict, console: Console) -> Tokenizer:
    """The tokenizer with the chat template's arguments: those given, else those of the drafter's training."""
    trained, asked = origin.get("template_args") or {}, template_arguments(given)
    if given:
        if origin and asked != trained:
            warn(console, f"the drafter was trained with template arguments {trained}, not {asked}")
        return with_template_args(tokenizer, asked)
    try:
        return with_template_args(tokenizer, trained)
    except SpecaufError as error:
        warn(console, f"the drafter was trained with {error.found}")
        return tokenizer


def warn(console: Console, text: str) -> None:
    """Print a warning."""
    console.print(f"warning: {text}", style="yellow", markup=False, highlight=False)


def check_requests(requests, target: Target, max_new_tokens: int) -> None:
    """Every request and its continuation must fit the target's positions, and hold only tokens that it embeds."""
    longest, largest = max(map(len, requests), default=0), max((max(ids, default=0) for ids in requests), default=0)
    if longest + max_new_tokens > target.context_length:
        raise SpecaufError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones",
            f"together at most the target's {target.context_length} positions",
            "shorten the prompt or lower --max-new-tokens",
        )
    if largest >= target.vocab_size:
        raise SpecaufError(
            f"a prompt holds token {largest} of the tokenizer, the target has {target.vocab_size} of them",
            "tokens that the target embeds",
            "take the added token out of the prompt",
        )


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
    target: Target

    def tell_clock(self, prompts: list[Prompt], console: Console) -> None:
        """Warn if conversations among the prompts are rendered with the date of today."""
        for note in clock_notes(self.tokenizer) if any(prompt.turns for prompt in prompts) else []:
            warn(console, note)

    def with_drafts(
        self,
        slots: VerifySlots,
        nodes: int | None,
        heat: float,
        prompts: list[Prompt],
        batch_size: int,
        max_new_tokens: int,
        console: Console,
    ) -> "Models":
        """With the drafts that --verify-slots and the flags of trees ask for; `auto` measures on first turns."""
        requests = [encode_first_turn(self.tokenizer, prompt) for prompt in prompts] if slots == "auto" else []
        self.check_room(requests, max_new_tokens)
        params = self.drafter_params, self.target_params
        decoding = with_drafts(
            self.decoding, slots, nodes, heat, params, requests, batch_size=batch_size, mesh=self.mesh, console=console
        )
        return dataclasses.replace(self, decoding=decoding)

    def check_room(self, requests, max_new_tokens: int) -> None:
        """As `check_requests`."""
        check_requests(requests, self.target, max_new_tokens)


def load_target_with_bar(folder, dtype: Dtype, console: Console, mesh=None) -> tuple[dict, Target]:
    """`load_target` with a progress bar on a terminal."""
    columns = TextColumn("reading {task.description}", markup=False), BarColumn(bar_width=24), TaskProgressColumn()
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


def load_models(
    target: str, drafter: str | None, dtype: Dtype, mesh, console: Console, template_args: tuple[str, ...] = ()
) -> Models:
    """Everything that decoding needs, from folders; what does not fit is refused before the target is read."""
    origin = {} if drafter is None else read_origin(drafter)
    tokenizer, config = with_arguments(load_tokenizer(target), template_args, origin, console), target_config(target)
    if "tokenizer_sha256" in origin and origin["tokenizer_sha256"] != hashes(target)[0]:
        warn(console, f"{drafter} was trained with another tokenizer file than that of {target}")
    (drafter_params, target_params), decoding = load_decoding(target, drafter, dtype, mesh, console, tokenizer.stops)
    autoregressive = dataclasses.replace(decoding, drafter=None)
    return Models(mesh, target_params, drafter_params, tokenizer, decoding, autoregressive, config)


def with_drafts(
    decoding: Decoding,
    slots: VerifySlots,
    nodes: int | None,
    heat: float,
    params,
    requests,
    *,
    batch_size: int,
    mesh,
    console: Console,
) -> Decoding:
    """`decoding` with the number of verified tokens, or the tree, that the flags ask for.

    Args:
      slots, nodes, heat: --verify-slots, --tree-nodes, --tree-temperature.
      params: the drafter's and the target's.
      requests: token ids, some of which are decoded to see what is fastest.
      Others as for `generate`.
    """
    if slots == "auto":
        found = fastest_width(params[0], params[1], requests, config=decoding, batch_size=batch_size, mesh=mesh)
        slots = int(from_primary(np.asarray(found[0].slots)))
        console.print(f"verifies {slots} of {decoding.block_size} slots, the fastest here", highlight=False)
    return dataclasses.replace(decoding, verify_slots=slots, tree_nodes=nodes, tree_temperature=heat)


def load_decoding(target: str, drafter: str | None, dtype: Dtype, mesh, console: Console, stops: tuple[int, ...]):
    """(drafter's parameters or None, the target's), in serving form, and how they decode."""
    config = target_config(target)
    resolved = None if drafter is None else fitted(drafter_config(drafter), config)
    layer_ids = resolved.target_layer_ids if resolved else (config.num_hidden_layers - 1,)
    target_params = serving_params(load_target_with_bar(target, dtype, console, mesh)[0])
    drafter_params = None if drafter is None else serving_params(load_drafter(drafter, dtype, mesh)[0])
    decoding = Decoding(target_step=target_step(config, layer_ids), drafter=resolved, stop_tokens=stops)
    return (drafter_params, target_params), decoding


def drafter_to_train(config: Train, target: Target, mask: int | None) -> ResolvedDrafter:
    """The resolved architecture: of --drafter, or of the folder to start from; a plain body may get a head."""
    if config.init_from is None:
        return resolve_drafter(config.drafter, target, mask)
    found, plain = fitted(drafter_config(config.init_from), target), Drafter.projector_type
    if found.head.projector_type == plain != config.drafter.projector_type:
        head = make_head(config.drafter.projector_type, config.drafter.head)
        found = dataclasses.replace(found, head=type(head)(**head_settings(head) | head_settings(found.head)))
    for name, asked in _asked(config.drafter, found).items():
        has = found.head.projector_type if name == "projector_type" else getattr(found, name, None)
        has = head_settings(found.head).get(name, has)
        if asked != has:
            raise SpecaufError(
                f"--drafter asks for {name} {asked!r}, but {config.init_from} was trained with {has!r}",
                "the conventions of the drafter that training starts from",
                f"leave {name} out, or start from random weights without --init-from",
            )
    if mask is not None and mask != found.mask_token_id and config.drafter.mask_token_id is None:
        raise SpecaufError(
            f"{config.init_from} was trained with mask token {found.mask_token_id}, the dataset's tokenizer has {mask}",
            "one mask token",
            f"pass --drafter.mask-token-id {found.mask_token_id} if the drafter's is right",
        )
    return found


def _asked(drafter: Drafter, found: ResolvedDrafter) -> dict:
    """Settings that are not the defaults, those of the head among them."""
    asked = {field.name: getattr(drafter, field.name) for field in dataclasses.fields(drafter)
             if getattr(drafter, field.name) != field.default and field.name != "head"}  # fmt: skip
    named = {setting.partition("=")[0] for setting in drafter.head}
    settings = head_settings(make_head(asked.get("projector_type", found.head.projector_type), drafter.head))
    return asked | {name: settings[name] for name in named}
