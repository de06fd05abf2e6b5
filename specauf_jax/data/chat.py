"""Conversations and texts as token documents: chat template and loss mask.

The loss mask is True exactly on what the model must write itself: the assistant's tokens and the
marker that ends its turn, not the line break that a template puts after the marker.
"""

import dataclasses
import itertools
import os
import re
from collections.abc import Iterator, Sequence

import numpy as np

from specauf_jax.data.packing import Document
from specauf_jax.data.sources import Record
from specauf_jax.data.tokenizer import CLOCK, Tokenizer
from specauf_jax.errors import SpecaufError


class RefusedConversation(SpecaufError):
    """The chat template cannot render this conversation, or not so that the answers can be found."""


class RewrittenConversation(RefusedConversation):
    """The chat template renders earlier answers otherwise once a later one follows (as Qwen3 drops their thinking)."""


_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_SAID = ("content", "reasoning_content", "reasoning", "thinking", "thought", "tool_calls", "name")
"""Keys by which a message says something: the rendering must hold all of them."""


def conversation_documents(tokenizer: Tokenizer, record: Record) -> list[Document]:
    """A conversation as one document; or, where the template rewrites earlier answers, as one for each answer.

    Then every document ends with its answer, the only one that is supervised, after just what the
    template shows of the conversation when that answer is written. Errors as for `encode_conversation`.
    """
    learned = [index for index in record.answers if index not in record.unlearned]
    try:
        return [encode_conversation(tokenizer, record, learned)]
    except RewrittenConversation:
        parts = [dataclasses.replace(record, content=record.messages[: index + 1]) for index in learned]
        return [encode_conversation(tokenizer, part, part.answers[-1:]) for part in parts]


def encode_conversation(tokenizer: Tokenizer, record: Record, learned: Sequence[int]) -> Document:
    """Tokens and loss mask of a conversation under the tokenizer's chat template.

    Args:
      tokenizer: of `tokenizer.load_tokenizer`.
      record: with messages.
      learned: indices of the answers to supervise.

    Raises:
      SpecaufError: no template, or one that refuses or rewrites this conversation, or leaves out a part of it.
    """
    marked = _GENERATION.search(_template(tokenizer, record.tools)) is not None
    full = _rendered_whole(tokenizer, record, learned)
    if marked and list(learned) == record.answers:
        return _marked_by_template(tokenizer, record)[0]
    # One tokenisation of the full text: tokens next to a turn's border must be those seen in use.
    encoded = tokenizer(full, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    tokens, offsets = np.array(encoded["input_ids"], np.int32), np.array(encoded["offset_mapping"]).reshape(-1, 2)
    mask = np.zeros(len(tokens), bool)
    for index in learned:
        start, end = _turn_span(tokenizer, record, index, full)
        inside = (offsets[:, 0] >= start) & (offsets[:, 1] <= end)
        content = record.messages[index]["content"].strip()
        said = max(full.find(content, start, end) + len(content), start)
        mask |= inside & (offsets[:, 0] < _after_marker(tokenizer, full, tokens[inside], offsets[inside], said, end))
    if marked:
        mask &= _marked_by_template(tokenizer, record)[0].loss_mask
    return Document(tokens, mask)


def _turn_span(tokenizer: Tokenizer, record: Record, index: int, full: str) -> tuple[int, int]:
    """First and last + 1 character of an assistant turn in the rendered conversation."""
    before = _render(tokenizer, record, index, add_generation_prompt=True)
    upto = _render(tokenizer, record, index + 1)
    if full.startswith(upto) and upto.startswith(before):
        return len(before), len(upto)
    # A generation prompt may open what the answer lacks, as a thought: then the answer begins where the two part.
    asked = _render(tokenizer, record, index)
    if not (full.startswith(upto) and upto.startswith(asked)):
        raise RewrittenConversation(f"{record.where}: the template renders message {index + 1} differently when more "
                                    "follow", "a template that only appends, or one with {% generation %} marks",
                                    "mark the assistant's text in chat_template with {% generation %} ... "
                                    "{% endgeneration %}")  # fmt: skip
    content, parting = record.messages[index]["content"].strip(), len(os.path.commonprefix([before, upto]))
    at = upto.find(content, len(asked)) if content else -1
    return (parting if at < 0 else min(at, parting)), len(upto)


def _after_marker(tokenizer: Tokenizer, full: str, tokens: np.ndarray, offsets: np.ndarray, said: int, end: int) -> int:
    """Where the supervised part of a turn stops: after its marker, or at its end if no marker closes it.

    Args:
      tokenizer: of the conversation.
      full: the rendered conversation.
      tokens, offsets: of the turn.
      said: where the answer's own text ends.
      end: last + 1 character of the turn.
    """
    stops = offsets[np.isin(tokens, tokenizer.stops) & (offsets[:, 0] >= said), 1]
    if len(stops):
        return int(stops[0])
    special = offsets[np.isin(tokens, _special_ids(tokenizer)), 1]
    return int(special[-1]) if len(special) and not full[special[-1] : end].strip() else end


def _special_ids(tokenizer: Tokenizer) -> list[int]:
    return [index for index, token in tokenizer.added_tokens_decoder.items() if token.special]


def _marked_by_template(tokenizer: Tokenizer, record: Record) -> tuple[Document, bool]:
    """The document by the template's marks; and whether they left out the marker of a turn's end, which is added."""
    settings = {"return_assistant_tokens_mask": True, "tokenizer_kwargs": {"return_offsets_mapping": True}}
    encoded = _apply(tokenizer, record, tokenize=True, return_dict=True, **settings)
    # transformers marks only the first token of a turn's last character; the others share its offsets.
    offsets = [tuple(span) for span in encoded["offset_mapping"]]
    marked = {span for span, mask in zip(offsets, encoded["assistant_masks"], strict=True) if mask}
    tokens, mask = np.array(encoded["input_ids"], np.int32), np.array([span in marked for span in offsets], bool)
    ends = np.flatnonzero(mask[:-1] & ~mask[1:] & np.isin(tokens[1:], tokenizer.stops)) + 1
    ends = ends[~np.isin(tokens[ends - 1], tokenizer.stops)]
    mask[ends] = True
    return Document(tokens, mask), bool(len(ends))


def _rendered_whole(tokenizer: Tokenizer, record: Record, learned: Sequence[int] = (), **settings) -> str:
    """The rendering, which must hold all that the record says, of its answers the learned ones."""
    full = _render(tokenizer, record, **settings)
    for what, index, other in _without(record, learned):
        try:
            left_out = _render(tokenizer, other, **settings) == full
        except RefusedConversation:  # so it is needed
            continue
        if left_out:  # thoughts of an answer may be shown only until the next question
            kind = RewrittenConversation if index in record.answers[:-1] else RefusedConversation
            raise kind(f"{record.where}: the chat template leaves out {what}", "all of the conversation",
                       "take it out of the record, or use a template that knows it")  # fmt: skip
    return full


def _without(record: Record, learned: Sequence[int]) -> Iterator[tuple[str, int | None, Record]]:
    """What templates may not know: its name, its message and the record without it. Users and answers they all know."""
    if record.tools:
        yield "'tools'", None, dataclasses.replace(record, tools=None)
    for index, message in enumerate(record.messages):
        role = message["role"]
        if role == "assistant" and index not in learned:
            continue
        for key in [key for key in _SAID if message.get(key)]:
            if key == "content" and (role == "user" or (role == "assistant" and "tool_calls" not in message)):
                continue
            if key == "name" and role == "tool":  # as its tool_call_id, told by the order of turns
                continue
            text = {"content": f"{message['content']} …"} if key == "content" else {}
            other = {name: value for name, value in message.items() if name != key} | text
            messages = [*record.messages[:index], other, *record.messages[index + 1 :]]
            yield f"{key!r} of message {index + 1} ({role})", index, dataclasses.replace(record, content=messages)


def _template(tokenizer: Tokenizer, tools: list | None = None) -> str:
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = (tools and template.get("tool_use")) or template.get("default")
    if not template:
        raise SpecaufError("the tokenizer has no chat template",
                           "chat_template in tokenizer_config.json, or chat_template.jinja beside it",
                           "use the tokenizer of a chat model, or plain text")  # fmt: skip
    return template


def _render(tokenizer: Tokenizer, record: Record, count: int | None = None, add_generation_prompt: bool = False) -> str:
    """The first `count` messages of a conversation, or all."""
    part = dataclasses.replace(record, content=record.messages[:count])
    return _apply(tokenizer, part, tokenize=False, add_generation_prompt=add_generation_prompt)


def _apply(tokenizer: Tokenizer, record: Record, **settings):
    try:
        return tokenizer.apply_chat_template(
            record.messages, tools=record.tools, **{**settings, **tokenizer.template_args}
        )
    except ImportError:
        raise  # jinja2 is missing: not the record's fault
    except Exception as error:  # a template may raise anything, jinja2's TemplateError first of all
        raise RefusedConversation(f"{record.where}: the chat template refuses this conversation: {error}",
                           "roles and an order that the template knows", "correct the record") from error  # fmt: skip


_EXAMPLE = Record("example", [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}])
_CLOCK_NOTE = ("the chat template writes the date or time of the clock, so that other days give other tokens; pin it: "
               f"--template-args {CLOCK}='26 Jul 2024'")  # fmt: skip


def clock_notes(tokenizer: Tokenizer) -> list[str]:
    """A warning if the chat template reads the clock."""
    try:
        days = {_apply(tokenizer, _EXAMPLE, tokenize=False, **{CLOCK: lambda _, day=day: day}) for day in "12"}
    except RefusedConversation:  # it takes other conversations than this one
        return []
    return [_CLOCK_NOTE] if len(days) == 2 else []


def template_notes(tokenizer: Tokenizer) -> list[str]:
    """Warnings of what a user should know of how the chat template renders conversations."""
    notes = clock_notes(tokenizer)
    try:
        if _GENERATION.search(_template(tokenizer)) and _marked_by_template(tokenizer, _EXAMPLE)[1]:
            notes.append("the template's {% generation %} marks leave out the end of the turn; it is supervised too")
        asked = _render(tokenizer, _EXAMPLE, 1, add_generation_prompt=True)
        if not _render(tokenizer, _EXAMPLE).startswith(asked):
            notes.append(f"the template asks for an answer with {asked[-40:]!r}, but does not write answers so "
                         "(a thought?): they are learned as it writes them")  # fmt: skip
    except RefusedConversation:
        pass
    return notes


def turn_end(tokenizer: Tokenizer) -> int | None:
    """The special token that the chat template writes after an answer, but for spaces; None if it writes none."""
    try:
        after = _render(tokenizer, _EXAMPLE).rpartition(_EXAMPLE.messages[-1]["content"])[2].lstrip()
    except RefusedConversation:
        return None
    special = {token.content: id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
    return next((special[text] for text in sorted(special, key=len, reverse=True) if after.startswith(text)), None)


def encode_prompt(tokenizer: Tokenizer, messages: list[dict]) -> list[int]:
    """Token ids of a conversation that awaits the assistant's answer.

    Raises:
      SpecaufError: no template, or one that refuses the conversation or leaves out a part of it.
    """
    text = conversation_text(tokenizer, messages)
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


_USER = "(the user's turn)"


def user_opening(tokenizer: Tokenizer, messages: list[dict]) -> str:
    """What the chat template writes before the user's next turn, after these messages.

    Raises:
      SpecaufError: no template, or one that refuses the conversation or leaves out a part of it.
    """
    _template(tokenizer)
    messages = [*messages, {"role": "user", "content": _USER}]
    return _rendered_whole(tokenizer, Record("conversation", messages)).rpartition(_USER)[0]


def conversation_text(tokenizer: Tokenizer, messages: list[dict]) -> str:
    """A conversation that awaits the assistant's answer, as text. Raises as `encode_prompt`."""
    _template(tokenizer)
    return _rendered_whole(tokenizer, Record("prompt", messages), add_generation_prompt=True)


def encode_texts(tokenizer: Tokenizer, texts: list[str]) -> list[Document]:
    """Tokens of each text and the end-of-text token, all of them supervised; many texts at once use all cores.

    What the tokenizer puts before a text by itself is left to `front_ids`.
    """
    if not texts:
        return []  # transformers does not take an empty batch
    # A special token's name in plain text is text: it must not end a document or stand for a mask.
    encoded = tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    documents = [np.array(ids + end, np.int32) for ids in encoded]
    return [Document(tokens, np.ones(len(tokens), bool)) for tokens in documents]


def front_ids(tokenizer: Tokenizer) -> list[int]:
    """Ids that the tokenizer puts before every text by itself, as a beginning of text."""
    encoded = tokenizer("a", return_special_tokens_mask=True, verbose=False)
    marked = zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True)
    return [token for token, _ in itertools.takewhile(lambda pair: pair[1], marked)]


def encode_start(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a text that goes on, as `encode_texts` and `front_ids` give them."""
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    return front_ids(tokenizer) + list(ids)
