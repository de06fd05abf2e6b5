import pytest

from specauf_jax.data import chat
from specauf_jax.data import tokenizer as tokenizers
from specauf_jax.data.sources import Record
from specauf_jax.errors import SpecaufError

CONVERSATION = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yo\n"},
    {"role": "user", "content": "<3"},
    {"role": "assistant", "content": " é 🐈"},
]
GENERATION = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}A:{% generation %}{{ m['content'] }}<|im_end|>"
    "{% endgeneration %}{% else %}U:{{ m['content'] }}{% endif %}|{% endfor %}"
)
# Like Qwen3: only the last answer carries a think block.
REWRITING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think></think>{% endif %}{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tok")
    tokenizers.train_bpe(["\n\n\n" * 9, "user\nassistant\nuser\nassistant"], 270, folder)
    return folder


@pytest.fixture
def tokenizer(folder):
    return tokenizers.load_tokenizer(folder)


def encode(tokenizer, messages, where="file:1"):
    """With every answer supervised."""
    record = Record(where, messages)
    return chat.encode_conversation(tokenizer, record, record.answers)


def supervised(tokenizer, document):
    """The supervised runs as text, and the whole as text."""
    runs, run = [], []
    for token, mask in [*zip(document.tokens.tolist(), document.loss_mask.tolist(), strict=True), (0, False)]:
        if mask:
            run.append(token)
        elif run:
            runs.append(tokenizer.decode(run))
            run = []
    return runs, tokenizer.decode(document.tokens.tolist())


def test_loss_mask_of_two_turns_by_hand(tokenizer):
    runs, whole = supervised(tokenizer, encode(tokenizer, CONVERSATION, "file:1"))
    assert runs == ["Yo\n<|im_end|>", " é 🐈<|im_end|>"]
    assert whole == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYo\n<|im_end|>\n"
        "<|im_start|>user\n<3<|im_end|>\n<|im_start|>assistant\n é 🐈<|im_end|>\n"
    )


def test_template_with_generation_marks(tokenizer):
    tokenizer.chat_template = GENERATION
    runs, whole = supervised(tokenizer, encode(tokenizer, CONVERSATION, "file:1"))
    assert runs == ["Yo\n<|im_end|>", " é 🐈<|im_end|>"]
    assert whole == "U:Hi|A:Yo\n<|im_end|>|U:<3|A: é 🐈<|im_end|>|"


def test_last_character_of_a_marked_turn_is_supervised_whole(tokenizer):
    tokenizer.chat_template = GENERATION.replace("<|im_end|>", "")
    document = encode(tokenizer, CONVERSATION[2:], "file:1")
    assert len(tokenizer("🐈")["input_ids"]) == 4  # the case at hand
    assert supervised(tokenizer, document)[0] == [" é 🐈"]


def test_template_without_a_marker_supervises_the_line_break_that_ends_the_turn(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    runs, _ = supervised(tokenizer, encode(tokenizer, CONVERSATION[2:], "file:1"))
    assert runs == [" é 🐈\n"]
    # A special token inside the answer is not taken for its end.
    messages = [CONVERSATION[0], {"role": "assistant", "content": "a<|im_start|>b"}]
    assert supervised(tokenizer, encode(tokenizer, messages, "file:1"))[0] == ["a<|im_start|>b\n"]


def test_token_over_the_border_of_a_turn_is_not_supervised(tokenizer):
    # One token holds the line break of the generation prompt and the first one of the answer.
    assert tokenizer.decode([tokenizer("assistant\n\n\nb")["input_ids"][-3]]) == "\n\n"
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "\n\nb"}]
    document = encode(tokenizer, messages, "file:1")
    assert supervised(tokenizer, document)[0] == ["\nb<|im_end|>"]


def test_template_that_rewrites_earlier_turns(tokenizer):
    tokenizer.chat_template = REWRITING
    with pytest.raises(SpecaufError, match="(?s)file:7: .*message 2 differently.*generation"):
        encode(tokenizer, CONVERSATION, "file:7")
    runs, _ = supervised(tokenizer, encode(tokenizer, CONVERSATION[:2], "file:7"))
    assert runs == ["<think></think>Yo\n<|im_end|>"]


def test_a_rewriting_template_makes_a_document_of_every_answer(tokenizer):
    assert len(chat.conversation_documents(tokenizer, Record("file:1", CONVERSATION))) == 1
    tokenizer.chat_template = REWRITING
    first, second = chat.conversation_documents(tokenizer, Record("file:7", [*CONVERSATION, CONVERSATION[0]]))
    head = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert supervised(tokenizer, first) == (["<think></think>Yo\n<|im_end|>"], head + "<think></think>Yo\n<|im_end|>\n")
    runs, whole = supervised(tokenizer, second)
    assert runs == ["<think></think> é 🐈<|im_end|>"]
    assert whole == (
        head + "Yo\n<|im_end|>\n<|im_start|>user\n<3<|im_end|>\n<|im_start|>assistant\n<think></think> é 🐈<|im_end|>\n"
    )  # as the model sees it when it writes the second answer


def test_template_that_refuses(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(SpecaufError, match="file:3: the chat template refuses .*roles must alternate"):
        encode(tokenizer, CONVERSATION, "file:3")


def test_prompt(tokenizer):
    ids = chat.encode_prompt(tokenizer, CONVERSATION[:1])
    assert tokenizer.decode(ids) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    document = encode(tokenizer, CONVERSATION[:2], "file:1")
    assert document.tokens[: len(ids)].tolist() == ids


def test_no_template(tokenizer):
    tokenizer.chat_template = None
    for refused in (chat.encode_prompt, encode):
        with pytest.raises(SpecaufError, match="no chat template"):
            refused(tokenizer, CONVERSATION)


def test_text_is_supervised_and_ended_and_names_of_special_tokens_are_text(tokenizer):
    [document] = chat.encode_texts(tokenizer, ["a <|mask|>"])
    assert document.loss_mask.all() and document.loss_mask.shape == document.tokens.shape
    assert document.tokens[-1] == tokenizer.eos_token_id
    assert tokenizer.mask_token_id not in document.tokens
    assert tokenizer.decode(document.tokens[:-1].tolist()) == "a <|mask|>"
    # The next conversation is read with special tokens again.
    assert tokenizer("<|mask|>")["input_ids"] == [tokenizer.mask_token_id]
