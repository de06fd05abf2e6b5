"""The path layer: replacing folders through kills, and gs:// against a fake storage on the loopback."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import gcs
import pytest
from etils import epath

from specauf_jax import files
from specauf_jax.errors import IOFailed, SpecaufError, Stopped


@pytest.fixture(scope="module")
def storage():
    with gcs.serving("bucket") as storage:
        yield storage


@pytest.fixture(autouse=True)
def world(storage, tmp_path, monkeypatch):
    """Of each test: an empty bucket and an empty cache."""
    for name, value in (storage.environment | {"XDG_CACHE_HOME": str(tmp_path / "cache")}).items():
        monkeypatch.setenv(name, value)
    storage.objects["bucket"].clear()
    storage.seen.clear()
    storage.before = lambda what, name: None


def python(code: str, **environment) -> subprocess.Popen:
    """A process that runs `code`, with files.py at hand."""
    code = f"from specauf_jax import files\nfrom pathlib import Path\nimport os, signal\n{code}"
    return subprocess.Popen([sys.executable, "-c", code], env=os.environ | environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip


def build(folder, **content: str) -> None:
    """Replace `folder` by files of these contents; `a__b` stands for a/b."""
    with files.replace_folder(folder) as new:
        for name, text in content.items():
            path = new / name.replace("__", "/")
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)


def content(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def fetches(storage) -> list[str]:
    return [name for what, name in storage.seen if what == "read"]


# ---------------------------------------------------------------------------------------------
# Local


@pytest.mark.parametrize("reader", [lambda path: files.existing_folder(path, "a model"), files.local_copy])
def test_a_kill_between_the_two_renames_is_undone_by_the_next_reader(tmp_path, reader):
    build(tmp_path / "model", weights="old")
    killed = python(f"""
replace, seen = Path.replace, []
def kill_before_second(path, to):
    seen.append(path)
    if len(seen) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(path, to)
Path.replace = kill_before_second
with files.replace_folder({str(tmp_path / "model")!r}) as new:
    (new / "weights").write_text("new")
""")
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL and not (tmp_path / "model").exists()
    assert content(reader(tmp_path / "model")) == {"weights": "old"}
    build(tmp_path / "model", weights="newer")
    assert content(tmp_path / "model") == {"weights": "newer"}
    assert not list(tmp_path.glob(".model.*.old"))


def test_other_schemes_are_refused():
    with pytest.raises(SpecaufError, match="s3://bucket/x"):
        files.as_path("s3://bucket/x")


def test_without_gcsfs_it_says_what_to_install():
    code = (
        "import sys; sys.modules['gcsfs'] = None\ntry: files.as_path('gs://bucket/x')\nexcept Exception as e: print(e)"
    )
    assert "pip install -e '.[gcs]'" in python(code).communicate()[0]


# ---------------------------------------------------------------------------------------------
# gs://


def test_a_missing_bucket_object_or_folder_is_told(storage):
    for path in ("gs://nothere/x", "gs://"):
        with pytest.raises(SpecaufError, match="does not exist"):
            files.write_text(path, "x")
    with pytest.raises(SpecaufError, match="gs://bucket/none does not exist"):
        files.local_copy("gs://bucket/none")
    with pytest.raises(SpecaufError, match="gs://bucket/none does not exist"):
        files.existing_folder("gs://bucket/none", "a model")
    with pytest.raises(SpecaufError, match="gs://bucket/none.json does not exist"):
        files.read_json("gs://bucket/none.json", "settings")
    storage.write("file", b"x")
    with pytest.raises(SpecaufError, match="gs://bucket/file is a file"):
        files.existing_folder("gs://bucket/file", "a model")
    assert storage.names("") == ["file"]


@pytest.mark.parametrize("code", [400, 403])
def test_a_refused_write_is_told(storage, code):
    def refuse(what, name):
        if what == "write":
            raise gcs.Failed(code)

    storage.before = refuse
    with pytest.raises(SpecaufError, match="gs://bucket/a.txt cannot be written: .*"):
        files.write_text("gs://bucket/a.txt", "x")
    with pytest.raises(SpecaufError, match="gs://bucket/model cannot be written: .*"):
        build("gs://bucket/model", weights="x")
    storage.before = lambda what, name: None
    assert storage.names("") == []


def test_small_files_come_back(storage):
    files.write_text("gs://bucket/a/b.json", '{"ä": 1}')
    assert storage.read("a/b.json") == '{"ä": 1}'.encode()
    assert files.read_json("gs://bucket/a/b.json", "settings") == {"ä": 1}
    assert [path.name for path in files.as_path("gs://bucket/a").iterdir()] == ["b.json"]
    storage.write("a/b.json", b'{"other": "host"}')  # no stale listing or content
    assert files.read_json("gs://bucket/a/b.json", "settings") == {"other": "host"}
    storage.write("a/c.json", b"{}")
    assert {path.name for path in files.as_path("gs://bucket/a").iterdir()} == {"b.json", "c.json"}


def test_a_folder_is_fetched_once_and_anew_when_it_changed(storage):
    for name in ("model/config.json", "model/sub/weights", "model2/other"):
        storage.write(name, name.encode())
    first = files.local_copy("gs://bucket/model")
    assert content(first) == {"config.json": "model/config.json", "sub/weights": "model/sub/weights"}
    assert files.local_copy("gs://bucket/model/") == first and len(fetches(storage)) == 2
    storage.write("model/sub/weights", b"model/sub/WEIGHTS")  # of the same size, in the same second
    second = files.local_copy("gs://bucket/model")
    assert content(second)["sub/weights"] == "model/sub/WEIGHTS"
    assert content(first)["sub/weights"] == "model/sub/weights"  # may be in use
    one = files.local_copy("gs://bucket/model/sub/weights")
    assert one.name == "weights" and one.read_text() == "model/sub/WEIGHTS"


def test_a_folder_that_changes_under_the_reading_is_read_again(storage, tmp_path):
    storage.write("model/a", b"old")
    storage.write("model/b", b"old")

    def change(what, name):
        if what == "read" and len(fetches(storage)) == 2:
            time.sleep(0.2)  # the other one has its answer
            storage.write("model/a", b"new")
            storage.write("model/b", b"new")

    storage.before = change
    assert content(files.local_copy("gs://bucket/model")) == {"a": "new", "b": "new"}
    assert not list((tmp_path / "cache/specauf").glob(".*.part"))


def test_processes_that_want_the_same_copy_fetch_it_once(storage):
    for i in range(20):
        storage.write(f"model/{i}", b"x" * 1000)

    def hold(what, name):  # until all have looked
        while what == "read" and storage.seen.count(("list", "model/")) < 3:
            time.sleep(0.01)

    storage.before = hold
    readers = [python("print(len(list(files.local_copy('gs://bucket/model').iterdir())))") for _ in range(3)]
    assert [reader.communicate()[0] for reader in readers] == ["20\n"] * 3
    assert len(fetches(storage)) == 20


def test_a_fetch_that_was_killed_leaves_no_copy(storage, tmp_path):
    for i in range(50):
        storage.write(f"model/{i:02}", b"x")
    storage.before = lambda what, name: killed.kill() if name == "model/40" else None
    killed = python("files.local_copy('gs://bucket/model')")
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert all(path.name.startswith(".") for path in (tmp_path / "cache/specauf").iterdir())
    storage.before = lambda what, name: None
    assert len(content(files.local_copy("gs://bucket/model"))) == 50


def test_a_folder_is_replaced_whole(storage):
    build("gs://bucket/model", config="1", weights="1", old="1")
    build("gs://bucket/model", weights="2", sub__more="2")
    assert content(files.local_copy("gs://bucket/model")) == {"sub/more": "2", "weights": "2"}
    assert storage.names("") == ["model/sub/more", "model/weights"]


def test_what_readers_look_for_comes_last(storage):
    with files.replace_folder("gs://bucket/model") as new:
        for name in ("a", "config.json", "manifest.json", "z"):
            (new / name).write_text("x")
    copied = [name for what, name in storage.seen if what == "copy"]
    assert copied == [f"model/{name}" for name in ("a", "z", "config.json", "manifest.json")]


@pytest.mark.parametrize("at", range(3))
def test_a_kill_in_an_upload_leaves_the_old_folder(storage, at):
    build("gs://bucket/model", a="old", b="old", c="old")
    writes = iter(range(3))
    storage.before = lambda what, name: killed.kill() if what == "write" and next(writes) == at else None
    killed = python("""
with files.replace_folder('gs://bucket/model') as new:
    for name in 'abc':
        (new / name).write_text('new')
""")
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    storage.before = lambda what, name: None
    assert content(files.local_copy("gs://bucket/model")) == dict.fromkeys("abc", "old")
    build("gs://bucket/model", a="newer")
    assert storage.names("") == ["model/a"]  # nothing of the killed one is left


def test_an_error_while_building_leaves_the_old_folder(storage, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    build("gs://bucket/model", a="old")
    with pytest.raises(ValueError), files.replace_folder("gs://bucket/model") as new:
        (new / "a").write_text("new")
        raise ValueError
    assert storage.read("model/a") == b"old" and storage.names("") == ["model/a"]
    assert not list(tmp_path.iterdir())


def test_a_fresh_folder_takes_no_place_that_is_taken(storage):
    with files.fresh_folder("gs://bucket/data") as new:
        (new / "manifest.json").write_text("{}")
    for path, what in (("data", "a prepared dataset"), ("data/manifest.json", "files")):
        with pytest.raises(SpecaufError, match=f"already holds {what}"), files.fresh_folder(f"gs://bucket/{path}"):
            raise AssertionError("refused before the work")
    with pytest.raises(SpecaufError, match="already holds"), files.fresh_folder("gs://bucket/late") as new:
        storage.write("late/other", b"x")  # another process was quicker
    assert storage.names("") == ["data/manifest.json", "late/other"]


def test_folders_are_moved_and_removed(storage):
    for name in ("run/5/a", "run/5/sub/b", "run/50/c"):
        storage.write(name, name.encode())
    files.move_folder(files.as_path("gs://bucket/run/5"), files.as_path("gs://bucket/aside/5.1"))
    assert storage.names("") == ["aside/5.1/a", "aside/5.1/sub/b", "run/50/c"]
    files.remove_folder(files.as_path("gs://bucket/aside"))
    files.remove_folder(files.as_path("gs://bucket/aside"))
    assert storage.names("") == ["run/50/c"]


def test_a_growing_folder_copies_what_grew(storage):
    def writes():
        return [name for what, name in storage.seen if what == "write"]

    with pytest.raises(ValueError), files.GrowingFolder("gs://bucket/run") as growing:
        (growing.path / "board").mkdir()
        (growing.path / "board/events").write_text("e")
        (growing.path / "log").write_text("1\n")
        growing.push()
        assert sorted(writes()) == ["run/board/events", "run/log"]
        (growing.path / "log").write_text("1\n2\n")
        growing.push()
        assert writes()[2:] == ["run/log"] and storage.read("run/log") == b"1\n2\n"
        (growing.path / "log").write_text("1\n2\n3\n")
        raise ValueError  # what was logged before an error is kept
    assert storage.read("run/log") == b"1\n2\n3\n" and not growing.path.exists()


def test_a_store_that_fails_at_the_end_of_a_stopped_run_is_worth_another_try(storage):
    def refuse(what, name):
        if what == "write":
            raise gcs.Failed(400)

    with pytest.raises(IOFailed) as found, files.GrowingFolder("gs://bucket/run") as growing:
        (growing.path / "log").write_text("1\n")
        storage.before = refuse
        raise Stopped("saved", 75)
    assert found.value.code == 74
    storage.before = lambda what, name: None


# ---------------------------------------------------------------------------------------------
# Why there is a layer: what gcsfs and epath do by themselves


def test_gcsfs_alone_leaves_files_of_two_folders_after_a_kill(storage, tmp_path):
    """What `replace_folder` is for."""
    for name in "abc":
        storage.write(f"model/{name}", b"old")
        (tmp_path / name).write_text("new")
    writes = iter(range(9))
    storage.before = lambda what, name: killed.kill() if what == "write" and next(writes) == 1 else None
    paths = [str(tmp_path / name) for name in "abc"], [f"gs://bucket/model/{name}" for name in "abc"]
    killed = python(f"import fsspec, time; fsspec.filesystem('gcs').put(*{paths}, batch_size=1); time.sleep(9)")
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert (storage.read("model/a"), storage.read("model/c")) == (b"new", b"old")


def test_gcsfs_alone_appends_by_writing_all_again(storage):
    """What `GrowingFolder` is for: one copy for each checkpoint, not one for each line."""
    path = epath.Path("gs://bucket/metrics.jsonl")
    path.write_text("1\n")
    for line in range(3):
        with path.open("a") as file:
            file.write(f"{line}\n")
    assert [name for what, name in storage.seen if what == "write"] == ["metrics.jsonl"] * 4


def test_gcsfs_alone_does_not_see_what_another_host_writes(storage):
    """Why `storage.storage` has no cache of listings."""
    storage.write("run/1", b"x")
    cached = fsspec.filesystem("gcs", use_listings_cache=True, skip_instance_cache=True)
    assert len(cached.ls("gs://bucket/run")) == 1
    storage.write("run/2", b"x")
    assert len(cached.ls("gs://bucket/run")) == 1
    assert len(list(files.as_path("gs://bucket/run").iterdir())) == 2
