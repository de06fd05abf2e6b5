"""Answers are replaced turn by turn, and a conversation that breaks off stays broken off."""

import numpy as np

from specauf_jax.commands.regenerate import _answered, _assemble
from specauf_jax.commands.regenerate_settings import Regenerate
from specauf_jax.data.dataset import MANIFEST_KEYS
from specauf_jax.data.packing import Document
from specauf_jax.data.tokenizer import train_bpe
from specauf_jax.decoding.rows import Generation

STOP = 99


def conversation(*runs: tuple[int, bool]) -> Document:
    """Runs of (length, supervised); tokens count up from 0."""
    mask = np.concatenate([np.full(length, supervised) for length, supervised in runs])
    return Document(np.arange(len(mask), dtype=np.int32), mask)


def rewrite(documents, answers: list[list[int]], length: int = 64) -> list[Document]:
    """With the target's answers given, in the order in which they are asked for."""
    answers = iter(answers)
    config = Regenerate(data="", target="", out="", prompt_length=3)

    def held(dialogue):
        try:
            request = next(dialogue)
            while True:
                assert request.max_new_tokens == min(config.max_new_tokens, length - len(request.prompt)) > 0
                request = dialogue.send(Generation(prompt=request.prompt, tokens=next(answers), accepted=[]))
        except StopIteration as end:
            return end.value

    talks = [held(_answered(document, n, (STOP,), config, length)) for n, document in enumerate(documents)]
    return [talk.document for talk in talks if talk.answers]


def test_each_answer_is_replaced_and_each_question_kept():
    [found] = rewrite([conversation((4, False), (2, True), (3, False), (2, True))], [[50, STOP], [60, 61, STOP]])
    assert found.tokens.tolist() == [0, 1, 2, 3, 50, STOP, 6, 7, 8, 60, 61, STOP]
    assert found.loss_mask.tolist() == [False] * 4 + [True] * 2 + [False] * 3 + [True] * 3


def test_nothing_follows_an_answer_that_did_not_end():
    [found] = rewrite([conversation((4, False), (2, True), (3, False), (2, True))], [[50, 51]])
    assert found.tokens.tolist() == [0, 1, 2, 3, 50, 51]


def test_no_turn_is_left_out_to_fit_a_later_one():
    document = conversation((4, False), (2, True), (20, False), (2, True), (3, False), (2, True))
    [found] = rewrite([document], [[50, STOP]], length=24)
    assert found.tokens.tolist() == [0, 1, 2, 3, 50, STOP]


def test_a_text_is_continued_after_its_first_tokens_and_a_short_one_is_dropped():
    [found] = rewrite([conversation((6, True)), conversation((3, True))], [[50, 51]])
    assert found.tokens.tolist() == [0, 1, 2, 50, 51]
    assert found.loss_mask.tolist() == [False] * 3 + [True] * 2


def test_documents_whose_answer_was_cut_are_counted(tmp_path):
    train_bpe(["some text"], 300, tmp_path / "data" / "tokenizer")
    manifest = dict.fromkeys(MANIFEST_KEYS) | {"sequence_length": 16, "prompts": {}, "source": "chats"}
    found = rewrite([conversation((4, False), (2, True))] * 3, [[50, STOP], [50, 51], [STOP]])
    config = Regenerate(data=str(tmp_path / "data"), target="T", out=str(tmp_path / "out"))
    written = _assemble(config, manifest, found, (STOP, 7))
    assert (written["documents"], written["truncated_documents"], written["largest_token_id"]) == (3, 1, STOP)
