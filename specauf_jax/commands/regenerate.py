"""`specauf regenerate`: a dataset whose supervised tokens are the target's own."""

import hashlib

import numpy as np
from rich.console import Console

from specauf_jax.checks import template_arguments
from specauf_jax.commands.dialogues import Talk, hold, parts_folder, write_documents
from specauf_jax.commands.loading import check_rows, load_decoding, read_data, with_drafts
from specauf_jax.commands.record import announce
from specauf_jax.commands.regenerate_settings import Regenerate
from specauf_jax.data.dataset import open_dataset, write_manifest
from specauf_jax.data.packing import Document, unpack
from specauf_jax.data.tokenizer import copy_tokenizer, load_tokenizer, stop_token_ids
from specauf_jax.decoding.generate import Dialogue
from specauf_jax.decoding.rows import Request
from specauf_jax.distributed import is_primary
from specauf_jax.environment import float32_precision
from specauf_jax.errors import SpecaufError
from specauf_jax.files import (
    AnyPath,
    as_path,
    check_absent,
    fresh_folder,
    local_copy,
    write_bytes,
)
from specauf_jax.models.weights import target_config, weights_digest
from specauf_jax.sharding import make_mesh


def regenerate(config: Regenerate, console: Console) -> dict:
    """Write `config.out`; returns its manifest. A killed run goes on where it stopped.

    Several processes decode the same rows together; the first one writes, the others return {}.
    """
    check_absent(config.out)
    data = as_path(config.data)
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
    first = [pieces[0].tolist() for pieces in (_pieces(d, config.prompt_length) for d in documents) if pieces]
    first = [tokens for tokens in first if len(tokens) < manifest["sequence_length"]]
    if not first:
        raise SpecaufError(
            f"none of {len(documents)} documents has anything to answer",
            f"an unsupervised prefix, or more than prompt_length = {config.prompt_length} tokens",
            "lower --prompt-length",
        )
    inputs = {"data": _digest(documents), "target": weights_digest(config.target)}
    if config.drafter is not None:
        inputs["drafter"] = weights_digest(config.drafter)
    options: dict = {"batch_size": config.batch_size, "mesh": mesh}
    with parts_folder(config, "regeneration", **inputs) as parts, float32_precision(config.dtype):
        decoding = with_drafts(
            decoding,
            config.verify_slots,
            config.tree_nodes,
            config.tree_temperature,
            params,
            first,
            batch_size=config.batch_size,
            mesh=mesh,
            console=console,
        )
        length = manifest["sequence_length"]
        dialogues = {n: _answered(document, n, stops, config, length) for n, document in enumerate(documents)}
        talks = hold(dialogues, parts, params, "regenerating", console, config=decoding, seed=config.seed, **options)
        if not is_primary():
            return {}
        written = _assemble(config, manifest, [talk.document for talk in talks.values() if talk.answers], stops)
    dropped = len(documents) - written["documents"]
    console.print(
        f"{written['documents']} documents ({dropped} more had nothing to answer, or no room), "
        f"{written['truncated_documents']} of them cut before their answer ended, "
        f"{written['supervised_tokens']} supervised tokens of the target's own written to {config.out}",
        highlight=False,
    )
    return written


def _chosen(data: AnyPath, count: int) -> list[Document]:
    """All documents, or `count` of them spread evenly."""
    rows = open_dataset(data)
    documents = [document for i in range(len(rows)) for document in unpack(rows[i])]
    if not count or count >= len(documents):
        return documents
    return [documents[i] for i in np.linspace(0, len(documents) - 1, count).astype(int)]


def _answered(document: Document, number: int, stops, config: Regenerate, length: int) -> Dialogue[Talk]:
    """The document with every supervised run of tokens replaced, in order; each answer sees the answers before it.

    It ends before a turn that does not fit the row, and after an answer that did not end by itself.
    """
    talk = Talk([])
    for piece in _pieces(document, config.prompt_length):
        asked = [*talk.tokens, *piece.tolist()]
        if len(asked) >= length:
            break
        answer = yield Request(asked, number, min(config.max_new_tokens, length - len(asked)), config.sampling)
        talk.tokens = [*asked, *answer.tokens]
        talk.answers.append((len(asked), len(talk.tokens)))
        if talk.tokens[-1] not in stops:
            break
    return talk


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


def _digest(documents: list[Document]) -> str:
    """SHA-256 of all tokens and loss masks."""
    digest = hashlib.sha256()
    for document in documents:
        for array in (document.tokens, document.loss_mask):
            digest.update(len(array).to_bytes(8, "little") + array.tobytes())
    return digest.hexdigest()


def _assemble(config: Regenerate, manifest: dict, documents: list[Document], stops: tuple[int, ...]) -> dict:
    with fresh_folder(config.out) as folder:
        counts = write_documents(documents, folder, manifest["sequence_length"], stops)
        data = local_copy(config.data)
        copy_tokenizer(data / "tokenizer", folder / "tokenizer")
        for name in manifest["prompts"].values():
            write_bytes(folder / name, (data / name).read_bytes())
        manifest = manifest | counts | {"source": f"answers of {config.target} to {manifest['source']}"}
        write_manifest(folder, manifest)
    return manifest
