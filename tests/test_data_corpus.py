import pytest

from specauf_jax.data import corpus
from specauf_jax.data import tokenizer as tokenizers
from specauf_jax.errors import SpecaufError

DOMAINS = ["asyncio", "docstrings", "email", "json"]


@pytest.fixture(scope="module")
def texts():
    return corpus.stdlib_corpus(100_000_000)


@pytest.fixture(scope="module")
def tokenizer(texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tok")
    tokenizers.train_bpe(texts[0][:30], 2048, folder)
    return tokenizers.load_tokenizer(folder)


def test_domains_are_not_in_the_training_text(texts):
    training, heldout = texts
    assert sorted(heldout) == DOMAINS
    whole = "\n".join(training)
    assert len(whole) > 4_000_000
    for name, domain in heldout.items():
        assert not any(text in whole for text in domain if len(text) > 200), name
    # One sentence that each domain's sources surely have, and one of a module that stays in.
    for sentence in ("class JSONDecodeError(", "class BaseEventLoop(", "class EmailMessage(", "class ArgumentParser("):
        assert sentence not in whole, sentence
    assert "class TarFile(" in whole


def test_size_limit_and_order(texts):
    small, _ = corpus.stdlib_corpus(300_000)
    assert 200_000 < sum(len(text.encode()) for text in small) <= 300_000
    assert small == corpus.stdlib_corpus(300_000)[0]


@pytest.mark.parametrize("name", DOMAINS)
def test_heldout_prompts(texts, tokenizer, name):
    training, heldout = texts
    prompts = corpus.heldout_prompts(tokenizer, heldout[name], 96, 64)
    assert len(set(prompts)) == 96
    whole = "\n".join(training)
    for prompt in prompts:
        assert 60 <= len(tokenizer(prompt)["input_ids"]) <= 68
        assert any(text.startswith(prompt) or "\n" + prompt in text for text in heldout[name])
        assert prompt not in whole
    thirds = {3 * "".join(heldout[name]).index(prompt) // len("".join(heldout[name])) for prompt in prompts}
    assert thirds == {0, 1, 2}


def test_too_many_prompts(tokenizer):
    with pytest.raises(SpecaufError, match="too little text for 3 distinct prompts of 4 tokens"):
        corpus.heldout_prompts(tokenizer, ["first line\nsecond line\n" + "x" * 24], 3, 4)
    with pytest.raises(SpecaufError, match="too little text for 2 distinct"):
        corpus.heldout_prompts(tokenizer, ["always the same line\n" * 50], 2, 4)
