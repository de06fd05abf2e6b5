"""Prompt files: one JSON object a line, {"prompt": str} or {"turns": [str, ...]}."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from specauf_jax.data.chat import encode_prompt
from specauf_jax.data.tokenizer import Tokenizer
from specauf_jax.errors import SpecaufError
from specauf_jax.files import as_path, read_bytes


@dataclass(frozen=True)
class Prompt:
    """Text to continue as it is, or the user's turns of a conversation."""

    text: str | None
    turns: tuple[str, ...]


def read_prompts(path) -> list[Prompt]:
    """All prompts of a JSONL file.

    Raises:
      SpecaufError: naming the file and line that cannot be used.
    """
    path = as_path(path)
    if not path.is_file():
        raise SpecaufError(f"{path} does not exist", "a JSONL file of prompts", "check the path")
    try:
        lines = read_bytes(path).decode("utf-8").split("\n")  # JSON strings may hold other line ends
    except UnicodeDecodeError as error:
        raise SpecaufError(f"{path} is not UTF-8: {error}", "a JSONL file of prompts", "convert it") from error
    prompts = [_parse(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise SpecaufError(f"{path} holds no prompt", "at least one line", "check the file")
    return prompts


def _parse(line: str, where: str) -> Prompt:
    expected = '{"prompt": "text"} or {"turns": ["text", ...]}'
    try:
        row = json.loads(line)
    except ValueError as error:
        raise SpecaufError(f"{where} is not JSON: {error}", expected, "correct the line") from error
    if isinstance(row, dict):
        prompt, turns = row.get("prompt"), row.get("turns")
        if isinstance(prompt, str) and prompt and turns is None:
            return Prompt(text=prompt, turns=())
        if prompt is None and isinstance(turns, list) and turns and all(isinstance(t, str) and t for t in turns):
            return Prompt(text=None, turns=tuple(turns))
    raise SpecaufError(f"{where} is {line[:80]}", expected, "correct the line")


def encode_first_turn(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    """Token ids of a plain prompt, or of a conversation up to its first answer."""
    if prompt.text is not None:
        return tokenizer.encode(prompt.text, add_special_tokens=False)
    return encode_prompt(tokenizer, [{"role": "user", "content": prompt.turns[0]}])


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
    messages: list[list[dict]] = [[] for _ in prompts]
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
