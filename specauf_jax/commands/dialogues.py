"""Many dialogues with the target, saved as they end beside the folder to be written: a killed run goes on there."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from rich.console import Console
from rich.progress import Progress

from specauf_jax.data.dataset import write_dataset
from specauf_jax.data.packing import Document, pack
from specauf_jax.decoding.generate import Dialogue, converse
from specauf_jax.distributed import from_primary, is_primary
from specauf_jax.errors import SpecaufError
from specauf_jax.files import AnyPath, absolute, parse_json, read_bytes, read_json, remove_folder, sole_user, write_text

_FREE = ("mesh", "hosts", "out")  # settings that change no answer
_SAVED_TOGETHER = 2  # batches' worth of dialogues


@dataclass
class Talk:
    """What came of a dialogue."""

    tokens: list[int]
    answers: list[tuple[int, int]] = field(default_factory=list)
    """First and last + 1 token of each of the target's own, which are supervised."""
    messages: list[dict] = field(default_factory=list)
    dropped: str | None = None
    """Why it cannot be used."""

    @property
    def document(self) -> Document:
        mask = np.zeros(len(self.tokens), bool)
        for begin, end in self.answers:
            mask[begin:end] = True
        return Document(np.asarray(self.tokens, np.int32), mask)


@contextlib.contextmanager
def parts_folder(config, what: str, **inputs: str) -> Iterator[AnyPath]:
    """The folder of parts beside `config.out`, of this process alone; gone when all went well.

    Args:
      config: the command's; its `out` is to be written.
      what: "regeneration", for messages.
      inputs: digests of what the answers depend on beside the settings.

    Raises:
      SpecaufError: it holds something else, or parts made with other settings.
    """
    out = absolute(config.out)
    parts = out.with_name(f"{out.name}.parts")
    if not is_primary():
        yield parts
        return
    settings = json.loads(json.dumps(dataclasses.asdict(config)))
    settings = {name: value for name, value in settings.items() if name not in _FREE} | inputs
    with sole_user(parts):
        if not (parts / "settings.json").exists() and parts.exists() and any(parts.iterdir()):
            raise SpecaufError(f"{parts} holds something else", f"the parts of an interrupted {what}, or nothing",
                               f"move it away, or choose another --out than {config.out}")  # fmt: skip
        if (parts / "settings.json").exists():
            found = read_json(parts / "settings.json", f"the settings of an interrupted {what}")
            if found != settings:
                differing = sorted(key for key in settings if found.get(key) != settings[key])
                raise SpecaufError(
                    f"{parts} holds parts made with another {', '.join(differing)}",
                    "the same settings",
                    f"restore them, or delete {parts}",
                )
        write_text(parts / "settings.json", json.dumps(settings, indent=2) + "\n")
        yield parts
        remove_folder(parts)


def hold(
    dialogues: Mapping[int, Dialogue[Talk]], parts: AnyPath, params, doing: str, console: Console, **options
) -> dict[int, Talk]:
    """Hold all dialogues, but those that an interrupted run has ended.

    Args:
      dialogues: by number.
      parts: of `parts_folder`.
      params: the drafter's and the target's.
      doing: for the progress bar.
      options: of `converse`.

    Returns:
      Talks by number; {} in all processes but the first.
    """
    there: dict[int, Talk] = {}
    for path in sorted(parts.glob("*.json")) if is_primary() else []:
        if path.name != "settings.json":
            there |= load(path)
    finished = from_primary(np.asarray([number in there for number in dialogues], bool))
    open_ = {number: dialogue for (number, dialogue), done in zip(dialogues.items(), finished, strict=True) if not done}
    new: dict[int, Talk] = {}
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(doing, total=len(dialogues), completed=len(dialogues) - len(open_))
        for number, talk in converse(params[0], params[1], open_, **options):
            new[number] = talk
            bar.advance(task)
            if is_primary() and (len(new) >= _SAVED_TOGETHER * options["batch_size"] or bar.finished):
                save(parts / f"{min(new)}.json", new)
                there |= new
                new = {}
    return {number: there[number] for number in dialogues if number in there}


def save(path: AnyPath, talks: dict[int, Talk]) -> None:
    """Write a part."""
    write_text(path, json.dumps({number: dataclasses.asdict(talk) for number, talk in talks.items()}) + "\n")


def load(path: AnyPath) -> dict[int, Talk]:
    """Read a part.

    Raises:
      SpecaufError: it is damaged.
    """
    try:
        held = parse_json(read_bytes(path))
        return {int(number): Talk(**talk) for number, talk in held.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise SpecaufError(
            f"{path} cannot be read: {error}", "a whole part", f"delete {path}, then run the command again"
        ) from error


def write_documents(documents: list[Document], folder, sequence_length: int, stops: tuple[int, ...]) -> dict:
    """Write `folder`/dataset/; returns the manifest's counts."""
    tokens, supervised = (sum(len(d.tokens) for d in documents), sum(int(d.loss_mask.sum()) for d in documents))
    return {
        "rows": write_dataset(pack(documents, sequence_length), folder, sequence_length),
        "documents": len(documents),
        "tokens": tokens,
        "supervised_tokens": supervised,
        "supervised_share": supervised / tokens,
        "truncated_documents": sum(int(d.tokens[-1]) not in stops for d in documents),
        "largest_token_id": max(int(d.tokens.max()) for d in documents),
    }
