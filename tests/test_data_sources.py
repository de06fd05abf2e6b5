import io
import json

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
