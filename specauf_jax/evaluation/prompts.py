"""Prompt files: JSON lines of {"prompt": str}, {"turns": [str, ...]} or conversations, whose user turns are asked."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from specauf_jax.data.chat import encode_prompt, encode_start
from specauf_jax.data.rows import CONVERSATION_KEYS, BadRecord, Row, is_pipe, read_rows
from specauf_jax.data.sources import Unusable, checked_text, read_questions
from specauf_jax.data.tokenizer import Tokenizer
from specauf_jax.errors import SpecaufError
from specauf_jax.files import local_copy


@dataclass(frozen=True)
class Prompt:
    """Text to continue as it is, or the user's turns of a conversation and the system message before them."""

    text: str | None
    turns: tuple[str, ...]
    system: str | None = None

    @property
    def opening(self) -> list[dict]:
        """The messages before the user's turns."""
        return [] if self.system is None else [{"role": "system", "content": self.system}]


def read_prompts(path) -> list[Prompt]:
    """All prompts of a file, as `read_rows` takes it.

    Raises:
      SpecaufError: naming the file and line that cannot be used.
    """
    file = local_copy(path)
    if not (file.is_file() or is_pipe(file)):
        raise SpecaufError(f"{path} does not exist", "a JSONL file of prompts", "check the path")
    prompts = [_parse(row) for row in read_rows(file, lines=True)]
    if not prompts:
        raise SpecaufError(f"{path} holds no prompt", "at least one line", "check the file")
    return prompts


def _parse(row: Row | BadRecord) -> Prompt:
    try:
        if isinstance(row, BadRecord):
            raise Unusable(row.reason)
        shown = json.dumps(row.value, default=str)[:80]
        try:
            return _prompt(row.value if isinstance(row.value, dict) else {})
        except Unusable as reason:
            raise Unusable(f"{reason}: {shown}") from None
    except (Unusable, RecursionError) as reason:
        raise SpecaufError(f"{row.where}: {reason}", '{"prompt": "text"}, {"turns": ["text", ...]} or a conversation',
                           "correct the line") from reason  # fmt: skip


def _prompt(fields: dict) -> Prompt:
    kinds = [key for key in ("prompt", "turns", *CONVERSATION_KEYS) if fields.get(key)]
    match kinds, fields:
        case ["prompt"], {"prompt": str(text)} if not (fields.get("system") or fields.get("tools")):
            return Prompt(text=checked_text(text), turns=())
        case ["prompt"], {"prompt": list(messages)}:
            fields = fields | {"messages": messages}
        case ["turns"], {"turns": list(turns)} if all(isinstance(turn, str) and turn for turn in turns):
            fields = fields | {"messages": [{"role": "user", "content": turn} for turn in turns]}
        case _ if not kinds or not set(kinds) <= set(CONVERSATION_KEYS):
            raise Unusable("no prompt, or more than one")
    system, questions = read_questions(fields)
    return Prompt(text=None, turns=questions, system=system)


def encode_first_turn(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    """Token ids of a plain prompt, or of a conversation up to its first answer."""
    if prompt.text is not None:
        return encode_start(tokenizer, prompt.text)
    return encode_prompt(tokenizer, [*prompt.opening, {"role": "user", "content": prompt.turns[0]}])


def answer(
    tokenizer: Tokenizer, prompts: Sequence[Prompt], generate: Callable[[list[list[int]], list[int]], Sequence]
) -> list[list]:
    """Answer every turn of every prompt, each after the answers to those before it.

    Args:
      tokenizer: with a chat template if any prompt has turns.
      prompts: as from `read_prompts`.
      generate: token ids of many requests, and the index of the prompt behind each → a Generation each.

    Returns:
      For each prompt, its turns' Generations.
    """
    answers: list[list] = [[] for _ in prompts]
    messages: list[list[dict]] = [prompt.opening for prompt in prompts]
    for turn in range(max(len(prompt.turns) or 1 for prompt in prompts)):
        open_ = [i for i, prompt in enumerate(prompts) if turn < (len(prompt.turns) or 1)]
        for i in open_:
            if turn:
                reply = tokenizer.decode(answers[i][-1].tokens, skip_special_tokens=True)
                messages[i].append({"role": "assistant", "content": reply})
            if prompts[i].turns:
                messages[i].append({"role": "user", "content": prompts[i].turns[turn]})
        requests = [
            encode_prompt(tokenizer, messages[i]) if messages[i] else encode_first_turn(tokenizer, prompts[i])
            for i in open_
        ]
        for i, generation in zip(open_, generate(requests, open_), strict=True):
            answers[i].append(generation)
    return answers
