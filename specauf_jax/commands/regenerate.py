"""`specauf regenerate`: a dataset whose supervised tokens are the target's own."""

import contextlib
import dataclasses
import hashlib
import io
import json
import zipfile

import numpy as np
from rich.console import Console
from rich.progress import Progress

from specauf_jax.checks import template_arguments
from specauf_jax.commands.loading import check_rows, load_decoding, read_data
from specauf_jax.commands.record import announce
from specauf_jax.commands.regenerate_settings import Regenerate
from specauf_jax.data.dataset import open_dataset, write_dataset, write_manifest
from specauf_jax.data.packing import Document, pack, unpack
from specauf_jax.data.tokenizer import copy_tokenizer, load_tokenizer, stop_token_ids
from specauf_jax.decoding.generate import Dialogue, converse
from specauf_jax.decoding.rows import Request
from specauf_jax.decoding.state import Decoding
from specauf_jax.distributed import from_primary, is_primary
from specauf_jax.environment import float32_precision
from specauf_jax.errors import SpecaufError
from specauf_jax.files import (
    AnyPath,
    absolute,
    as_path,
    check_absent,
    fresh_folder,
    local_copy,
    read_bytes,
    read_json,
    remove_folder,
    sole_user,
    write_bytes,
    write_text,
)
from specauf_jax.models.weights import target_config, weights_digest
from specauf_jax.sharding import make_mesh

_BATCHES_PER_PART = 2  # finished work is saved this often
_FREE = ("mesh", "hosts", "out")  # settings that change no answer


def regenerate(config: Regenerate, console: Console) -> dict:
    """Write `config.out`; returns its manifest. A killed run goes on where it stopped.

    Several processes decode the same batches together; the first one writes, the others return {}.
    """
    check_absent(config.out)
    data, out = as_path(config.data), absolute(config.out)
    parts = out.with_name(f"{out.name}.parts")
    target = target_config(config.target)
    manifest = read_data(data, target, config.target)
    if config.max_new_tokens > manifest["sequence_length"]:
        raise SpecaufError(
            f"max_new_tokens {config.max_new_tokens} for rows of {manifest['sequence_length']} tokens",
            "answers that a row can hold",
            "lower --max-new-tokens",
        )
    if config.template_args and template_arguments(config.template_args) != manifest["template_args"]:
        raise SpecaufError(
            f"{config.data} was prepared with template arguments {manifest['template_args']}",
            f"those given: {' '.join(config.template_args)}",
            "run `specauf prepare` with these --template-args",
        )
    mesh = make_mesh(config.mesh)
    check_rows(config.batch_size, mesh)
    announce(config.out, mesh, console)
    stops = stop_token_ids(load_tokenizer(data / "tokenizer"), config.target)
    params, decoding = load_decoding(config.target, config.drafter, config.dtype, mesh, console, stops)
    documents = _chosen(data, config.documents)
    if not any(_pieces(document, config.prompt_length) for document in documents):
        raise SpecaufError(
            f"none of {len(documents)} documents has anything to answer",
            f"an unsupervised prefix, or more than prompt_length = {config.prompt_length} tokens",
            "lower --prompt-length",
        )
    with sole_user(parts) if is_primary() else contextlib.nullcontext(), float32_precision(config.dtype):
        dialogues = {
            number: _answered(document, number, stops, config, manifest["sequence_length"])
            for number, document in enumerate(documents)
        }
        answered = _answer_all(dialogues, documents, params, decoding, config, parts, mesh, console)
        if not is_primary():
            return {}
        written = _assemble(config, manifest, answered, stops)
        remove_folder(parts)
    dropped = len(documents) - written["documents"]
    console.print(
        f"{written['documents']} documents ({dropped} more had nothing to answer, or no room), "
        f"{written['truncated_documents']} of them cut before their answer ended, "
        f"{written['supervised_tokens']} supervised tokens of the target's own written to {config.out}",
        highlight=False,
    )
    return written


def _answer_all(
    dialogues: dict, documents: list[Document], params, decoding: Decoding, config: Regenerate, parts: AnyPath, mesh,
    console: Console,
) -> list[Document]:  # fmt: skip
    """Answered documents. Those that are done are saved from time to time, and those of a killed run are read."""
    there: dict[int, Document] = {}
    if is_primary():
        _begin(parts, config, documents)
        for path in sorted(parts.glob("*.npz")):
            there |= _load(path)
    finished = from_primary(np.asarray([number in there for number in dialogues]))
    open_ = {number: dialogue for number, dialogue in dialogues.items() if not finished[number]}
    options = {"config": decoding, "seed": config.seed, "batch_size": config.batch_size, "mesh": mesh}
    new: dict[int, Document] = {}
    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("regenerating", total=len(dialogues), completed=len(dialogues) - len(open_))
        for number, document in converse(params[0], params[1], open_, **options):
            new[number] = document
            bar.advance(task)
            if is_primary() and (len(new) == config.batch_size * _BATCHES_PER_PART or bar.finished):
                _save(parts / f"{min(new)}.npz", new)
                there |= new
                new = {}
    return [there[number] for number in sorted(there) if there[number].loss_mask.any()]


def _chosen(data: AnyPath, count: int) -> list[Document]:
    """All documents, or `count` of them spread evenly."""
    rows = open_dataset(data)
    documents = [document for i in range(len(rows)) for document in unpack(rows[i])]
    if not count or count >= len(documents):
        return documents
    return [documents[i] for i in np.linspace(0, len(documents) - 1, count).astype(int)]


def _answered(document: Document, number: int, stops, config: Regenerate, length: int) -> Dialogue[Document]:
    """The document with every supervised run of tokens replaced, in order; each answer sees the answers before it.

    It ends before a turn that does not fit the row, and after an answer that did not end by itself.
    """
    tokens: list[int] = []
    mask: list[bool] = []
    for piece in _pieces(document, config.prompt_length):
        if len(tokens) + len(piece) >= length:
            break
        tokens, mask = [*tokens, *piece.tolist()], [*mask, *[False] * len(piece)]
        room = min(config.max_new_tokens, length - len(tokens))
        answer = yield Request(tokens, number, room, config.sampling)
        tokens, mask = [*tokens, *answer.tokens], [*mask, *[True] * len(answer.tokens)]
        if tokens[-1] not in stops:
            break
    return Document(np.asarray(tokens, np.int32), np.asarray(mask, bool))


def _pieces(document: Document, prompt_length: int) -> list[np.ndarray]:
    """What is kept before each answer: the unsupervised runs, or a text's first `prompt_length` tokens."""
    if document.loss_mask.all():
        return [document.tokens[:prompt_length]] if len(document.tokens) > prompt_length else []
    edges = np.flatnonzero(np.diff(document.loss_mask.astype(int), prepend=0, append=0))
    kept, start = [], 0
    for begin, end in edges.reshape(-1, 2):
        if begin > 0:  # what opens a document has no prompt: it stays
            kept.append(document.tokens[start:begin])
            start = end
    return kept


def _begin(parts: AnyPath, config: Regenerate, documents: list[Document]) -> None:
    """Make the folder of finished parts, or check that those there are of the same data and settings."""
    settings = json.loads(json.dumps(dataclasses.asdict(config)))
    settings = {name: value for name, value in settings.items() if name not in _FREE}
    settings |= {"data": _digest(documents), "target": weights_digest(config.target)}
    if not (parts / "settings.json").exists() and parts.exists() and any(parts.iterdir()):
        raise SpecaufError(f"{parts} holds something else", "the parts of an interrupted regeneration, or nothing",
                           f"move it away, or choose another --out than {config.out}")  # fmt: skip
    if (parts / "settings.json").exists():
        found = read_json(parts / "settings.json", "the settings of an interrupted regeneration")
        if found != settings:
            differing = sorted(key for key in settings if found.get(key) != settings[key])
            raise SpecaufError(
                f"{parts} holds parts made with another {', '.join(differing)}",
                "the same settings",
                f"restore them, or delete {parts}",
            )
    write_text(parts / "settings.json", json.dumps(settings, indent=2) + "\n")


def _digest(documents: list[Document]) -> str:
    """SHA-256 of all tokens and loss masks."""
    digest = hashlib.sha256()
    for document in documents:
        for array in (document.tokens, document.loss_mask):
            digest.update(len(array).to_bytes(8, "little") + array.tobytes())
    return digest.hexdigest()


def _save(path: AnyPath, documents: dict[int, Document]) -> None:
    content = io.BytesIO()
    np.savez(
        content,
        numbers=np.asarray(list(documents), np.int64),
        lengths=np.asarray([len(d.tokens) for d in documents.values()], np.int64),
        tokens=np.concatenate([d.tokens for d in documents.values()]),
        loss_mask=np.concatenate([d.loss_mask for d in documents.values()]),
    )
    write_bytes(path, content.getvalue())


def _load(path: AnyPath) -> dict[int, Document]:
    try:
        with np.load(io.BytesIO(read_bytes(path))) as arrays:
            numbers, ends = arrays["numbers"].tolist(), np.cumsum(arrays["lengths"])[:-1]
            tokens, masks = (np.split(arrays[name], ends) for name in ("tokens", "loss_mask"))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise SpecaufError(
            f"{path} cannot be read: {error}", "a whole part", f"delete {path}, then run the command again"
        ) from error
    return {number: Document(t, m) for number, t, m in zip(numbers, tokens, masks, strict=True)}


def _assemble(config: Regenerate, manifest: dict, documents: list[Document], stops: tuple[int, ...]) -> dict:
    with fresh_folder(config.out) as folder:
        tokens = sum(len(d.tokens) for d in documents)
        supervised = sum(int(d.loss_mask.sum()) for d in documents)
        rows = write_dataset(pack(documents, manifest["sequence_length"]), folder, manifest["sequence_length"])
        data = local_copy(config.data)
        copy_tokenizer(data / "tokenizer", folder / "tokenizer")
        for name in manifest["prompts"].values():
            write_bytes(folder / name, (data / name).read_bytes())
        manifest = manifest | {
            "rows": rows,
            "documents": len(documents),
            "tokens": tokens,
            "supervised_tokens": supervised,
            "supervised_share": supervised / tokens,
            "truncated_documents": sum(int(d.tokens[-1]) not in stops for d in documents),
            "largest_token_id": max(int(d.tokens.max()) for d in documents),
            "source": f"answers of {config.target} to {manifest['source']}",
        }
        write_manifest(folder, manifest)
    return manifest
