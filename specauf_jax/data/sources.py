"""Readers of conversations and texts: JSON lines, text files and folders (TFDS: tfds_source.py).

Every reader yields a `Record` or a `BadRecord` for each thing it finds; nothing is left out silently.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from specauf_jax.errors import SpecaufError
from specauf_jax.files import local_copy

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@dataclass
class Record:
    """One usable record: the messages of a conversation, or a text."""

    where: str
    content: list[dict] | str


@dataclass
class BadRecord:
    """One unusable record: file and line, and what is wrong with it."""

    where: str
    reason: str


class BadRecords:
    """Bad records met so far: each is printed up to the limit, more than the limit is an error."""

    def __init__(self, limit: int, console):
        self.limit, self.console = limit, console
        self.found: list[BadRecord] = []

    def add(self, bad: BadRecord) -> None:
        """Note a bad record, and print it if it is tolerated."""
        self.found.append(bad)
        if len(self.found) <= self.limit:
            self.console.print(f"bad record: {bad.where}: {bad.reason}", style="yellow", markup=False, highlight=False)

    def keep_good(self, records: Iterable[Record | BadRecord]) -> Iterator[Record]:
        """The good records; the others are noted."""
        for record in records:
            if isinstance(record, BadRecord):
                self.add(record)
            else:
                yield record

    def check(self) -> None:
        """Raise a SpecaufError that lists the first ten, if there are more than the limit."""
        if len(self.found) > self.limit:
            listed = "".join(f"\n    {bad.where}: {bad.reason}" for bad in self.found[:10])
            more = f"\n    and {len(self.found) - 10} more" if len(self.found) > 10 else ""
            raise SpecaufError(f"{len(self.found)} unusable records{listed}{more}",
                               f"at most {self.limit} (max_bad_records)",
                               "correct the records, or raise --max-bad-records")  # fmt: skip


def input_files(paths: Iterable[str]) -> list[Path]:
    """The files behind `Prepare.input`: files as given, folders sorted and searched to their end.

    Raises:
      SpecaufError: a path does not exist, or a folder holds no file.
    """
    files: list[Path] = []
    for path in map(local_copy, paths):
        if not path.exists():
            raise SpecaufError(f"input {path} does not exist", "a JSONL file, a text file or a folder of text",
                               "check the path")  # fmt: skip
        found = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        if not found:
            raise SpecaufError(f"input folder {path} is empty", "at least one file in it", "check the path")
        files += found
    return files


def read_files(files: Iterable[Path]) -> Iterator[Record | BadRecord]:
    """Records of each file: JSON lines by the suffix .jsonl or .json, one text otherwise."""
    for path in files:
        yield from read_jsonl(path) if path.suffix in (".jsonl", ".json") else read_text(path)


def read_text(path: Path) -> Iterator[Record | BadRecord]:
    """A whole text file as one record."""
    try:
        text = path.read_bytes().decode("utf-8")
    except (UnicodeDecodeError, OSError) as error:
        yield BadRecord(str(path), f"not readable as UTF-8 text ({error})")
        return
    yield Record(str(path), text) if text.strip() else BadRecord(str(path), "the file is empty")


def read_jsonl(path: Path) -> Iterator[Record | BadRecord]:
    """ShareGPT (`conversations`) or OpenAI (`messages`) records, one a line; empty lines are allowed."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _parse_line(f"{path}:{number}", line)


def _parse_line(where: str, line: bytes) -> Record | BadRecord:
    try:
        value = json.loads(line)
    except UnicodeDecodeError as error:
        return BadRecord(where, f"not UTF-8 ({error.reason})")
    except json.JSONDecodeError as error:
        # A JSON array over many lines is the one mistake worth a hint of its own.
        hint = "; a JSON array? write one record a line: jq -c '.[]'" if line.strip() == b"[" else ""
        return BadRecord(where, f"broken JSON ({error.msg} at column {error.colno}){hint}")
    if isinstance(value, list):
        return BadRecord(where, "a JSON array; write one record a line: jq -c '.[]'")
    if isinstance(value, dict) and "conversations" in value:
        return _conversation(where, value["conversations"], "from", "value")
    if isinstance(value, dict) and "messages" in value:
        return _conversation(where, value["messages"], "role", "content")
    found = ", ".join(map(repr, value)) if isinstance(value, dict) else type(value).__name__
    return BadRecord(where, f"neither 'conversations' nor 'messages' (found {found or 'no keys'})")


def _conversation(where: str, turns, role_key: str, text_key: str) -> Record | BadRecord:
    if not isinstance(turns, list) or not turns:
        return BadRecord(where, "the conversation is not a list of turns, or empty")
    messages = []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict) or not {role_key, text_key} <= set(turn):
            return BadRecord(where, f"turn {number} lacks {role_key!r} or {text_key!r}")
        role, text = turn[role_key], turn[text_key]
        if not isinstance(role, str) or role not in ROLES:
            return BadRecord(where, f"turn {number} has the unknown role {role!r}")
        if not isinstance(text, str) or not text.strip():
            return BadRecord(where, f"turn {number} has no text")
        if not _is_unicode(text):
            return BadRecord(where, f"turn {number} holds half a surrogate pair, which no tokenizer takes")
        messages.append({"role": ROLES[role], "content": text})
    return _check_roles(where, messages)


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # JSON can spell what UTF-8 cannot
        return False
    return True


def _check_roles(where: str, messages: list[dict]) -> Record | BadRecord:
    roles = [message["role"] for message in messages]
    if roles[-1] != "assistant":
        return BadRecord(where, "the conversation does not end with an assistant turn")
    if roles[0] == "assistant" or roles[:2] == ["system", "assistant"]:
        return BadRecord(where, "the conversation begins with an assistant turn")
    return Record(where, messages)
