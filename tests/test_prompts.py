"""Prompt files, line by line."""

from specauf_jax.evaluation.prompts import Prompt, read_prompts


def test_strings_may_hold_other_line_ends(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a\u2028b"}\n\n{"turns": ["x\u0085", "y"]}\n', encoding="utf-8")
    assert read_prompts(tmp_path / "p.jsonl") == [
        Prompt(text="a\u2028b", turns=()),
        Prompt(text=None, turns=("x\u0085", "y")),
    ]
