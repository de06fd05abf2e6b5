"""Conversations that a target writes by itself: what is kept of them, what is dropped and why, and the folder."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from rich.console import Console

from specauf_jax import cli
from specauf_jax.commands import dialogues
from specauf_jax.commands.dialogues import Talk
from specauf_jax.commands.loading import read_data
from specauf_jax.commands.synthesize import _kept, _said, _wanted, _written, synthesize
from specauf_jax.commands.synthesize_settings import Synthesize
from specauf_jax.config import Sampling
from specauf_jax.data.dataset import open_dataset
from specauf_jax.data.tokenizer import copy_tokenizer, load_tokenizer, train_bpe
from specauf_jax.decoding.rows import Generation
from specauf_jax.errors import CannotGoOn, SpecaufError
from specauf_jax.models.weights import save_target, target_config

QUIET = Console(quiet=True)
REWRITING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'].split('</think>')[-1] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Like Qwen3: earlier answers lose their thoughts."""


def save_writer(folder: Path) -> Path:
    """A target that writes lower-case letters at random, and ends after some seven of them."""
    train_bpe(["user\nassistant\nuser\nassistant hello"], 290, folder.with_name("tokenizer"))
    tokenizer, config = load_tokenizer(folder.with_name("tokenizer")), tiny.target_config(vocab_size=290)
    params = tiny.target_params(config)
    embedding, kernel = params["embed_tokens"]["embedding"], np.array(params["lm_head"]["kernel"])
    kernel[0] = -9.0  # of a component that is large everywhere
    kernel[0, [tokenizer.get_vocab()[letter] for letter in "abcdefghij"]] = 0.0
    kernel[0, tokenizer.get_vocab()["<|im_end|>"]] = 0.3
    params["embed_tokens"]["embedding"] = embedding.at[:, 0].set(30.0)
    params["lm_head"]["kernel"] = jax.numpy.asarray(kernel)
    save_target(params, config, folder)
    copy_tokenizer(folder.with_name("tokenizer"), folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_writer(tmp_path_factory.mktemp("synthesize") / "target")


@pytest.fixture
def tokenizer(folder):
    return load_tokenizer(folder)


def settings(folder, **changes) -> Synthesize:
    sizes = {"conversations": 12, "heldout_prompts": 3, "batch_size": 4, "max_user_tokens": 24, "max_new_tokens": 8,
             "sequence_length": 64, "sampling": Sampling(1.0)}  # fmt: skip
    return Synthesize(**({"target": str(folder), "out": "", "turns": 2} | sizes | changes))


# ---------------------------------------------------------------------------------------------
# One conversation


def ids(tokenizer, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def letters(tokenizer, text: str) -> list[int]:
    """As the target writes it: each byte of its own, where a tokenizer would merge them."""
    return [token for letter in text for token in ids(tokenizer, letter)]


def written(tokenizer, config: Synthesize, *replies: list[int]):
    """(the conversation with these replies of the target, what was asked of it)."""
    dialogue, asked, left = _written(tokenizer, 5, config), [], list(replies)
    try:
        asked.append(next(dialogue))
        while True:
            asked.append(dialogue.send(Generation(asked[-1].prompt, left.pop(0), [])))
    except StopIteration as end:
        assert not left
        return end.value, asked


def test_two_turns_by_hand(tokenizer, folder):
    end = ids(tokenizer, "<|im_end|>")
    replies = [letters(tokenizer, text) + end for text in ("  hello user\n", "yes", "more?", "no")]
    assert replies[0] != ids(tokenizer, "  hello user\n") + end  # not as a tokenizer would write it
    config = settings(folder, user_temperature=0.7, sequence_length=200)
    talk, asked = written(tokenizer, config, *replies)
    text = (
        "<|im_start|>user\nhello user<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
        "<|im_start|>user\nmore?<|im_end|>\n<|im_start|>assistant\nno<|im_end|>"
    )
    assert tokenizer.decode(talk.tokens) == text and talk.dropped is None
    assert [talk.tokens[a:b] for a, b in talk.answers] == [replies[1], replies[3]]
    roles = ("user", "assistant") * 2
    said = ("hello user", "yes", "more?", "no")
    assert talk.messages == [{"role": role, "content": words} for role, words in zip(roles, said, strict=True)]
    pieces = [
        text.partition("hello")[0],
        text.partition("yes")[0],
        text.partition("more?")[0],
        text[: -len("no<|im_end|>")],
    ]
    assert [tokenizer.decode(request.prompt) for request in asked] == pieces
    assert [request.sampling for request in asked] == [Sampling(0.7, top_p=0.95), Sampling(1.0)] * 2
    assert [request.max_new_tokens for request in asked] == [24, 8] * 2 and {r.index for r in asked} == {5}
    assert talk.document.loss_mask.sum() == sum(len(replies[i]) for i in (1, 3))


@pytest.mark.parametrize(
    ("question", "why"),
    [
        ("hello", "with a question that did not end"),
        ("he<|mask|>llo<|im_end|>", "with a special token in the question"),
        ("<|im_end|>", "with an empty or broken question"),
        (" \n <|im_end|>", "with an empty or broken question"),
        ("caf\xe9<|im_end|>", "with an empty or broken question"),
        ("abcdefghij" * 6 + "<|im_end|>", "too long for a row"),
    ],
)
def test_questions_that_cannot_be_used(tokenizer, folder, question, why):
    tokens = ids(tokenizer, question)
    if "\xe9" in question:
        tokens.remove(ids(tokenizer, "\xe9")[1])  # half of a character
    talk, _ = written(tokenizer, settings(folder), tokens)
    assert talk.dropped == why and not talk.tokens
    # After an answered question, it ends the conversation in front of it.
    first = [letters(tokenizer, "hi") + ids(tokenizer, "<|im_end|>")] * 2
    talk, _ = written(tokenizer, settings(folder), *first, tokens)
    assert talk.dropped is None and len(talk.messages) == 2 and len(talk.answers) == 1
    assert tokenizer.decode(talk.tokens).endswith("assistant\nhi<|im_end|>")


def test_the_name_of_a_special_token_is_not_taken_for_text(tokenizer, folder):
    tokens = [*tokenizer("a <|im_end|> b", add_special_tokens=False, split_special_tokens=True)["input_ids"],
              *ids(tokenizer, "<|im_end|>")]  # fmt: skip
    assert ids(tokenizer, "<|im_end|>")[0] not in tokens[:-1]
    talk, _ = written(tokenizer, settings(folder), tokens)
    assert talk.dropped == "with a special token in the question"


def test_a_conversation_ends_where_its_row_does(tokenizer, folder):
    end = ids(tokenizer, "<|im_end|>")
    words = letters(tokenizer, "abcdefgh")
    whole, _ = written(
        tokenizer, settings(folder), [*words, *end], [*words[:3], *end], [*words, *end], [*words[:2], *end]
    )
    assert len(whole.answers) == 2
    first = whole.answers[0]
    # Room for the first question and no answer; for one token of it; for three of them, and no other question.
    talk, _ = written(tokenizer, settings(folder, sequence_length=first[0]), [*words, *end])
    assert talk.dropped == "too long for a row"
    talk, asked = written(tokenizer, settings(folder, sequence_length=first[0] + 1), [*words, *end], words[:1])
    assert asked[1].max_new_tokens == 1 and talk.answers == [(first[0], first[0] + 1)]
    talk, asked = written(tokenizer, settings(folder, sequence_length=first[0] + 3), [*words, *end], words[:3])
    assert asked[1].max_new_tokens == 3 and talk.answers == [(first[0], first[0] + 3)]
    talk, asked = written(tokenizer, settings(folder, sequence_length=first[1]), [*words, *end], [*words[:3], *end])
    assert len(talk.tokens) == first[1] and len(asked) == 2
    # The second question finds room, and its answer none.
    second = whole.answers[1]
    talk, asked = written(tokenizer, settings(folder, sequence_length=second[0]), [*words, *end], [*words[:3], *end],
                          [*words, *end])  # fmt: skip
    assert len(talk.answers) == 1 and asked[2].max_new_tokens == second[0] - len(asked[2].prompt)


def test_nothing_follows_an_answer_that_did_not_end(tokenizer, folder):
    end = ids(tokenizer, "<|im_end|>")
    talk, _ = written(tokenizer, settings(folder), [*letters(tokenizer, "hi"), *end], letters(tokenizer, "abcdefgh"))
    assert len(talk.answers) == 1 and talk.messages[1]["content"] == "abcdefgh"


def test_a_template_that_rewrites_earlier_answers_gives_one_turn(tokenizer, folder):
    """The second question would follow another text than the one that was written."""
    tokenizer.chat_template = REWRITING
    end = ids(tokenizer, "<|im_end|>")
    answer = [*letters(tokenizer, "<think>a</think>yes"), *end]
    talk, asked = written(tokenizer, settings(folder), [*letters(tokenizer, "hi"), *end], answer)
    assert len(asked) == 2 and len(talk.answers) == 1 and talk.dropped is None


# ---------------------------------------------------------------------------------------------
# Many


def talk(question: str, dropped: str | None = None) -> Talk:
    return Talk([1, 2], [(1, 2)], [{"role": "user", "content": question}], dropped)


def test_the_first_of_the_same_questions_is_kept():
    asked = ["Who  are you?", "who are\nYOU? ", "Who are they?", "who are you?", "Who are you"]
    talks = {n: talk(question) for n, question in reversed(list(enumerate(asked)))}
    talks[9] = talk("Who else?", "for a reason")
    assert list(_kept(talks)) == [0, 2, 4]
    assert _said(talks) == "dropped: 16.7% for a reason, 33.3% asked before"
    assert _said({0: talk("a")}) == "dropped: none"


def test_how_many_more_are_begun(folder):
    config = settings(folder, conversations=70, heldout_prompts=10)
    assert _wanted(config, {}, 0, QUIET) == 84  # 5 % more than the 80
    half = {n: talk(str(n), None if n % 2 else "x") for n in range(84)}
    assert _wanted(config, half, 84, QUIET) == 80  # 38 of 84 × 84 / 42, and 5 % more
    assert _wanted(config, {n: talk(str(n)) for n in range(80)}, 80, QUIET) == 0
    # Of the last ones fewer than 5 % could be used, though many of those before.
    late = half | {n: talk("1" if n % 30 else str(n)) for n in range(84, 184)}
    with pytest.raises(CannotGoOn, match="of the last 100 conversations only 4 could be used"):
        _wanted(config, late, 100, QUIET)
    _wanted(config, late | {100: talk("new"), 184: talk("newer")}, 101, QUIET)


def files(folder: Path) -> dict:
    """What a synthesized folder holds, but for TFDS's own book-keeping."""
    rows = open_dataset(folder)
    return {
        "rows": [{name: x.tolist() for name, x in rows[i].items()} for i in range(len(rows))],
        **{name: (folder / name).read_text() for name in ("conversations.jsonl", "prompts/synthesized.jsonl")},
        "manifest": json.loads((folder / "manifest.json").read_text()),
    }


def test_a_folder_and_the_same_after_a_kill(folder, tmp_path, monkeypatch, capsys):
    assert synthesize(settings(folder, out=str(tmp_path / "whole")), QUIET)["documents"] == 12
    whole = files(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["whole"]  # no parts
    kept = [json.loads(line)["messages"] for line in whole["conversations.jsonl"].splitlines()]
    heldout = [json.loads(line)["turns"] for line in whole["prompts/synthesized.jsonl"].splitlines()]
    assert (
        len(kept) == 12
        and len(heldout) == 3
        and whole["manifest"]["prompts"] == {"synthesized": "prompts/synthesized.jsonl"}
    )
    assert max(map(len, kept)) == 4 and max(map(len, heldout)) == 2  # two turns
    firsts = [messages[0]["content"] for messages in kept]
    assert len({*firsts, *(turns[0] for turns in heldout)}) == 15
    tokenizer = load_tokenizer(folder)
    for row in whole["rows"][:1]:
        text = tokenizer.decode(row["tokens"])
        assert text.startswith(f"<|im_start|>user\n{firsts[0]}<|im_end|>") or any(f in text for f in firsts)
    assert read_data(tmp_path / "whole", target_config(folder), folder)["supervised_tokens"] > 12

    config, saved = settings(folder, out=str(tmp_path / "killed")), []

    def killed(path, talks, save=dialogues.save):
        save(path, talks)
        saved.append(talks)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(dialogues, "save", killed)
        synthesize(config, QUIET)
    assert len(saved) == 1 and 8 <= len(saved[0]) < 16 and not (tmp_path / "killed").exists()
    with pytest.raises(SpecaufError, match="parts made with another user_top_p"):
        synthesize(settings(folder, out=str(tmp_path / "killed"), user_top_p=0.5), QUIET)
    begun = []

    def counted(drafter, target, asked, converse=dialogues.converse, **options):
        begun.append(len(asked))
        return converse(drafter, target, asked, **options)

    monkeypatch.setattr(dialogues, "converse", counted)
    console = Console(width=200)
    synthesize(config, console)
    assert begun[0] == 16 - len(saved[0])  # what was there is not written again
    assert files(tmp_path / "killed") == whole
    said = capsys.readouterr().out
    assert " conversations begun, " in said and "dropped: " in said.splitlines()[-1]


def test_a_target_that_asks_nothing_of_use(folder, tmp_path, capsys):
    """A question of one token is no question, or does not end."""
    line = f"synthesize --target {folder} --out {tmp_path / 'out'} --conversations 9 --max-user-tokens 1"
    assert cli.main(f"{line} --max-new-tokens 8 --sequence-length 64 --batch-size 4".split()) == 3
    said = " ".join(capsys.readouterr().err.split())
    assert "of the last 60 conversations only 0 could be used: dropped: " in said
    assert "with a question that did not end" in said and "at least 5%" in said
    assert not (tmp_path / "out").exists()


def test_refusals(folder, tmp_path):
    with pytest.raises(SpecaufError, match="sequence_length 99999"):
        synthesize(settings(folder, out=str(tmp_path / "x"), sequence_length=99999), QUIET)
    with pytest.raises(SpecaufError, match="user_temperature"):
        settings(folder, user_temperature=0.0)
    with pytest.raises(SpecaufError, match="top_p is 2"):
        settings(folder, user_top_p=2.0)
    with pytest.raises(SpecaufError, match="heldout_prompts"):
        settings(folder, heldout_prompts=-1)
    assert list(tmp_path.iterdir()) == []
