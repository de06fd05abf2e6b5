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


def documents(tokenizer, messages, **more):
    record = Record("file:1", messages, **more)
    return [supervised(tokenizer, document) for document in chat.conversation_documents(tokenizer, record)]


HEAD = "<|im_start|>{{ m.role }}\n"
OPEN = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
PLAIN = "{% for m in messages %}" + HEAD + "{{ m.content }}<|im_end|>\n{% endfor %}" + OPEN
ALL_KEYS = (
    "{% if tools %}T:{{ tools | tojson }}{% endif %}{% for m in messages %}" + HEAD + "{{ m.name }}"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% for t in m.tool_calls or [] %}<call>{{ t.function.name }}</call>{% endfor %}<|im_end|>\n{% endfor %}" + OPEN
)
CALLS = [{"function": {"name": "add", "arguments": {}}}]
TOOLS = [{"type": "function", "function": {"name": "add"}}]


def test_thoughts_calls_tools_and_names_reach_the_template(tokenizer):
    tokenizer.chat_template = ALL_KEYS
    answer = CONVERSATION[1] | {"reasoning_content": "so", "tool_calls": CALLS}
    asked = CONVERSATION[0] | {"name": "Bob"}
    tool = {"role": "tool", "content": "2", "tool_call_id": "1", "name": "add"}
    messages = [asked, answer, tool, CONVERSATION[3]]
    [(runs, whole)] = documents(tokenizer, messages, tools=TOOLS)
    assert runs == ["<think>so</think>Yo\n<call>add</call><|im_end|>", " é 🐈<|im_end|>"]
    assert whole.startswith('T:[{"type": "function"') and "BobHi" in whole and "<|im_start|>tool\nadd2" in whole
    [(runs, _)] = documents(tokenizer, [asked, answer | {"content": ""}])
    assert runs == ["<think>so</think><call>add</call><|im_end|>"]


@pytest.mark.parametrize(
    ("index", "more", "tools", "named"),
    [
        (1, {"reasoning_content": "so"}, None, "'reasoning_content' of message 2"),
        (3, {"thinking": "so"}, None, "'thinking' of message 4"),
        (1, {"tool_calls": CALLS}, None, "'tool_calls' of message 2"),
        (0, {"name": "Bob"}, None, "'name' of message 1"),
        (0, {}, TOOLS, "'tools'"),
    ],
)
def test_a_template_that_leaves_something_out_is_refused_by_name(tokenizer, index, more, tools, named):
    messages = [message | more if i == index else message for i, message in enumerate(CONVERSATION)]
    with pytest.raises(chat.RefusedConversation, match=f"file:1: the chat template leaves out {named}"):
        documents(tokenizer, messages, tools=tools)


@pytest.mark.parametrize("role", ["system", "tool"])
def test_roles_that_a_template_skips_are_refused_by_name(tokenizer, role):
    other = {"role": role, "content": "S"}
    messages = [other, *CONVERSATION[:2]] if role == "system" else [*CONVERSATION[:2], other, CONVERSATION[3]]
    assert documents(tokenizer, messages)
    tokenizer.chat_template = PLAIN.replace(
        "{% for m in messages %}", "{% for m in messages if m.role in 'user assistant' %}"
    )
    with pytest.raises(chat.RefusedConversation, match=rf"leaves out 'content' of message \d \({role}\)"):
        documents(tokenizer, messages)
    with pytest.raises(chat.RefusedConversation, match="leaves out 'content' of message 1"):
        chat.encode_prompt(tokenizer, [{"role": "system", "content": "S"}, CONVERSATION[0]])


def test_thoughts_that_are_shown_until_the_next_question(tokenizer):
    tokenizer.chat_template = REWRITING.replace("<think></think>", "<think>{{ m.reasoning_content }}</think>")
    so = {"reasoning_content": "so"}
    thoughts = [message | (so if message["role"] == "assistant" else {}) for message in CONVERSATION]
    first, second = documents(tokenizer, thoughts)
    assert first[0] == ["<think>so</think>Yo\n<|im_end|>"] and second[0] == ["<think>so</think> é 🐈<|im_end|>"]
    assert "Yo" in second[1] and second[1].count("so") == 1


@pytest.mark.parametrize("template", [PLAIN, GENERATION, REWRITING])
def test_an_answer_that_is_not_to_be_learned(tokenizer, template):
    tokenizer.chat_template = template
    for unlearned, kept in ((1, " é 🐈<|im_end|>"), (3, "Yo\n<|im_end|>")):
        found = documents(tokenizer, CONVERSATION, unlearned=(unlearned,))
        assert [run.removeprefix("<think></think>") for runs, _ in found for run in runs] == [kept]
    if template != REWRITING:
        assert [runs for runs, _ in documents(tokenizer, CONVERSATION, unlearned=(1, 3))] == [[]]


def test_a_template_that_always_opens_an_answer(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}" + HEAD + "{{ m.content }}<|im_end|>{% endfor %}<|im_start|>assistant{{ '\n' }}"
    )
    assert [runs for runs, _ in documents(tokenizer, CONVERSATION)] == [["Yo\n<|im_end|>"], [" é 🐈<|im_end|>"]]


def test_marks_that_leave_out_the_end_of_the_turn(tokenizer):
    inside, outside = (
        "{{ m['content'] }}<|im_end|>{% endgeneration %}",
        "{{ m['content'] }}{% endgeneration %}<|im_end|>",
    )
    tokenizer.chat_template = GENERATION.replace(inside, outside)
    [(runs, _)] = documents(tokenizer, CONVERSATION)
    assert runs == ["Yo\n<|im_end|>", " é 🐈<|im_end|>"]
    [note] = chat.template_notes(tokenizer)
    assert "leave out the end of the turn" in note
    tokenizer.chat_template = GENERATION
    assert chat.template_notes(tokenizer) == []


def test_a_generation_prompt_that_opens_a_thought(tokenizer):
    tokenizer.chat_template = PLAIN.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    [(runs, _)] = documents(tokenizer, CONVERSATION)
    assert runs == ["Yo\n<|im_end|>", " é 🐈<|im_end|>"]
    messages = [CONVERSATION[0], {"role": "assistant", "content": "<b>"}]  # begins as the thought does
    assert [runs for runs, _ in documents(tokenizer, messages)] == [["<b><|im_end|>"]]
    [note] = chat.template_notes(tokenizer)
    assert "<think>" in note


def test_the_end_of_a_turn_is_the_first_stop_after_the_text(tokenizer):
    tokenizer.chat_template = PLAIN.replace("<|im_end|>\n", "<|im_end|><|endoftext|>\n")
    [(runs, _)] = documents(tokenizer, CONVERSATION[2:])
    assert runs == [" é 🐈<|im_end|>"]
    tokenizer.stops = ()  # then the last marker
    assert [runs for runs, _ in documents(tokenizer, CONVERSATION[2:])] == [[" é 🐈<|im_end|><|endoftext|>"]]


def test_arguments_of_the_template(tokenizer):
    tokenizer.chat_template = PLAIN + "{% if enable_thinking is false %}<think></think>{% endif %}"
    tokenizers.with_template_args(tokenizer, {"enable_thinking": False})
    assert tokenizer.decode(chat.encode_prompt(tokenizer, CONVERSATION[:1])).endswith("assistant\n<think></think>")
    with pytest.raises(
        SpecaufError, match="'enable_thinkin', which the chat template does not read .*'enable_thinking'"
    ):
        tokenizers.with_template_args(tokenizer, {"enable_thinkin": False})
    for name in ("tokenize", "messages", "add_generation_prompt"):
        with pytest.raises(SpecaufError, match="does not read"):
            tokenizers.with_template_args(tokenizer, {name: 1})
    tokenizer.chat_template = None
    with pytest.raises(SpecaufError, match="does not read"):
        tokenizers.with_template_args(tokenizer, {"enable_thinking": False})


@pytest.mark.parametrize(
    ("clock", "argument"),
    [
        ("{{ strftime_now('%H:%M') }}", "strftime_now"),
        ("{% if not day is defined %}{% set day = strftime_now('%d') %}{% endif %}{{ day }}", "day"),
    ],
)
def test_a_template_with_a_clock_is_told_and_can_be_pinned(tokenizer, clock, argument):
    assert chat.template_notes(tokenizer) == []
    tokenizer.chat_template = clock + PLAIN
    [note] = chat.template_notes(tokenizer)
    assert "clock" in note and "--template-args strftime_now" in note
    tokenizers.with_template_args(tokenizer, {argument: "26 Jul 2024"})
    assert chat.template_notes(tokenizer) == []
    [(_, whole)] = documents(tokenizer, CONVERSATION)
    assert whole.startswith("26 Jul 2024<|im_start|>")


def test_plain_prompts_and_texts_begin_alike(tokenizer, folder, tmp_path):
    assert chat.front_ids(tokenizer) == []
    import tokenizers as library

    tokenizers.copy_tokenizer(folder, tmp_path / "tok")
    changed = library.Tokenizer.from_file(str(tmp_path / "tok" / "tokenizer.json"))
    changed.post_processor = library.processors.TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)]
    )
    changed.save(str(tmp_path / "tok" / "tokenizer.json"))
    tokenizer = tokenizers.load_tokenizer(tmp_path / "tok")
    text = "a <|mask|> b"
    [document] = chat.encode_texts(tokenizer, [text])
    assert chat.front_ids(tokenizer) == [1]
    assert chat.encode_start(tokenizer, text) == [1, *document.tokens[:-1].tolist()]
    assert tokenizer.mask_token_id not in document.tokens
    # A conversation begins as its template says.
    assert chat.encode_prompt(tokenizer, CONVERSATION[:1]).count(1) == 2
