"""Records of files and folders: conversations in either spelling, and texts (TFDS: tfds_source.py).

Every reader yields a `Record` or a `BadRecord` for each thing it finds; nothing is left out silently.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specauf_jax.data.rows import CONVERSATION_KEYS, BadRecord, Row, is_pipe, read_rows
from specauf_jax.errors import SpecaufError
from specauf_jax.files import local_copy

ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatgpt"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "ipython"), "tool"),
    **dict.fromkeys(("system", "developer"), "system"),
}
"""Roles as they are spelled in any case, and as templates know them."""
MARKS = {**dict.fromkeys(("weight", "loss_weight", "train", "training", "trainable", "train_on_turn", "supervised",
                          "loss", "loss_mask"), True),
         **dict.fromkeys(("masked", "ignore", "ignore_loss"), False)}  # fmt: skip
"""Keys that say whether an answer is to be learned, and the value that says yes."""
UNKNOWN_TURN_KEYS = ("function_call", "images", "image", "videos", "video", "audio", "audios", "mask", "train_detail")
UNKNOWN_RECORD_KEYS = ("functions", "documents", "images", "image", "videos", "audios", "chat_template_kwargs")
"""Keys with a meaning that cannot be honoured. Any other key is a note about the record."""


class Unusable(Exception):
    """Why a record cannot be used."""


@dataclass
class Record:
    """One usable record: the messages of a conversation, or a text."""

    where: str
    content: list[dict] | str
    tools: list[dict] | None = None
    unlearned: tuple[int, ...] = ()
    """Indices of answers that are not to be learned."""

    @property
    def messages(self) -> list[dict]:
        """Of a conversation."""
        assert not isinstance(self.content, str)
        return self.content

    @property
    def answers(self) -> list[int]:
        """Indices of the assistant's messages."""
        return [index for index, message in enumerate(self.messages) if message["role"] == "assistant"]


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
    """The files behind `Prepare.input`: files and pipes as given, folders sorted and searched to their end.

    In a folder, links are followed; hidden files and folders, and files of no bytes, are left out.

    Raises:
      SpecaufError: a path does not exist or holds no data, or a folder holds no file.
    """
    files: list[Path] = []
    for path in map(local_copy, paths):
        if not path.exists():
            raise SpecaufError(f"input {path} does not exist", "a JSONL file, a text file or a folder of text",
                               "check the path")  # fmt: skip
        if path.is_dir():
            found = sorted(_files_under(path, set()))
            if not found:
                raise SpecaufError(f"input folder {path} is empty", "at least one file in it", "check the path")
            files += found
        elif path.is_file() or is_pipe(path):
            files.append(path)
        else:
            raise SpecaufError(f"input {path} is a device or socket", "a file, a pipe or a folder", "check the path")
    return files


def _files_under(folder: Path, seen: set[Path]) -> Iterator[Path]:
    if (real := folder.resolve()) in seen:  # a link that leads back
        return
    seen.add(real)
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _files_under(path, seen)
        elif not path.exists() or (path.is_file() and path.stat().st_size):  # a broken link is told when it is read
            yield path


def read_files(files: Iterable[Path]) -> Iterator[Record | BadRecord]:
    """Records of each file, in order."""
    for path in files:
        for row in read_rows(path):
            if isinstance(row, BadRecord):
                yield row
            elif row.is_text:
                yield Record(row.where, row.value)
            else:
                yield read_conversation(row)


def read_conversation(row: Row) -> Record | BadRecord:
    """The conversation of a JSON row: `conversations` or `messages`, turns of from/value or role/content."""
    try:
        messages, unlearned = _messages(turns_of(row.value), row.value)
        _check_order(messages)
        return Record(row.where, messages, _tools(row.value), unlearned)
    except Unusable as reason:
        return BadRecord(row.where, str(reason))
    except RecursionError:
        return BadRecord(row.where, "JSON nested too deep")


def turns_of(value: Any) -> list:
    """The list of turns of a JSON value.

    Raises:
      Unusable: there is none, or two.
    """
    if isinstance(value, list):
        raise Unusable("a JSON array; write one record a line: jq -c '.[]'")
    fields = value if isinstance(value, dict) else {}
    named = [key for key in CONVERSATION_KEYS if key in fields]
    if not named:
        found = ", ".join(map(repr, fields)) or ("no keys" if isinstance(value, dict) else type(value).__name__)
        raise Unusable(f"neither 'conversations' nor 'messages' (found {found})")
    given = [fields[key] for key in named if fields[key]]
    if len(given) == 2 and given[0] != given[1]:
        raise Unusable("both 'conversations' and 'messages'")
    if not given or not isinstance(given[0], list):
        raise Unusable("the conversation is not a list of turns, or empty")
    return given[0]


def _present(fields: dict) -> dict:
    """Without fields that say nothing: null, and what is empty."""
    return {key: value for key, value in fields.items() if value is not None and value not in ("", [], {})}


def _messages(turns: list, record: dict) -> tuple[list[dict], tuple[int, ...]]:
    """Messages as templates take them, and the indices of answers that are not to be learned."""
    messages, unlearned = [], []
    for number, turn in enumerate(turns, 1):
        try:
            message, learned = _message(turn)
        except Unusable as reason:
            raise Unusable(f"turn {number} {reason}") from None
        messages.append(message)
        if not learned:
            unlearned.append(number - 1)
    if system := system_of(record):
        if messages[0] != system and messages[0]["role"] == "system":
            raise Unusable("a system message beside the turns, and another one among them")
        if messages[0] != system:
            messages.insert(0, system)
            unlearned = [index + 1 for index in unlearned]
    return messages, tuple(index for index in unlearned if messages[index]["role"] == "assistant")


def system_of(record: dict) -> dict | None:
    """The system message that stands beside a record's turns.

    Raises:
      Unusable: it is no text, or the record has a key that cannot be honoured.
    """
    given = _present(record)
    if refused := [key for key in UNKNOWN_RECORD_KEYS if key in given]:
        raise Unusable(f"has {refused[0]!r}, which is not supported")
    text = _either(given, "system", "system_prompt")
    return None if text is None else {"role": "system", "content": _text(text)}


def _message(turn) -> tuple[dict, bool]:
    """A message, with every other key of its turn that a template might read; and whether it is to be learned."""
    if not isinstance(turn, dict):
        raise Unusable("is not an object")
    given = _present(turn)
    role = _either(given, "role", "from")
    if not isinstance(role, str) or role.strip().lower() not in ROLES:
        raise Unusable(f"has the unknown role {role!r}")
    if refused := [key for key in UNKNOWN_TURN_KEYS if key in given]:
        raise Unusable(f"has {refused[0]!r}, which is not supported")
    learned = all([_learned(key, given.pop(key)) for key in MARKS if key in given])
    calls = [_call(call) for call in _listed(given.pop("tool_calls", []), "tool_calls")]
    content = _either(given, "content", "value")
    text = _text(content) if content or not calls else ""
    if not text.strip() and not calls:
        raise Unusable("has no text")
    message = {"role": ROLES[role.strip().lower()], "content": text}
    others = {key: value for key, value in given.items() if key not in ("role", "from", "content", "value")}
    checked_text(json.dumps(others, ensure_ascii=False, default=str))
    return message | others | ({"tool_calls": calls} if calls else {}), learned


def _either(given: dict, key: str, other: str):
    """The value of a key or of its other spelling, None without both."""
    found = [given[name] for name in (key, other) if name in given]
    if len(found) == 2 and found[0] != found[1]:
        raise Unusable(f"has {key!r} and another {other!r}")
    return found[0] if found else None


def _text(content) -> str:
    """The text of a content: a string, or a list of parts of text."""
    parts = content if isinstance(content, list) else [content]
    texts = []
    for part in parts:
        kind = part.get("type") or "text" if isinstance(part, dict) else "text"
        text = part.get("text") if isinstance(part, dict) else part
        if kind not in ("text", "input_text", "output_text") or not isinstance(text, str):
            raise Unusable(f"has a part of type {kind!r}" if isinstance(part, dict) else "has no text")
        texts.append(checked_text(text))
    return "".join(texts)


def checked_text(text: str) -> str:
    """The text itself.

    Raises:
      Unusable: JSON can spell half a surrogate pair, UTF-8 cannot.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise Unusable("holds half a surrogate pair, which no tokenizer takes") from None
    return text


def _learned(key: str, value) -> bool:
    if value not in (0, 1):  # False and True are 0 and 1
        raise Unusable(f"has {key!r} {value!r}, which is neither 0 nor 1")
    return bool(value) == MARKS[key]


def _tools(record: dict) -> list[dict] | None:
    tools = _present(record).get("tools")
    if tools is None:
        return None
    checked_text(json.dumps(tools, ensure_ascii=False, default=str))
    return _listed(tools, "tools")


def _listed(value, key: str) -> list[dict]:
    """A list of objects, or its JSON text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = None
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise Unusable(f"has {key!r}, which is not a list of objects")
    return value


def _call(call: dict) -> dict:
    """A tool call with its arguments as an object, as servers hand it to templates."""
    function = call.get("function") if isinstance(call.get("function"), dict) else None
    inner = call if function is None else function
    if isinstance(text := inner.get("arguments"), str):
        try:
            arguments = json.loads(text)
        except (ValueError, RecursionError):
            return call
        inner = inner | {"arguments": arguments if isinstance(arguments, dict) else text}
    return inner if function is None else call | {"function": inner}


def _check_order(messages: list[dict]) -> None:
    roles = [message["role"] for message in messages]
    if roles[-1] != "assistant":
        raise Unusable("the conversation does not end with an assistant turn")
    if next(role for role in roles if role != "system") == "assistant":
        raise Unusable("the conversation begins with an assistant turn")


def read_questions(record: dict) -> tuple[str | None, tuple[str, ...]]:
    """The system message of a conversation, and its user turns, for a model that writes the answers itself.

    Raises:
      Unusable: it has more than can be asked so.
    """
    messages, _ = _messages(turns_of(record), record)
    system = messages.pop(0)["content"] if messages[0]["role"] == "system" else None
    questions = [message for message in messages if message["role"] == "user"]
    others = {message["role"] for message in messages} - {"user", "assistant"}
    if others or _tools(record) or not questions or any("name" in question for question in questions):
        raise Unusable("a prompt has user turns, answers, and at most one system message before them, without tools")
    return system, tuple(question["content"] for question in questions)
