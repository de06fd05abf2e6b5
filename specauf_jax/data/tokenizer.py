"""Tokenizers: read a Hugging Face folder, or train a small byte-level BPE."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from specauf_jax.errors import SpecaufError
from specauf_jax.files import as_path, local_copy, write_bytes

END_OF_TEXT, TURN_START, TURN_END, MASK = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>"
STOP_TOKENS = (TURN_END, END_OF_TEXT, "<|eot_id|>")
"""Ends of a turn or text in the families that we serve (Qwen, ours, Llama)."""
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
        return PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # tokenizers' parser raises bare Exception
        raise SpecaufError(f"{path} cannot be read: {error}", "the tokenizer.json of the `tokenizers` library",
                           "copy the tokenizer's files again") from error  # fmt: skip


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
    folder = Path(folder)
    tokenizer = hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
    template = None
    if (folder / "chat_template.jinja").exists():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    elif (folder / "tokenizer_config.json").exists():
        template = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("chat_template")
    if template is None:
        return tokenizer, None
    text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    return tokenizer, hashlib.sha256(text.encode()).hexdigest()


def copy_tokenizer(source, destination) -> None:
    """Copy the tokenizer's files from one folder into another (made if needed)."""
    source, destination = local_copy(source), as_path(destination)
    for name in FILES:
        if (source / name).is_file():
            write_bytes(destination / name, (source / name).read_bytes())


def eos_token_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Ids that end an answer: the tokenizer's eos and the STOP_TOKENS it knows, sorted."""
    vocabulary = tokenizer.get_vocab()
    ids = {vocabulary[token] for token in STOP_TOKENS if token in vocabulary}
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    return tuple(sorted(ids))
