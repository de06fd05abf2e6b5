"""`specauf regenerate`: a dataset whose supervised tokens are the target's own."""

import contextlib
import dataclasses
import hashlib
import io
import json
import zipfile

import numpy as np
from rich.console import Console
from rich.progress import track

from specauf_jax.checks import template_arguments
from specauf_jax.commands.loading import check_rows, load_target_with_bar, read_data
from specauf_jax.commands.record import announce
from specauf_jax.commands.regenerate_settings import Regenerate
from specauf_jax.data.dataset import open_dataset, write_dataset, write_manifest
from specauf_jax.data.packing import Document, pack, unpack
from specauf_jax.data.tokenizer import copy_tokenizer, load_tokenizer, stop_token_ids
from specauf_jax.decoding.generate import generate
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
from specauf_jax.models.cpu import serving_params
from specauf_jax.models.target import TargetStep
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
    params = serving_params(load_target_with_bar(config.target, config.dtype, console, mesh)[0])
    stops = stop_token_ids(load_tokenizer(data / "tokenizer"), config.target)
    decoding = Decoding(target_step=TargetStep(target, (target.num_hidden_layers - 1,)), stop_tokens=stops)

    def respond(prompts, seed):
        return generate(
            None,
            params,
            prompts,
            config=decoding,
            max_new_tokens=config.max_new_tokens,
            sampling=config.sampling,
            seed=seed,
            batch_size=config.batch_size,
            mesh=mesh,
        )

    documents = _chosen(data, config.documents)
    if not any(_pieces(document, config.prompt_length) for document in documents):
        raise SpecaufError(
            f"none of {len(documents)} documents has anything to answer",
            f"an unsupervised prefix, or more than prompt_length = {config.prompt_length} tokens",
            "lower --prompt-length",
        )
    with sole_user(parts) if is_primary() else contextlib.nullcontext(), float32_precision(config.dtype):
        answered = _answer_all(documents, respond, stops, config, parts, manifest["sequence_length"], console)
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
    documents: list[Document], respond, stops, config: Regenerate, parts: AnyPath, length: int, console: Console
) -> list[list[Document]]:
    """Answered documents, part by part; each part is saved when it is done, and those of a killed run are read."""
    if is_primary():
        _begin(parts, config, documents)
    size = config.batch_size * _BATCHES_PER_PART
    chunks = [documents[i : i + size] for i in range(0, len(documents), size)]
    there = {path.name for path in parts.iterdir()} if is_primary() else set()
    finished = from_primary(np.asarray([f"{number}.npz" in there for number in range(len(chunks))]))
    for number, chunk in enumerate(track(chunks, "regenerating", console=console, disable=not console.is_terminal)):
        if not finished[number]:
            answered = _rewrite(chunk, respond, stops, config, length, number)
            if is_primary():
                _save(parts / f"{number}.npz", answered)
    return [_load(parts / f"{n}.npz") for n in range(len(chunks))] if is_primary() else []


def _chosen(data: AnyPath, count: int) -> list[Document]:
    """All documents, or `count` of them spread evenly."""
    rows = open_dataset(data)
    documents = [document for i in range(len(rows)) for document in unpack(rows[i])]
    if not count or count >= len(documents):
        return documents
    return [documents[i] for i in np.linspace(0, len(documents) - 1, count).astype(int)]


def _rewrite(documents, respond, stops, config: Regenerate, length: int, part: int) -> list[Document]:
    """Replace every supervised run of tokens, in order; each answer sees the answers before it.

    A conversation ends before a turn that does not fit the row, and after an answer that did not end by itself.
    """
    pieces = [_pieces(document, config.prompt_length) for document in documents]
    tokens = [np.zeros(0, np.int32) for _ in documents]
    masks = [np.zeros(0, bool) for _ in documents]
    open_ = list(range(len(documents)))
    for turn in range(max(len(kept) for kept in pieces)):
        asked = [i for i in open_ if turn < len(pieces[i]) and len(tokens[i]) + len(pieces[i][turn]) < length]
        for i in asked:
            tokens[i] = np.concatenate([tokens[i], pieces[i][turn]])
            masks[i] = np.concatenate([masks[i], np.zeros(len(pieces[i][turn]), bool)])
        # The seed depends on the part, so that a resumed run draws what an uninterrupted one would.
        answers = respond([tokens[i].tolist() for i in asked], config.seed + 1000 * part + turn)
        for i, answer in zip(asked, answers, strict=True):
            new = np.asarray(answer.tokens, np.int32)[: length - len(tokens[i])]
            tokens[i] = np.concatenate([tokens[i], new])
            masks[i] = np.concatenate([masks[i], np.ones(len(new), bool)])
        open_ = [i for i in asked if tokens[i][-1] in stops]
    return [Document(t, m) for t, m in zip(tokens, masks, strict=True) if m.any()]


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


def _save(path: AnyPath, documents: list[Document]) -> None:
    content = io.BytesIO()
    np.savez(
        content,
        lengths=np.asarray([len(d.tokens) for d in documents], np.int64),
        tokens=np.concatenate([np.zeros(0, np.int32), *(d.tokens for d in documents)]),
        loss_mask=np.concatenate([np.zeros(0, bool), *(d.loss_mask for d in documents)]),
    )
    write_bytes(path, content.getvalue())


def _load(path: AnyPath) -> list[Document]:
    try:
        with np.load(io.BytesIO(read_bytes(path))) as arrays:
            ends = np.cumsum(arrays["lengths"])[:-1]
            tokens, masks = (np.split(arrays[name], ends) for name in ("tokens", "loss_mask"))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise SpecaufError(
            f"{path} cannot be read: {error}", "a whole part", f"delete {path}, then run the command again"
        ) from error
    return [Document(t, m) for t, m in zip(tokens, masks, strict=True) if len(t)]


def _assemble(config: Regenerate, manifest: dict, parts: list[list[Document]], stops: tuple[int, ...]) -> dict:
    documents = [document for part in parts for document in part]
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
