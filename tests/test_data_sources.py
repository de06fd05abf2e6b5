import bz2
import gzip
import io
import json
import lzma
import os

import pytest
from rich.console import Console

from specauf_jax.data import sources, tfds_source
from specauf_jax.data.rows import BadRecord
from specauf_jax.data.sources import Record
from specauf_jax.errors import SpecaufError

MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]


def read_lines(tmp_path, *lines):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines))
    return path, list(sources.read_files([path]))


def test_sharegpt_and_openai(tmp_path):
    turns = [{"from": "system", "value": "S"}, {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]
    path, records = read_lines(tmp_path, {"id": 3, "conversations": turns}, b"", {"messages": MESSAGES})
    assert records == [
        Record(f"{path}:1", [{"role": "system", "content": "S"}, *MESSAGES]),
        Record(f"{path}:3", MESSAGES),
    ]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"messages": [', "broken JSON .* at column 1"),
        (b'{"messages": "\xff"}', "not UTF-8"),
        (b"[", "broken JSON .*jq -c"),
        ([{"messages": MESSAGES}], "a JSON array; write one record a line"),
        ({"prompt": "a", "answer": "b"}, "neither 'conversations' nor 'messages' .found 'prompt', 'answer'"),
        ("text", "neither .*found str"),
        ({"messages": []}, "not a list of turns, or empty"),
        ({"messages": [{"content": "a"}]}, "turn 1 has the unknown role None"),
        ({"messages": [{"role": "user"}]}, "turn 1 has no text"),
        ({"messages": [MESSAGES[0], {"role": "robot", "content": "a"}]}, "turn 2 has the unknown role 'robot'"),
        ({"messages": [MESSAGES[0], {"role": ["a"], "content": "a"}]}, "turn 2 has the unknown role"),
        ({"messages": [MESSAGES[0], {"role": "assistant", "content": " "}]}, "turn 2 has no text"),
        ({"messages": [MESSAGES[0], {"role": "assistant", "content": None}]}, "turn 2 has no text"),
        ({"messages": [MESSAGES[0], {"role": "assistant", "content": "\ud800"}]}, "turn 2 holds half a surrogate pair"),
        ({"messages": MESSAGES[:1]}, "does not end with an assistant turn"),
        ({"messages": MESSAGES[1:]}, "begins with an assistant turn"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, reason):
    path, (good, bad, last) = read_lines(tmp_path, {"messages": MESSAGES}, line, {"messages": MESSAGES})
    assert isinstance(good, Record) and isinstance(last, Record)
    assert isinstance(bad, BadRecord) and bad.where == f"{path}:2"
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(bad.reason)


def read_one(tmp_path, record):
    _, [found] = read_lines(tmp_path, record)
    return found


@pytest.mark.parametrize("key", ["conversations", "messages"])
@pytest.mark.parametrize("role", ["role", "from"])
@pytest.mark.parametrize("text", ["content", "value"])
@pytest.mark.parametrize("names", [("human", "gpt"), ("User", "Assistant"), ("user", "model"), ("user", "bot")])
def test_every_spelling_of_keys_and_roles(tmp_path, key, role, text, names):
    turns = [{role: names[0], text: "Hi"}, {role: names[1], text: "Yo"}]
    assert read_one(tmp_path, {key: turns}).content == MESSAGES


def test_null_says_nothing_and_parts_of_text_are_joined(tmp_path):
    turns = [
        {"role": "user", "from": None, "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]},
        {
            "role": "assistant",
            "content": "Yo",
            "value": None,
            "tool_calls": None,
            "reasoning_content": "",
            "weight": None,
        },
    ]
    record = {"conversations": None, "messages": turns, "tools": None, "system": None}
    assert read_one(tmp_path, record).content == MESSAGES


def test_what_a_turn_says_beside_its_text_is_kept(tmp_path):
    call = {"id": "1", "function": {"name": "add", "arguments": '{"a": 1}'}}
    answer = {"role": "assistant", "content": None, "reasoning_content": "so", "tool_calls": [call]}
    result = {"role": "tool", "content": "2", "tool_call_id": "1", "name": "add"}
    tools = [{"type": "function", "function": {"name": "add"}}]
    found = read_one(tmp_path, {"tools": json.dumps(tools), "messages": [MESSAGES[0], answer, result, MESSAGES[1]]})
    read = {"id": "1", "function": {"name": "add", "arguments": {"a": 1}}}  # as servers hand it to templates
    assert found.content == [MESSAGES[0], answer | {"content": "", "tool_calls": [read]}, result, MESSAGES[1]]
    assert found.tools == tools and found.unlearned == ()


def test_a_system_message_beside_the_turns_comes_first(tmp_path):
    system = {"role": "system", "content": "S"}
    for key in ("system", "system_prompt"):
        assert read_one(tmp_path, {key: "S", "messages": MESSAGES}).content == [system, *MESSAGES]
    assert read_one(tmp_path, {"system": "S", "messages": [system, *MESSAGES]}).content == [system, *MESSAGES]
    developer = {"role": "developer", "content": "S"}
    assert read_one(tmp_path, {"messages": [developer, *MESSAGES]}).content == [system, *MESSAGES]


@pytest.mark.parametrize(
    ("key", "no"),
    [("weight", 0), ("weight", 0.0), ("train", False), ("training", False), ("loss", False), ("loss_mask", 0),
     ("trainable", False), ("masked", True), ("ignore", 1)],
)  # fmt: skip
def test_marks_of_answers_that_are_not_to_be_learned(tmp_path, key, no):
    turns = [MESSAGES[0] | {key: no}, MESSAGES[1] | {key: no}, MESSAGES[0], MESSAGES[1] | {key: not no}]
    found = read_one(tmp_path, {"system": "S", "messages": turns})
    assert found.unlearned == (2,) and [set(message) for message in found.content] == [{"role", "content"}] * 5


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"messages": MESSAGES, "conversations": MESSAGES[::-1]}, "both 'conversations' and 'messages'"),
        ({"messages": None}, "not a list of turns, or empty"),
        ({"messages": {"role": "user"}}, "not a list of turns, or empty"),
        ({"messages": ["Hi"]}, "turn 1 is not an object"),
        ({"messages": [MESSAGES[0] | {"from": "gpt"}, MESSAGES[1]]}, "turn 1 has 'role' and another 'from'"),
        ({"messages": [MESSAGES[0] | {"value": "No"}, MESSAGES[1]]}, "turn 1 has 'content' and another 'value'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "turn 1 has a part of type 'image_url'"),
        ({"messages": [{"role": "user", "content": {"text": 3}}]}, "turn 1 has a part of type 'text'"),
        ({"messages": [MESSAGES[0], MESSAGES[1] | {"function_call": {"name": "a"}}]}, "turn 2 has 'function_call'"),
        ({"messages": [MESSAGES[0] | {"images": ["a.png"]}, MESSAGES[1]]}, "turn 1 has 'images'"),
        ({"messages": [MESSAGES[0], MESSAGES[1] | {"weight": 0.5}]}, "turn 2 has 'weight' 0.5, which is neither 0 nor"),
        ({"messages": [MESSAGES[0], MESSAGES[1] | {"tool_calls": "add"}]}, "'tool_calls', which is not a list of obj"),
        ({"messages": [MESSAGES[0], MESSAGES[1] | {"thinking": "\ud83d"}]}, "turn 2 holds half a surrogate pair"),
        ({"messages": MESSAGES, "tools": [3]}, "'tools', which is not a list of objects"),
        ({"messages": MESSAGES, "functions": [{"name": "add"}]}, "has 'functions', which is not supported"),
        ({"messages": MESSAGES, "chat_template_kwargs": {"a": 1}}, "has 'chat_template_kwargs'"),
        ({"messages": [{"role": "system", "content": "T"}, *MESSAGES], "system": "S"}, "a system message beside the"),
    ],
)
def test_what_cannot_be_honoured_is_named(tmp_path, record, reason):
    found = read_one(tmp_path, record)
    assert isinstance(found, BadRecord) and reason in found.reason


LINE = json.dumps({"messages": MESSAGES}).encode() + b"\n"


def contents(path):
    return [record.content for record in sources.read_files([path])]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.ndjson", "a.jsonlines", "a.JSONL", "a.Json", "a.txt", "a"])
def test_suffixes_gzip_and_byte_order_marks(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"\xef\xbb\xbf" + LINE * 2)
    assert contents(path) == [MESSAGES] * 2
    path = tmp_path / f"{name}.gz"
    path.write_bytes(gzip.compress(LINE * 2))
    assert contents(path) == [MESSAGES] * 2
    path.write_bytes(gzip.compress(LINE * 99)[:60])
    assert "not readable" in list(sources.read_files([path]))[-1].reason


def test_text_with_a_byte_order_mark(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf{}\n")
    assert contents(tmp_path / "a.txt") == ["{}\n"]


@pytest.mark.parametrize("text", ["[%s,\n%s]", "[\n  %s,\n  %s\n]\n", "[%s, %s]"])
def test_a_whole_array(tmp_path, text):
    (tmp_path / "a.json").write_text(text % (LINE.decode().strip(), LINE.decode().strip()))
    records = list(sources.read_files([tmp_path / "a.json"]))
    assert records == [Record(f"{tmp_path}/a.json[{i}]", MESSAGES) for i in range(2)]
    (tmp_path / "b.json").write_text(json.dumps(json.loads(LINE), indent=2))
    assert contents(tmp_path / "b.json") == [MESSAGES]


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
@pytest.mark.parametrize(
    ("data", "said"),
    [
        (bz2.compress(LINE), "compressed by bzip2"),
        (lzma.compress(LINE), "compressed by xz"),
        (b"\x28\xb5\x2f\xfd" + LINE, "compressed by zstd"),
        (b"PK\x03\x04" + LINE, "a zip archive"),
        (b"PAR1" + LINE, "a Parquet file without the suffix"),
        (LINE.decode().encode("utf-16"), "text in UTF-16"),
        (LINE.decode().encode("utf-16-le"), "binary, or text in UTF-16"),
        (b"\x00\x01", "binary"),
    ],
)
def test_other_formats_are_named(tmp_path, name, data, said):
    (tmp_path / name).write_bytes(data)
    [bad] = sources.read_files([tmp_path / name])
    assert said in bad.reason and "convert it" in bad.reason


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"[" * 100_000 + b"]" * 100_000, "nested too deep"),
        (b'{"messages": ' + b"[" * 100_000, "nested too deep"),
        (b'{"n": ' + b"9" * 5000 + b"}", "too many digits"),
        (b'{"messages": [{"role": "user", "content": "a", "b": ' + b"[" * 900 + b"]" * 900 + b"}]}", ""),
    ],
)
def test_json_beyond_python_is_a_bad_record(tmp_path, line, said):
    _, [good, bad] = read_lines(tmp_path, {"messages": MESSAGES}, line)
    assert isinstance(good, Record) and isinstance(bad, BadRecord) and said in bad.reason


def test_parquet(tmp_path, monkeypatch):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"messages": MESSAGES, "id": 1}, {"messages": [MESSAGES[0] | {"name": None}, MESSAGES[1]], "id": 2}]
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert list(sources.read_files([path])) == [Record(f"{path}:row {i}", MESSAGES) for i in (1, 2)]
    path.write_bytes(path.read_bytes()[:100])
    [bad] = sources.read_files([path])
    assert "not readable as Parquet" in bad.reason
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SpecaufError, match="pip install pyarrow"):
        list(sources.read_files([path]))


def test_pipes(tmp_path):
    def piped(data):
        reading, writing = os.pipe()
        os.write(writing, data)
        os.close(writing)
        try:
            [path] = sources.input_files([f"/dev/fd/{reading}"])
            return contents(path)
        finally:
            os.close(reading)

    assert piped(LINE * 2) == [MESSAGES] * 2
    assert piped(gzip.compress(LINE)) == [MESSAGES]
    assert piped(b"Some text.\n") == ["Some text.\n"]
    with pytest.raises(SpecaufError, match="/dev/null is a device"):
        sources.input_files(["/dev/null"])


def test_hidden_and_empty_files_are_left_out_and_links_followed(tmp_path):
    for name in ("in/.git/HEAD", "in/.cache/a.jsonl.metadata", "in/.hidden", "out/b.txt", "in/a.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "in" / "a.lock").touch()
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "out")
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "file.txt").symlink_to(tmp_path / "out" / "b.txt")
    files = sources.input_files([str(tmp_path / "in")])
    assert [str(path.relative_to(tmp_path / "in")) for path in files] == ["a.txt", "file.txt", "linked/b.txt"]
    (tmp_path / "in" / "gone.txt").symlink_to(tmp_path / "nowhere")
    reasons = [
        r.reason for r in sources.read_files(sources.input_files([str(tmp_path / "in")])) if isinstance(r, BadRecord)
    ]
    assert len(reasons) == 1 and "not readable" in reasons[0]


def test_text_files_and_folders(tmp_path):
    (tmp_path / "b" / "deep").mkdir(parents=True)
    (tmp_path / "b" / "z.py").write_text("x = 1\n")
    (tmp_path / "b" / "deep" / "a.txt").write_text("é\n", encoding="utf-8")
    (tmp_path / "b" / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "b" / "none.txt").write_text(" \n")
    (tmp_path / "first.txt").write_text("first")
    files = sources.input_files([str(tmp_path / "first.txt"), str(tmp_path / "b")])
    assert [path.name for path in files] == ["first.txt", "a.txt", "latin.txt", "none.txt", "z.py"]
    first, a, latin, none, z = sources.read_files(files)
    assert [first.content, a.content, z.content] == ["first", "é\n", "x = 1\n"]
    assert latin.where.endswith("latin.txt") and "UTF-8" in latin.reason and "position 3" in latin.reason
    assert none.reason == "the file is empty"


def test_missing_and_empty_input(tmp_path):
    with pytest.raises(SpecaufError, match="nowhere.jsonl does not exist"):
        sources.input_files([str(tmp_path / "nowhere.jsonl")])
    with pytest.raises(SpecaufError, match="is empty"):
        sources.input_files([str(tmp_path)])


def test_bad_records_are_printed_up_to_the_limit_then_refused():
    console = Console(file=io.StringIO(), width=200)
    bad = sources.BadRecords(2, console)
    records = [Record("f:1", "a"), BadRecord("f:2", "why [bold]"), BadRecord("f:3", "because")]
    assert list(bad.keep_good(records)) == records[:1]
    bad.check()
    assert console.file.getvalue() == "bad record: f:2: why [bold]\nbad record: f:3: because\n"
    for line in range(4, 15):
        bad.add(BadRecord(f"f:{line}", "more"))
    with pytest.raises(SpecaufError, match=r"(?s)13 unusable records\n    f:2: .*f:11: more\n    and 3 more"):
        bad.check()


@pytest.fixture
def tfds_dir(tmp_path):
    """A TFDS dataset `talks` of two records, as a user would have it on disk."""
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter

    folder = tmp_path / "talks" / "1.0.0"
    folder.mkdir(parents=True)
    features = tfds.features.FeaturesDict({name: tfds.features.Text() for name in ("question", "answer")})
    writer = ArrayRecordWriter(str(folder / "talks-train.array_record-00000-of-00001"), "group_size:1")
    for question, answer in (("Hi", "Yo é"), ("And?", "")):
        writer.write(features.serialize_example({"question": question, "answer": answer}))
    writer.close()
    template = tfds.core.ShardedFileTemplate(
        data_dir=folder, dataset_name="talks", split="train", filetype_suffix="array_record"
    )
    split = tfds.core.SplitInfo(name="train", shard_lengths=[2], num_bytes=0, filename_template=template)
    tfds.folder_dataset.write_metadata(data_dir=folder, features=features, split_infos=[split], check_data=False)
    return str(tmp_path)


def read_tfds(tfds_dir, *fields, name="talks", split="train"):
    return list(tfds_source.read_tfds(name, fields, split=split, data_dir=tfds_dir))


def test_tfds(tfds_dir):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo é"}]
    expected = [Record("talks[train]:0", messages), BadRecord("talks[train]:1", "the field is empty")]
    assert read_tfds(tfds_dir, "question", "answer") == expected
    texts = read_tfds(tfds_dir, "question", name="talks:1.0.0")
    assert [record.content for record in texts] == ["Hi", "And?"]


@pytest.mark.parametrize(
    ("field", "split", "found"),
    [
        ("reply", "train", "(?s)no field reply.*one of answer, question"),
        ("answer", "test", "split 'test' cannot be opened"),
    ],
)
def test_tfds_mistakes(tfds_dir, field, split, found):
    with pytest.raises(SpecaufError, match=found):
        read_tfds(tfds_dir, field, split=split)
