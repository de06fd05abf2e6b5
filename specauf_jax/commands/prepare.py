"""`specauf prepare`: a source becomes a packed dataset, its tokenizer and a manifest."""

import functools
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from specauf_jax.checks import template_arguments
from specauf_jax.commands.prepare_settings import Prepare
from specauf_jax.data import corpus, sources, tfds_source
from specauf_jax.data import tokenizer as tokenizers
from specauf_jax.data.chat import template_notes
from specauf_jax.data.dataset import write_dataset, write_manifest
from specauf_jax.data.encode import Counts, encode
from specauf_jax.data.packing import pack
from specauf_jax.data.preview import print_example, print_summary
from specauf_jax.data.rows import BadRecord, is_pipe
from specauf_jax.data.sources import BadRecords, Record
from specauf_jax.data.tokenizer import Tokenizer
from specauf_jax.errors import SpecaufError
from specauf_jax.files import check_absent, fresh_folder


@dataclass
class Source:
    """Where the records come from; `read` starts over at each call."""

    name: str
    read: Callable[[], Iterable[Record | BadRecord]]
    heldout: dict[str, list[str]] = field(default_factory=dict)


def prepare(config: Prepare, console: Console) -> dict:
    """Write `config.out`: dataset/, tokenizer/, prompts/ (embedded corpus) and manifest.json.

    Args:
      config: settings of the command.
      console: for progress, bad records, an example and the summary.

    Returns:
      The manifest (keys: `dataset.MANIFEST_KEYS`).

    Raises:
      SpecaufError: a source or records that cannot be used; `config.out` is left as it was.
    """
    check_absent(config.out)
    source = _open_source(config)
    tfds_source.import_tfds()
    bad, counts = BadRecords(config.max_bad_records, console), Counts()
    with fresh_folder(config.out) as folder, _progress(console) as progress:
        tokenizer = _tokenizer(config, source, folder / "tokenizer", progress)
        records = progress.track(bad.keep_good(source.read()), description="tokenising and packing")
        documents = encode(tokenizer, records, config.sequence_length, bad, counts)
        rows = write_dataset(_checked(pack(documents, config.sequence_length), bad), folder, config.sequence_length)
        _check_mask(config, counts)
        prompts = _write_prompts(config, tokenizer, source.heldout, folder)
        manifest = _manifest(config, source, tokenizer, folder, rows, bad, counts, prompts)
        write_manifest(folder, manifest)
    for note in _notes(tokenizer, counts):
        console.print(f"warning: {note}", style="yellow", markup=False, highlight=False)
    if counts.example is not None:
        print_example(console, tokenizer, counts.example)
    print_summary(console, config.out, manifest, plain_text=not counts.conversations)
    return manifest


def _open_source(config: Prepare) -> Source:
    if config.input:
        files = sources.input_files(config.input)
        name = f"input: {', '.join(config.input)}"
        if zipped := [path for path in files if path.suffix.lower() == ".gz"]:
            said = f"{zipped[0]}{f' and {len(zipped) - 1} more are' if zipped[1:] else ' is'} compressed by gzip"
            print(f"{said}: read as what it holds", file=sys.stderr)
        if any(map(is_pipe, files)):  # which give what they hold only once
            found = list(sources.read_files(files))
            return Source(name, lambda: found)
        return Source(name, lambda: sources.read_files(files))
    if config.tfds:
        name, split = config.tfds, config.tfds_split
        read = functools.partial(tfds_source.read_tfds, name, config.tfds_fields, split=split, data_dir=config.tfds_dir)
        return Source(f"tfds: {name}, split {split}", read)
    training, heldout = corpus.stdlib_corpus(config.corpus_bytes)
    records = [Record(f"corpus:{number}", text) for number, text in enumerate(training)]
    return Source(f"corpus: {corpus.corpus_name()}", lambda: records, heldout)


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True)


def _tokenizer(config: Prepare, source: Source, folder: Path, progress: Progress) -> Tokenizer:
    """The given tokenizer, or a BPE trained on the source's good records; its files go to `folder`."""
    if config.tokenizer is not None:
        tokenizer = tokenizers.load_tokenizer(config.tokenizer)
        tokenizers.copy_tokenizer(config.tokenizer, folder)
        return tokenizers.with_template_args(tokenizer, template_arguments(config.template_args))
    good = (record for record in source.read() if isinstance(record, Record))
    texts = itertools.chain.from_iterable(_texts(record) for record in good)
    tokenizers.train_bpe(progress.track(texts, description="training the tokenizer"), config.vocab_size, folder)
    return tokenizers.with_template_args(tokenizers.load_tokenizer(folder), template_arguments(config.template_args))


def _texts(record: Record) -> list[str]:
    return [record.content] if isinstance(record.content, str) else [message["content"] for message in record.content]


def _checked(rows: Iterable[dict], bad: BadRecords) -> Iterator[dict]:
    # Bad records are the better message than the empty dataset that they may leave.
    yield from rows
    bad.check()


def _check_mask(config: Prepare, counts: Counts) -> None:
    if counts.conversations and not config.allow_uniform_mask and counts.supervised in (0, counts.tokens):
        share = "no token is" if counts.supervised == 0 else "each token is"
        raise SpecaufError(f"{share} supervised in all {counts.conversations} conversations",
                           "the assistant's tokens supervised, the others not",
                           "correct the template's {% generation %} marks, or pass --allow-uniform-mask")  # fmt: skip


def _notes(tokenizer: Tokenizer, counts: Counts) -> list[str]:
    if not counts.conversations:
        return []
    unended = "no answer ends with a token that ends a turn, so that a drafter does not learn where answers end; "
    unended += f"known are {list(tokenizer.stops)} and what generation_config.json beside the tokenizer names"
    return template_notes(tokenizer) + ([] if counts.ended or not counts.supervised else [unended])


def _write_prompts(
    config: Prepare, tokenizer: Tokenizer, heldout: dict[str, list[str]], folder: Path
) -> dict[str, str]:
    files = {}
    for name, texts in heldout.items():
        prompts = corpus.heldout_prompts(tokenizer, texts, config.heldout_prompts, config.prompt_length)
        files[name] = f"prompts/{name}.jsonl"
        (folder / "prompts").mkdir(exist_ok=True)
        lines = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts)
        (folder / files[name]).write_text(lines, encoding="utf-8")
    return files


def _manifest(config: Prepare, source: Source, tokenizer: Tokenizer, folder: Path, rows: int, bad: BadRecords,
              counts: Counts, prompts: dict[str, str]) -> dict:  # fmt: skip
    return {
        "sequence_length": config.sequence_length,
        "rows": rows,
        "documents": counts.documents,
        "tokens": counts.tokens,
        "supervised_tokens": counts.supervised,
        "supervised_share": counts.supervised / counts.tokens,
        "truncated_documents": counts.truncated,
        "bad_records": len(bad.found),
        **tokenizers.described(folder / "tokenizer", tokenizer),
        "source": source.name,
        "prompts": prompts,
        "template_args": template_arguments(config.template_args),
        "largest_token_id": counts.largest,
    }
