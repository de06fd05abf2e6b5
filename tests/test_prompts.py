"""Prompt files, line by line."""

import gzip
import json

import pytest

from specauf_jax.errors import SpecaufError
from specauf_jax.evaluation.prompts import Prompt, answer, encode_first_turn, read_prompts

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}
SYSTEM = {"role": "system", "content": "S"}


def read(tmp_path, *rows, name="p.jsonl"):
    (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_prompts(tmp_path / name)


def test_strings_may_hold_other_line_ends(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a\u2028b"}\n\n{"turns": ["x\u0085", "y"]}\n', encoding="utf-8")
    assert read_prompts(tmp_path / "p.jsonl") == [
        Prompt(text="a\u2028b", turns=()),
        Prompt(text=None, turns=("x\u0085", "y")),
    ]


def test_byte_order_marks_gzip_and_arrays(tmp_path):
    line = b'{"prompt": "a"}\n'
    for name, data in (("a", b"\xef\xbb\xbf" + line), ("b.gz", gzip.compress(line)), ("c.json", b"[" + line + b"]")):
        (tmp_path / name).write_bytes(data)
        assert read_prompts(tmp_path / name) == [Prompt("a", ())]


def test_conversations_ask_their_user_turns(tmp_path):
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}, {"from": "human", "value": "Ho"}]
    asked = Prompt(None, ("Hi", "Ho"), "S")
    rows = [
        {"messages": [SYSTEM, USER, ANSWER, USER | {"content": "Ho"}]},
        {"conversations": turns, "messages": None, "system": "S"},
        {"turns": ["Hi", "Ho"], "system": "S", "prompt": None},
        {"prompt": [SYSTEM, USER, ANSWER, USER | {"content": [{"type": "text", "text": "Ho"}]}]},
    ]
    assert read(tmp_path, *rows) == [asked] * 4


class Words:
    """A tokenizer whose ids are the words of what it is asked to render."""

    chat_template, template_args = "yes", {}

    def apply_chat_template(self, messages, **_):
        return " ".join(f"{message['role'][0]}:{message['content']}" for message in messages)

    def __call__(self, text, **_):
        return {"input_ids": text.split(), "special_tokens_mask": [0] * len(text.split())}

    def decode(self, tokens, **_):
        return " ".join(tokens)


def test_the_system_message_stands_before_every_turn(tmp_path):
    class Reply:
        tokens = ("Yo",)

    asked = []
    prompt = Prompt(None, ("Hi", "Ho"), "S")
    answer(Words(), [prompt], lambda requests, _: asked.extend(requests) or [Reply() for _ in requests])
    assert asked == [["s:S", "u:Hi"], ["s:S", "u:Hi", "a:Yo", "u:Ho"]]
    assert encode_first_turn(Words(), prompt) == ["s:S", "u:Hi"]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "a\ud83d b"}, "p.jsonl:2: holds half a surrogate pair"),
        ({"turns": ["a\ud83d b"]}, "p.jsonl:2: turn 1 holds half a surrogate pair"),
        ({"prompt": "a", "turns": ["b"]}, "p.jsonl:2: no prompt, or more than one"),
        ({"prompt": "a", "system": "S"}, "no prompt, or more than one"),
        ({"prompt": "a", "messages": [USER]}, "no prompt, or more than one"),
        ({"text": "a"}, 'no prompt, or more than one: {"text": "a"}'),
        ({"messages": [USER], "tools": [{"a": 1}]}, "without tools"),
        ({"messages": [ANSWER]}, "a prompt has user turns"),
        ({"messages": [USER, SYSTEM]}, "at most one system message before them"),
        ({"messages": [USER | {"name": "Bob"}]}, "a prompt has user turns"),
        ({"messages": [{"role": "tool", "content": "2"}, USER]}, "a prompt has user turns"),
        ({"messages": [USER | {"content": [{"type": "image"}]}]}, "a part of type 'image'"),
        ([1], "no prompt, or more than one"),
        (3, "no prompt, or more than one"),
    ],
)
def test_what_cannot_be_asked_is_named(tmp_path, row, said):
    with pytest.raises(SpecaufError) as refused:
        read(tmp_path, {"prompt": "a"}, row)
    assert said in refused.value.found


@pytest.mark.parametrize(
    "line", [b"[" * 100_000, b'{"prompt": ' + b"9" * 5000 + b"}", b'{"prompt": "\xff"}', b"PK\x03\x04"]
)
def test_what_is_no_json_is_named(tmp_path, line):
    (tmp_path / "p.jsonl").write_bytes(line)
    with pytest.raises(SpecaufError, match="p.jsonl"):
        read_prompts(tmp_path / "p.jsonl")
