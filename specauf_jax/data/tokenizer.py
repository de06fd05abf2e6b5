"""Tokenizers: read a Hugging Face folder, or train a small byte-level BPE."""

import hashlib
import inspect
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from specauf_jax.checks import nearest
from specauf_jax.errors import SpecaufError
from specauf_jax.files import as_path, local_copy, read_json, write_bytes

END_OF_TEXT, TURN_START, TURN_END, MASK = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>"
STOP_TOKENS = (TURN_END, END_OF_TEXT, "<|eot_id|>")
"""Ends of a turn or text in the families that we serve (Qwen, ours, Llama)."""
STOP_FILES = ("generation_config.json", "config.json")
"""Files of a model that name more of them, under eos_token_id."""
CLOCK = "strftime_now"
"""The function by which a chat template reads the date; as a template argument, the text that it gives instead."""
FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json",
         "added_tokens.json", "vocab.json", "merges.txt")  # fmt: skip
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


class Tokenizer(Protocol):
    """What is used of a Hugging Face tokenizer."""

    chat_template: str | dict[str, str] | None
    mask_token: str | None
    mask_token_id: int | None
    eos_token_id: int | None
    added_tokens_decoder: dict[int, Any]  # id → the token, with `special`
    template_args: Mapping[str, Any]  # arguments of every rendering of the chat template
    stops: tuple[int, ...]  # ids that end an answer, by the tokenizer and the model's files beside it

    def __len__(self) -> int: ...

    def __call__(self, text: str | list[str], **settings) -> Mapping[str, list]: ...

    def encode(self, text: str, **settings) -> list[int]: ...

    def decode(self, token_ids: list[int], **settings) -> str: ...

    def apply_chat_template(self, conversation: list[dict], **settings) -> Any: ...

    def get_vocab(self) -> dict[str, int]: ...

    def convert_ids_to_tokens(self, ids: int) -> str: ...


def load_tokenizer(folder) -> Tokenizer:
    """The tokenizer of a local folder (tokenizer.json and, beside it, its config and chat template).

    Raises:
      SpecaufError: no tokenizer.json, or a broken one.
    """
    # Without torch, transformers gives every user a warning that does not concern tokenizers.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import PreTrainedTokenizerFast

    folder = local_copy(folder)
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise SpecaufError(f"{path} does not exist", "a Hugging Face folder with tokenizer.json",
                           "check the path; a slow tokenizer is converted with `AutoTokenizer.from_pretrained(...)"
                           ".save_pretrained(...)`")  # fmt: skip
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # tokenizers' parser raises bare Exception
        raise _unreadable(path, error) from error
    if not isinstance(tokenizer.chat_template, str | dict | None):
        raise SpecaufError(f"{folder}: chat_template is {tokenizer.chat_template!r}", "a text, or texts by name",
                           "correct tokenizer_config.json")  # fmt: skip
    tokenizer.template_args, tokenizer.stops = {}, stop_token_ids(tokenizer, folder)
    return tokenizer


def _unreadable(path: Path, error: Exception) -> SpecaufError:
    return SpecaufError(f"{path} cannot be read: {error}", "the tokenizer.json of the `tokenizers` library",
                        "copy the tokenizer's files again")  # fmt: skip


def with_template_args(tokenizer: Tokenizer, arguments: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer, whose chat template is rendered with these arguments from now on.

    Raises:
      SpecaufError: the template does not read one of them.
    """
    templates = tokenizer.chat_template or ""
    text = templates if isinstance(templates, str) else " ".join(templates.values())
    words = {*re.findall(r"\w+", text)}
    taken = {*inspect.signature(tokenizer.apply_chat_template).parameters, "messages"}
    for name in arguments:
        if name not in words - taken:
            raise SpecaufError(f"template argument {name!r}, which the chat template does not read"
                               f"{nearest(name, words - taken)}", "an argument of the template",
                               "correct or leave out --template-args")  # fmt: skip
    tokenizer.template_args = {**arguments}
    if CLOCK in arguments:
        tokenizer.template_args[CLOCK] = lambda _: str(arguments[CLOCK])
    return tokenizer


def train_bpe(texts: Iterable[str], vocab_size: int, folder) -> None:
    """Train a byte-level BPE with ChatML markers and a mask token, and write it as a Hugging Face folder."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, TURN_START, TURN_END, MASK],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "mask_token": MASK,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHATML,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def hashes(folder) -> tuple[str, str | None]:
    """SHA-256 of tokenizer.json and of the chat template (None without one)."""
    folder = local_copy(folder)
    tokenizer = hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
    template = read_template(folder)
    return tokenizer, None if template is None else hashlib.sha256(template.encode()).hexdigest()


def read_template(folder: Path) -> str | None:
    """The chat template of a local folder; of several, their JSON."""
    template = None
    if (folder / "chat_template.jinja").is_file():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    elif (folder / "tokenizer_config.json").exists():
        template = read_json(folder / "tokenizer_config.json", "a tokenizer's settings").get("chat_template")
    return template if template is None or isinstance(template, str) else json.dumps(template, sort_keys=True)


def differing(folder, other) -> str | None:
    """What makes two folders' tokens differ: "tokenizer", "chat template" or nothing.

    How the files are written does not count, nor {% generation %} marks, which render as nothing; a folder without a
    chat template agrees with every other.
    """
    folder, other = local_copy(folder), local_copy(other)
    if hashes(folder)[0] != hashes(other)[0] and _normal_form(folder) != _normal_form(other):
        return "tokenizer"
    marks = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
    templates = [marks.sub("", found).strip() for f in (folder, other) if (found := read_template(f))]
    return "chat template" if len(set(templates)) == 2 else None


def _normal_form(folder: Path) -> str:
    """tokenizer.json as the library writes it, without settings of a use."""
    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the library raises bare Exception
        raise _unreadable(folder / "tokenizer.json", error) from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer.to_str()


def copy_tokenizer(source, destination) -> None:
    """Copy the tokenizer's files from one folder into another (made if needed)."""
    source, destination = local_copy(source), as_path(destination)
    for name in FILES:
        if (source / name).is_file():
            write_bytes(destination / name, (source / name).read_bytes())


def described(folder, tokenizer: Tokenizer) -> dict:
    """What a dataset's manifest tells of its tokenizer, whose files are in `folder`."""
    tokenizer_sha256, template_sha256 = hashes(folder)
    return {
        "tokenizer_sha256": tokenizer_sha256,
        "template_sha256": template_sha256,
        "vocab_size": len(tokenizer),
        "mask_token_id": tokenizer.mask_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def stop_token_ids(tokenizer: Tokenizer, model) -> tuple[int, ...]:
    """Ids that end an answer, sorted: the tokenizer's eos, the STOP_TOKENS it knows, and what a model's files name.

    Args:
      tokenizer: of `load_tokenizer`.
      model: folder with STOP_FILES, any of which may be missing.

    Raises:
      SpecaufError: a file's eos_token_id is neither an id nor a list of them.
    """
    vocabulary = tokenizer.get_vocab()
    ids = {vocabulary[token] for token in STOP_TOKENS if token in vocabulary}
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    for path in (as_path(model) / name for name in STOP_FILES):
        values = read_json(path, "a model's configuration") if path.is_file() else {}
        for place in (values, values.get("text_config")):  # of a model that sees, too
            named = place.get("eos_token_id") if isinstance(place, dict) else None
            found = named if isinstance(named, list) else [named] if named is not None else []
            if not all(type(id_) is int and abs(id_) < 2**31 for id_ in found):
                raise SpecaufError(f"{path}: eos_token_id is {named!r}", "a token's id, or a list of ids", "correct it")
            ids.update(found)
    return tuple(sorted(ids))
