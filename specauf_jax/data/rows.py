"""Rows of a file: JSON lines, a JSON array, Parquet or plain text, gzip or not, from a disk or a pipe."""

import gzip
import importlib.util
import itertools
import json
import stat
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path
from typing import Any

from specauf_jax import files
from specauf_jax.errors import SpecaufError

JSON_SUFFIXES = (".jsonl", ".json", ".ndjson", ".jsonlines")
CONVERSATION_KEYS = ("conversations", "messages")
_GZIP, _BOM = b"\x1f\x8b", b"\xef\xbb\xbf"
_FOREIGN = {b"PK\x03\x04": "a zip archive", b"BZh": "compressed by bzip2", b"\xfd7zXZ\x00": "compressed by xz",
            b"\x28\xb5\x2f\xfd": "compressed by zstd", b"PAR1": "a Parquet file without the suffix .parquet",
            b"ARROW1": "an Arrow file", b"\xff\xfe": "text in UTF-16", b"\xfe\xff": "text in UTF-16"}  # fmt: skip
"""First bytes of what is not read, and its name."""


@dataclass
class Row:
    """One JSON value, or a whole text."""

    where: str
    value: Any
    is_text: bool = False


@dataclass
class BadRecord:
    """What cannot be used: file and line, and what is wrong with it."""

    where: str
    reason: str


def is_pipe(path: Path) -> bool:
    """Whether it can be read only once."""
    return path.exists() and stat.S_ISFIFO(path.stat().st_mode)


def read_rows(path: Path, *, lines: bool = False) -> Iterator[Row | BadRecord]:
    """Every row of a file; a file that is not JSON is one row of text.

    Args:
      path: of a local file or pipe.
      lines: take the file for JSON lines, whatever its name.

    Raises:
      SpecaufError: a Parquet file without pyarrow.
    """
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    try:
        if suffix == ".parquet":
            yield from _parquet(path)
            return
        with open(path, "rb") as raw, gzip.open(raw) if raw.peek(2)[:2] == _GZIP else raw as file:
            first = file.readline().removeprefix(_BOM)
            if foreign := _foreign(first):
                yield BadRecord(str(path), f"{foreign}; convert it to UTF-8 text, plain or compressed by gzip")
            elif lines or suffix in JSON_SUFFIXES or _looks_like_json(first, is_pipe(path)):
                yield from _json(str(path), first, file)
            else:
                yield _text(str(path), first + file.read())
    except (OSError, EOFError, zlib.error) as error:  # of gzip too, where the file is cut or damaged
        yield BadRecord(str(path), f"not readable ({error})")


def _foreign(first: bytes) -> str | None:
    """The name of a format that is not read, by the first line."""
    found = next((name for magic, name in _FOREIGN.items() if first.startswith(magic)), None)
    return found or ("binary, or text in UTF-16" if b"\0" in first else None)


def _looks_like_json(first: bytes, pipe: bool) -> bool:
    """Whether a file without a telling suffix holds JSON lines: any object in a pipe, a conversation elsewhere."""
    try:
        value = parse_json(first)
    except ValueError:
        return False
    return isinstance(value, dict) and (pipe or not value.keys().isdisjoint(CONVERSATION_KEYS))


def _text(where: str, data: bytes) -> Row | BadRecord:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        return BadRecord(where, f"not readable as UTF-8 text ({error})")
    return Row(where, text, is_text=True) if text.strip() else BadRecord(where, "the file is empty")


def _json(where: str, first: bytes, file: BufferedIOBase) -> Iterator[Row | BadRecord]:
    """One value a line, or a whole array (or object) over many; empty lines are allowed."""
    rest: Iterable[bytes] = file
    if first.lstrip()[:1] == b"[" or first.strip() == b"{":
        whole = first + file.read()
        try:
            value = parse_json(whole)
        except ValueError:
            first, *rest = whole.split(b"\n")
        else:
            rows = enumerate(value) if isinstance(value, list) else [(0, value)]
            yield from (Row(f"{where}[{index}]", row) for index, row in rows)
            return
    for number, line in enumerate(itertools.chain([first], rest), 1):
        if line.strip():
            try:
                yield Row(f"{where}:{number}", parse_json(line))
            except ValueError as error:
                yield BadRecord(f"{where}:{number}", str(error))


def parse_json(data: bytes) -> Any:
    """The value of a JSON text.

    Raises:
      ValueError: saying what is wrong.
    """
    try:
        return files.parse_json(data.decode("utf-8").rstrip())
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 ({error.reason})") from error
    except json.JSONDecodeError as error:
        # A JSON array over many lines is the one mistake worth a hint of its own.
        hint = "; a JSON array? write one record a line: jq -c '.[]'" if data.strip() == b"[" else ""
        raise ValueError(f"broken JSON ({error.msg} at column {error.colno}){hint}") from error
    except ValueError as error:
        raise ValueError(f"JSON {error}") from error


def _parquet(path: Path) -> Iterator[Row | BadRecord]:
    if importlib.util.find_spec("pyarrow") is None:
        raise SpecaufError(f"{path} is a Parquet file, which pyarrow reads", "pyarrow in this environment",
                           "pip install pyarrow, or convert the file to JSON lines")  # fmt: skip
    import pyarrow
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        for batch in ParquetFile(path).iter_batches(1024):
            for value in batch.to_pylist():
                number += 1
                yield Row(f"{path}:row {number}", value)
    except pyarrow.ArrowException as error:
        yield BadRecord(str(path), f"not readable as Parquet ({str(error).splitlines()[0]})")
