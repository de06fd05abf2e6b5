import gzip
import io
import json
import os

import numpy as np
import pytest
from rich.console import Console

from specauf_jax.commands.prepare import prepare
from specauf_jax.commands.prepare_settings import Prepare
from specauf_jax.data import dataset, tokenizer
from specauf_jax.data.packing import unpack
from specauf_jax.errors import SpecaufError

ALL_MARKED = "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}"
# The role that it marks does not occur.
NONE_MARKED = (
    "{% for m in messages %}{% if m['role'] == 'model' %}{% generation %}{{ m['content'] }}{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
)


def talk(question="What is two and two?", answer="Four."):
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}


def write_jsonl(path, *records):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records), encoding="utf-8")
    return str(path)


def run(tmp_path, **settings):
    """Prepare into tmp_path/out; the manifest and what was printed."""
    console = Console(file=io.StringIO(), width=200, force_terminal=False)
    defaults = {"out": str(tmp_path / "out"), "sequence_length": 64}
    if "tokenizer" not in settings:
        defaults["vocab_size"] = 300
    return prepare(Prepare(**defaults | settings), console), console.file.getvalue()


def documents(folder):
    rows = dataset.open_dataset(folder)
    return [document for index in range(len(rows)) for document in unpack(rows[index])]


def test_conversations(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", *[talk(f"Question {i}?", f"Answer {i}.") for i in range(20)])
    manifest, printed = run(tmp_path, input=(source,))
    out = tmp_path / "out"
    assert manifest == dataset.read_manifest(out) and tuple(manifest) == dataset.MANIFEST_KEYS
    loaded = tokenizer.load_tokenizer(out / "tokenizer")
    found = documents(out)
    texts = {loaded.decode(d.tokens.tolist()) for d in found}
    assert "<|im_start|>user\nQuestion 7?<|im_end|>\n<|im_start|>assistant\nAnswer 7.<|im_end|>\n" in texts
    assert {loaded.decode(d.tokens[d.loss_mask].tolist()) for d in found} == {
        f"Answer {i}.<|im_end|>" for i in range(20)
    }
    assert manifest["documents"] == len(found) == 20
    assert manifest["tokens"] == sum(len(d.tokens) for d in found)
    assert manifest["supervised_tokens"] == sum(int(d.loss_mask.sum()) for d in found)
    assert manifest["supervised_share"] == pytest.approx(manifest["supervised_tokens"] / manifest["tokens"])
    assert (manifest["vocab_size"], manifest["mask_token_id"], manifest["eos_token_id"]) == (len(loaded), 3, 0)
    assert "Answer 0." in printed and "Question 0?" in printed and source in printed


def test_example_shows_the_mask(tmp_path):
    console = Console(file=io.StringIO(), width=200, force_terminal=True, color_system="standard")
    source = write_jsonl(tmp_path / "a.jsonl", talk("Question?", "Answer."))
    prepare(Prepare(out=str(tmp_path / "out"), input=(source,), vocab_size=300, sequence_length=64), console)
    assert "\x1b[32mAnswer.<|im_end|>\x1b[0m" in console.file.getvalue()
    assert "\x1b[2mQuestion?" in console.file.getvalue()


def test_text_goes_on_in_the_next_document(tmp_path):
    text = "".join(f"line {i} of a text\n" for i in range(60))
    (tmp_path / "a.txt").write_text(text)
    manifest, printed = run(tmp_path, input=(str(tmp_path / "a.txt"),))
    found = documents(tmp_path / "out")
    assert max(len(d.tokens) for d in found) == 64 and all(d.loss_mask.all() for d in found)
    loaded = tokenizer.load_tokenizer(tmp_path / "out" / "tokenizer")
    whole = sorted((d.tokens for d in found), key=len)  # the remainder is the shortest
    assert whole[0][-1] == loaded.eos_token_id and manifest["truncated_documents"] == 0
    assert sum(len(d.tokens) for d in found) == len(loaded(text)["input_ids"]) + 1
    assert manifest["supervised_share"] == 1 and "plain text" in printed


def test_given_tokenizer_is_copied_and_long_conversations_are_cut(tmp_path):
    tokenizer.train_bpe(["some text"], 300, tmp_path / "tok")
    source = write_jsonl(tmp_path / "a.jsonl", talk(answer="Four. " * 50), talk("Q?", "A."), talk("why? " * 50))
    manifest, printed = run(tmp_path, input=(source,), tokenizer=str(tmp_path / "tok"), max_bad_records=1)
    assert (manifest["tokenizer_sha256"], manifest["template_sha256"]) == tokenizer.hashes(tmp_path / "tok")
    assert tokenizer.hashes(tmp_path / "out" / "tokenizer") == tokenizer.hashes(tmp_path / "tok")
    # The question alone fills a row of the third: nothing to learn from, so it is named.
    assert (manifest["documents"], manifest["truncated_documents"], manifest["bad_records"]) == (2, 1, 1)
    assert f"{source}:3: no supervised token within the first 64 tokens" in printed


def test_the_largest_token_and_the_arguments_of_the_template_are_recorded(tmp_path):
    tokenizer.train_bpe(["some text"], 300, tmp_path / "tok")
    (tmp_path / "tok" / "chat_template.jinja").write_text("{% if day %}{{ day }}{% endif %}" + tokenizer.CHATML)
    source = write_jsonl(tmp_path / "a.jsonl", talk())
    manifest, _ = run(tmp_path, input=(source,), tokenizer=str(tmp_path / "tok"), template_args=("day=7",))
    [document] = documents(tmp_path / "out")
    assert manifest["largest_token_id"] == document.tokens.max() and manifest["template_args"] == {"day": 7}
    assert tokenizer.load_tokenizer(tmp_path / "tok").decode(document.tokens.tolist()).startswith("7<|im_start|>")
    with pytest.raises(SpecaufError, match="template argument 'week', which the chat template does not read"):
        run(
            tmp_path,
            input=(source,),
            tokenizer=str(tmp_path / "tok"),
            template_args=("week=7",),
            out=str(tmp_path / "b"),
        )


def test_a_text_begins_each_row_as_the_tokenizer_begins_texts(tmp_path):
    import tokenizers

    tokenizer.train_bpe(["some text"], 300, tmp_path / "tok")
    changed = tokenizers.Tokenizer.from_file(str(tmp_path / "tok" / "tokenizer.json"))
    changed.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    changed.save(str(tmp_path / "tok" / "tokenizer.json"))
    (tmp_path / "a.txt").write_text("a line of a text\n" * 60)
    run(tmp_path, input=(str(tmp_path / "a.txt"),), tokenizer=str(tmp_path / "tok"))
    found = documents(tmp_path / "out")
    assert len(found) > 2 and all(d.tokens[0] == 1 and d.loss_mask.all() and len(d.tokens) <= 64 for d in found)
    texts = [tokenizer.load_tokenizer(tmp_path / "tok").decode(d.tokens[1:].tolist()) for d in found]
    assert sum(map(len, texts)) == 17 * 60 + len("<|endoftext|>")


def test_what_a_user_should_know_of_a_template_is_said_once(tmp_path):
    tokenizer.train_bpe(["some text"], 300, tmp_path / "tok")
    dated = "{{ strftime_now('%H:%M') }}" + tokenizer.CHATML.replace("<|im_end|>", ".")
    (tmp_path / "tok" / "chat_template.jinja").write_text(dated)
    source = write_jsonl(tmp_path / "a.jsonl", talk(), talk("Why?", "So."))
    _, printed = run(tmp_path, input=(source,), tokenizer=str(tmp_path / "tok"))
    assert printed.count("warning: the chat template writes the date or time") == 1
    assert printed.count("warning: no answer ends with a token that ends a turn") == 1
    _, printed = run(tmp_path, input=(source,), out=str(tmp_path / "other"))
    assert "warning" not in printed


def test_a_pipe_is_read_once_for_tokenizer_and_data(tmp_path):
    reading, writing = os.pipe()
    os.write(writing, "".join(json.dumps(talk(f"Q{i}?", f"A{i}.")) + "\n" for i in range(9)).encode())
    os.close(writing)
    manifest, _ = run(tmp_path, input=(f"/dev/fd/{reading}",))
    os.close(reading)
    assert manifest["documents"] == 9 and 0 < manifest["supervised_share"] < 1


def test_gzip_is_read_and_named(tmp_path, capsys):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(json.dumps(talk()).encode()))
    manifest, _ = run(tmp_path, input=(str(tmp_path / "a.jsonl.gz"),))
    assert manifest["documents"] == 1 and "a.jsonl.gz is compressed by gzip" in capsys.readouterr().err


def test_stdlib_corpus(tmp_path):
    manifest, _ = run(
        tmp_path, corpus="stdlib", corpus_bytes=400_000, vocab_size=400, heldout_prompts=8, prompt_length=16
    )
    assert manifest["source"].startswith("corpus: standard library of cpython 3.")
    assert sorted(manifest["prompts"]) == ["asyncio", "docstrings", "email", "json"]
    lines = (tmp_path / "out" / manifest["prompts"]["json"]).read_text().splitlines()
    assert len(lines) == 8 and all(set(json.loads(line)) == {"prompt"} for line in lines)


def test_prepare_is_deterministic(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", *[talk(f"Question {i}?", f"Answer {i}.") for i in range(20)])
    first, _ = run(tmp_path, input=(source,))
    second, _ = run(tmp_path, input=(source,), out=str(tmp_path / "again"))
    assert first == second
    one, other = dataset.open_dataset(tmp_path / "out"), dataset.open_dataset(tmp_path / "again")
    for index in range(len(one)):
        np.testing.assert_array_equal(one[index]["tokens"], other[index]["tokens"])


def test_all_supervised_is_accepted_when_asked_for(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", talk())
    folder = tmp_path / "tok"
    tokenizer.train_bpe(["text"], 300, folder)
    (folder / "chat_template.jinja").write_text(ALL_MARKED)
    with pytest.raises(SpecaufError, match="each token is supervised in all 1 conversations"):
        run(tmp_path, input=(source,), tokenizer=str(folder))
    manifest, _ = run(tmp_path, input=(source,), tokenizer=str(folder), allow_uniform_mask=True)
    assert manifest["supervised_share"] == 1


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({}, "0 sources given .none"),
        ({"input": ("good.jsonl",), "corpus": "stdlib"}, "2 sources given .--input, --corpus"),
        ({"input": ("nowhere.jsonl",)}, "nowhere.jsonl does not exist"),
        ({"input": ("good.jsonl",), "vocab_size": 299}, "vocab_size is 299"),
        ({"input": ("good.jsonl",), "sequence_length": 15}, "sequence_length is 15"),
        ({"input": ("good.jsonl",), "max_bad_records": -1}, "max_bad_records is -1"),
        ({"input": ("good.jsonl",), "tokenizer": "."}, "tokenizer.json does not exist"),
        ({"input": ("good.jsonl", "broken.jsonl")}, r"broken.jsonl:2: broken JSON"),
        ({"input": ("keys.jsonl",)}, r"keys.jsonl:1: neither 'conversations' nor 'messages'"),
        ({"input": ("mask.jsonl",)}, r"mask.jsonl:1: contains the mask token <\|mask\|>"),
        ({"input": ("empty.jsonl",)}, "no rows"),
        ({"input": ("good.jsonl",), "tokenizer": "unmarked"}, "no token is supervised in all 1 conversations"),
        ({"input": ("good.jsonl",), "tokenizer": "untemplated"}, "no chat template"),
        ({"input": ("good.jsonl",), "tokenizer": "silent"}, "good.jsonl:1: the chat template renders it as nothing"),
        ({"tfds": "talks"}, "fields of the TFDS dataset are not named"),
        ({"tfds": "talks", "tfds_prompt_field": "question"}, "fields of the TFDS dataset are not named"),
        ({"tfds": "talks", "tfds_text_field": "a", "tfds_prompt_field": "b"}, "not named, or both ways"),
        ({"corpus": "stdlib", "corpus_bytes": 300_000, "heldout_prompts": 10**6}, "too little text for 1000000"),
    ],
)
def test_mistakes_are_named_and_leave_nothing(tmp_path, monkeypatch, settings, found):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "good.jsonl", talk())
    write_jsonl(tmp_path / "broken.jsonl", talk(), '{"conversations": [')
    write_jsonl(tmp_path / "keys.jsonl", {"question": "a"})
    write_jsonl(tmp_path / "mask.jsonl", talk(answer="<|mask|>"))
    write_jsonl(tmp_path / "empty.jsonl")
    for name, template in (("unmarked", NONE_MARKED), ("untemplated", ""), ("silent", "{# #}")):
        tokenizer.train_bpe(["text"], 300, tmp_path / name)
        (tmp_path / name / "chat_template.jinja").write_text(template)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(SpecaufError, match=found):
        run(tmp_path, **settings)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_existing_out_is_left_alone(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", talk())
    first, _ = run(tmp_path, input=(source,))
    with pytest.raises(SpecaufError, match="(?s)already holds a prepared dataset.*choose another --out"):
        run(tmp_path, input=(source,), sequence_length=128)
    assert dataset.read_manifest(tmp_path / "out") == first
