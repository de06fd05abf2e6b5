"""Answers are replaced turn by turn, and a conversation that breaks off stays broken off."""

import json

import numpy as np
import tiny
from rich.console import Console

from specauf_jax.commands.prepare import prepare
from specauf_jax.commands.prepare_settings import Prepare
from specauf_jax.commands.regenerate import _answered, _assemble, regenerate
from specauf_jax.commands.regenerate_settings import Regenerate
from specauf_jax.data.dataset import MANIFEST_KEYS, open_dataset
from specauf_jax.data.packing import Document
from specauf_jax.data.tokenizer import train_bpe
from specauf_jax.decoding.rows import Generation
from specauf_jax.models.weights import save_drafter, save_target

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


def test_a_drafter_gives_the_same_documents(tmp_path, capsys):
    target = tiny.target_config(vocab_size=300)
    save_target(tiny.target_params(target), target, tmp_path / "target")
    drafter = tiny.drafter_config(target, mask_token_id=3, target_layer_ids=(1,))
    save_drafter(tiny.drafter_params(drafter), drafter, tmp_path / "drafter")
    train_bpe(["user assistant some text"], 280, tmp_path / "tokenizer")
    questions = ["some text", "text", "some", "user", "text some", "user text"]
    lines = [{"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "text"}]}
             for text in questions]  # fmt: skip
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    console = Console(width=200)
    prepare(Prepare(input=(str(tmp_path / "talks.jsonl"),), tokenizer=str(tmp_path / "tokenizer"),
                    out=str(tmp_path / "data"), sequence_length=56), console)  # fmt: skip

    def rows(name: str, **changes):
        config = Regenerate(data=str(tmp_path / "data"), target=str(tmp_path / "target"), out=str(tmp_path / name),
                            max_new_tokens=20, batch_size=3, **changes)  # fmt: skip
        manifest = regenerate(config, console)
        data = open_dataset(tmp_path / name)
        return manifest["supervised_tokens"], [data[i]["tokens"].tolist() for i in range(len(data))]

    alone = rows("alone")
    assert alone[0] == 6 * 20  # none ended early
    assert rows("sooner", drafter=str(tmp_path / "drafter"), verify_slots="auto") == alone
    assert "of 4 slots, the fastest here" in capsys.readouterr().out
    assert rows("tree", drafter=str(tmp_path / "drafter"), tree_nodes=6) == alone
