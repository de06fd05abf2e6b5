"""Conversations and texts as token documents: chat template and loss mask.

The loss mask is True exactly on what the model must write itself: the assistant's tokens and the
marker that ends its turn, not the line break that a template puts after the marker.
"""

import re

import numpy as np

from specauf_jax.data.packing import Document
from specauf_jax.data.tokenizer import Tokenizer
from specauf_jax.errors import SpecaufError


class RefusedConversation(SpecaufError):
    """The chat template cannot render this conversation, or not so that the answers can be found."""


class RewrittenConversation(RefusedConversation):
    """The chat template renders earlier answers otherwise once a later one follows (as Qwen3 drops their thinking)."""


_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def conversation_documents(tokenizer: Tokenizer, messages: list[dict], where: str) -> list[Document]:
    """A conversation as one document; or, where the template rewrites earlier answers, as one for each answer.

    Then every document ends with its answer, the only one that is supervised, after just what the
    template shows of the conversation when that answer is written. Arguments and errors as for
    `encode_conversation`.
    """
    try:
        return [encode_conversation(tokenizer, messages, where)]
    except RewrittenConversation:
        answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        return [encode_conversation(tokenizer, messages[: index + 1], where, last_only=True) for index in answers]


def encode_conversation(tokenizer: Tokenizer, messages: list[dict], where: str, last_only: bool = False) -> Document:
    """Tokens and loss mask of a conversation under the tokenizer's chat template.

    Args:
      tokenizer: of `tokenizer.load_tokenizer`.
      messages: [{"role", "content"}, ...].
      where: the record's file and line, for messages.
      last_only: supervise the last message alone.

    Raises:
      SpecaufError: no template, or one that refuses or rewrites this conversation.
    """
    if _GENERATION.search(_template(tokenizer)):
        return _marked_by_template(tokenizer, messages, where)
    full = _render(tokenizer, messages, where)
    # One tokenisation of the full text: tokens next to a turn's border must be those seen in use.
    encoded = tokenizer(full, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    tokens, offsets = np.array(encoded["input_ids"], np.int32), np.array(encoded["offset_mapping"]).reshape(-1, 2)
    special = np.isin(tokens, _special_ids(tokenizer))
    mask = np.zeros(len(tokens), bool)
    for index, message in enumerate(messages):
        if message["role"] == "assistant" and (index == len(messages) - 1 or not last_only):
            start, end = _turn_span(tokenizer, messages, index, full, where)
            inside = (offsets[:, 0] >= start) & (offsets[:, 1] <= end)
            mask |= inside & (offsets[:, 0] < _after_marker(full, offsets[inside & special], end))
    return Document(tokens, mask)


def _turn_span(tokenizer: Tokenizer, messages: list[dict], index: int, full: str, where: str) -> tuple[int, int]:
    """First and last + 1 character of an assistant turn in the rendered conversation."""
    before = _render(tokenizer, messages[:index], where, add_generation_prompt=True)
    upto = _render(tokenizer, messages[: index + 1], where)
    if not (full.startswith(upto) and upto.startswith(before)):
        raise RewrittenConversation(f"{where}: the template renders message {index + 1} differently when more follow",
                                    "a template that only appends, or one with {% generation %} marks",
                                    "mark the assistant's text in chat_template with {% generation %} ... "
                                    "{% endgeneration %}")  # fmt: skip
    return len(before), len(upto)


def _after_marker(full: str, special_offsets: np.ndarray, end: int) -> int:
    """Where the supervised part of a turn stops: after its last marker if only space follows, else at its end."""
    if len(special_offsets):
        after = int(special_offsets[-1, 1])
        if not full[after:end].strip():
            return after
    return end


def _special_ids(tokenizer: Tokenizer) -> list[int]:
    return [index for index, token in tokenizer.added_tokens_decoder.items() if token.special]


def _marked_by_template(tokenizer: Tokenizer, messages: list[dict], where: str) -> Document:
    settings = {"return_assistant_tokens_mask": True, "tokenizer_kwargs": {"return_offsets_mapping": True}}
    encoded = _apply(tokenizer, messages, where, tokenize=True, return_dict=True, **settings)
    # transformers marks only the first token of a turn's last character; the others share its offsets.
    offsets = [tuple(span) for span in encoded["offset_mapping"]]
    marked = {span for span, mask in zip(offsets, encoded["assistant_masks"], strict=True) if mask}
    return Document(np.array(encoded["input_ids"], np.int32), np.array([span in marked for span in offsets], bool))


def _template(tokenizer: Tokenizer) -> str:
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = template.get("default")
    if not template:
        raise SpecaufError("the tokenizer has no chat template",
                           "chat_template in tokenizer_config.json, or chat_template.jinja beside it",
                           "use the tokenizer of a chat model, or plain text")  # fmt: skip
    return template


def _render(tokenizer: Tokenizer, messages: list[dict], where: str, add_generation_prompt: bool = False) -> str:
    return _apply(tokenizer, messages, where, tokenize=False, add_generation_prompt=add_generation_prompt)


def _apply(tokenizer: Tokenizer, messages: list[dict], where: str, **settings):
    try:
        return tokenizer.apply_chat_template(messages, **settings)
    except ImportError:
        raise  # jinja2 is missing: not the record's fault
    except Exception as error:  # a template may raise anything, jinja2's TemplateError first of all
        raise RefusedConversation(f"{where}: the chat template refuses this conversation: {error}",
                           "roles and an order that the template knows", "correct the record") from error  # fmt: skip


def encode_prompt(tokenizer: Tokenizer, messages: list[dict]) -> list[int]:
    """Token ids of a conversation that awaits the assistant's answer.

    Raises:
      SpecaufError: no template, or one that refuses the conversation.
    """
    _template(tokenizer)
    text = _render(tokenizer, messages, "prompt", add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def encode_texts(tokenizer: Tokenizer, texts: list[str]) -> list[Document]:
    """Tokens of each text and the end-of-text token, all of them supervised; many texts at once use all cores."""
    if not texts:
        return []  # transformers does not take an empty batch
    # A special token's name in plain text is text: it must not end a document or stand for a mask.
    encoded = tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    documents = [np.array(ids + end, np.int32) for ids in encoded]
    return [Document(tokens, np.ones(len(tokens), bool)) for tokens in documents]
