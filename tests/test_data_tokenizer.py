import json

import pytest

from specauf_jax.data import tokenizer as tokenizers
from specauf_jax.errors import SpecaufError

TEXTS = ["def add(a, b):\n    return a + b\n", "class Ünïcode:\n    pass\n", "the cat sat on the mat " * 20]


@pytest.fixture
def folder(tmp_path):
    tokenizers.train_bpe(TEXTS, 300, tmp_path / "tok")
    return tmp_path / "tok"


def test_round_trip_and_special_tokens(folder):
    tokenizer = tokenizers.load_tokenizer(folder)
    text = "  def f():\n\treturn 'naïve 🐈' # <|im_end|>\n\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.tokenize("the mat") == ["the", "Ġmat"]  # learnt from the texts
    assert 260 < len(tokenizer) <= 300
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.mask_token) == ("<|endoftext|>",) * 2 + ("<|mask|>",)
    assert tokenizer.stops == (0, 2)


def test_auto_tokenizer_reads_it(folder):
    from transformers import AutoTokenizer

    ours, theirs = tokenizers.load_tokenizer(folder), AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert theirs("the mat")["input_ids"] == ours("the mat")["input_ids"]
    assert theirs.chat_template == ours.chat_template == tokenizers.CHATML


def test_training_is_deterministic(folder, tmp_path):
    tokenizers.train_bpe(iter(TEXTS), 300, tmp_path / "again")
    assert tokenizers.hashes(folder) == tokenizers.hashes(tmp_path / "again")
    tokenizers.train_bpe(TEXTS[:1], 300, tmp_path / "other")
    assert tokenizers.hashes(folder)[0] != tokenizers.hashes(tmp_path / "other")[0]


def test_copy_keeps_the_hashes(folder, tmp_path):
    tokenizers.copy_tokenizer(folder, tmp_path / "copy")
    assert tokenizers.hashes(tmp_path / "copy") == tokenizers.hashes(folder)
    before = tokenizers.hashes(folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}")  # wins over tokenizer_config.json
    assert tokenizers.load_tokenizer(folder).chat_template == "{{ messages }}"
    assert tokenizers.hashes(folder)[0] == before[0] and tokenizers.hashes(folder)[1] != before[1]


def test_tokenizer_json_alone(folder):
    (folder / "tokenizer_config.json").unlink()
    assert tokenizers.load_tokenizer(folder).chat_template is None
    assert tokenizers.hashes(folder)[1] is None


def test_missing_or_broken_tokenizer(folder, tmp_path):
    with pytest.raises(SpecaufError, match="tokenizer.json does not exist"):
        tokenizers.load_tokenizer(tmp_path)
    content = json.loads((folder / "tokenizer.json").read_text())
    del content["model"]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(SpecaufError, match="cannot be read"):
        tokenizers.load_tokenizer(folder)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(SpecaufError, match="cannot be read"):
        tokenizers.load_tokenizer(folder)


def test_chat_templates_that_are_none_are_refused(folder):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": 5}))
    with pytest.raises(SpecaufError, match="chat_template is 5"):
        tokenizers.load_tokenizer(folder)


def test_stops_come_from_the_models_files_too(folder):
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    (folder / "config.json").write_text('{"eos_token_id": 9}')
    tokenizer = tokenizers.load_tokenizer(folder)
    assert tokenizer.stops == (0, 2, 7, 9)
    (folder / "config.json").write_text('{"eos_token_id": null}')
    assert tokenizers.stop_token_ids(tokenizer, folder) == (0, 2, 7)
    for wrong in ('"</s>"', "true", "[1.5]", "[0, 4294967296]"):
        (folder / "generation_config.json").write_text(f'{{"eos_token_id": {wrong}}}')
        with pytest.raises(SpecaufError, match="generation_config.json: eos_token_id is"):
            tokenizers.stop_token_ids(tokenizer, folder)


def test_differing_tokenizers_and_templates(folder, tmp_path):
    def changed(name, change):
        tokenizers.copy_tokenizer(folder, tmp_path / name)
        change(tmp_path / name)
        return tokenizers.differing(folder, tmp_path / name)

    def reformat(copy):
        content = json.loads((copy / "tokenizer.json").read_text())
        merges = [" ".join(merge) for merge in content["model"]["merges"]]  # as older versions write them
        content["model"]["merges"] = merges
        content["padding"] = {
            **{"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None},
            **{"pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>"},
        }
        (copy / "tokenizer.json").write_text(json.dumps(content))

    def template(text):
        return lambda copy: (copy / "chat_template.jinja").write_text(text)

    assert changed("same", lambda copy: None) is None
    assert changed("formatted", reformat) is None
    assert changed("other", lambda copy: tokenizers.train_bpe(TEXTS[:1], 300, copy)) == "tokenizer"
    assert changed("templates", template("{{ messages }}")) == "chat template"
    assert changed("marked", template("{% generation %}" + tokenizers.CHATML + "{% endgeneration %}\n")) is None
    assert changed("bare", lambda copy: (copy / "tokenizer_config.json").unlink()) is None
