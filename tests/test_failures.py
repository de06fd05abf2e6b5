"""How commands end: codes, one failure for all processes, signals, disks, terminals."""

import errno
import fnmatch
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from specauf_jax import cli, environment, files, machine
from specauf_jax.cli import _outcome
from specauf_jax.commands.record import run_folder
from specauf_jax.errors import CannotGoOn, IOFailed, SpecaufError, Stopped, at_work
from specauf_jax.models.tensors import write_tensors

ENVIRONMENT = os.environ | {"JAX_PLATFORMS": "cpu"}

ONE_OF_ALL = """
import errno, sys, time
import numpy as np
from specauf_jax.cli import _outcome
from specauf_jax.config import Hosts
from specauf_jax.distributed import everywhere, is_primary, together
from specauf_jax.errors import SpecaufError
count, index, culprit, kind = int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]

def work():
    everywhere(True)
    if index == culprit:
        print("failed at", time.time(), flush=True)
        if kind == "input":
            raise SpecaufError("a shard is not there", "all shards", "restore it")
        if kind == "disk":
            raise OSError(errno.ENOSPC, "No space left on device")
        raise ZeroDivisionError("a fault of ours")
    everywhere(True)  # in which the others wait for it

outcome = together(Hosts(coordinator=sys.argv[1], count=count, index=index), lambda: _outcome(work))
print("went on")
sys.exit(outcome.code)
"""


def end_together(count: int, culprit: int, kind: str) -> tuple[list[int], list[str], float]:
    """Exit code and stderr of every process, and the seconds from the failure to the last one's end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{probe.getsockname()[1]}"
    lines = [[sys.executable, "-c", ONE_OF_ALL, coordinator, str(count), str(i), str(culprit), kind]
             for i in range(count)]  # fmt: skip
    processes = [subprocess.Popen(line, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
                 for line in lines]  # fmt: skip
    said = [process.communicate(timeout=120) for process in processes]
    seconds = time.time() - float(said[culprit][0].split()[-1])
    assert not any("went on" in out for out, _ in said)
    return [process.returncode for process in processes], [err for _, err in said], seconds


@pytest.mark.parametrize("count,culprit,kind,code", [(2, 1, "input", 2), (4, 0, "disk", 74), (2, 0, "fault", 1)])
def test_what_one_process_finds_ends_all_of_them_with_its_code(count, culprit, kind, code):
    codes, said, seconds = end_together(count, culprit, kind)
    assert codes == [code] * count, said
    reason = {"input": "a shard is not there", "disk": "No space left", "fault": "a fault of ours"}[kind]
    assert all(reason in text for text in said), said
    assert seconds < 10
    assert kind == "fault" or not any("Traceback" in text for text in said), said


# ---------------------------------------------------------------------------------------------
# One process


def start(code: str, *arguments: str, sigint=signal.default_int_handler) -> subprocess.Popen:
    """In the foreground, whatever these tests run in; with SIG_IGN as a shell starts a job in the background."""
    line, pipe = [sys.executable, "-c", code, *arguments], subprocess.PIPE
    prepare = functools.partial(signal.signal, signal.SIGINT, sigint)
    return subprocess.Popen(line, env=ENVIRONMENT, stdout=pipe, stderr=pipe, text=True, preexec_fn=prepare)


@pytest.mark.parametrize(
    "error,code",
    [
        (SpecaufError("a", "b", "c"), 2),
        (FileNotFoundError(2, "No such file"), 2),
        (PermissionError(13, "Permission denied"), 2),
        (OSError(errno.ENOSPC, "No space left on device"), 74),
        (OSError("a store without a number"), 74),
        (TimeoutError("the network"), 74),
        (KeyboardInterrupt(), 130),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"), 3),
        (Stopped("saved", 75), 75),
    ],
)
def test_codes(error, code):
    def work():
        raise error

    outcome = _outcome(work)
    assert outcome.code == code and outcome.failed == (code != 75) and outcome.said


def test_a_fault_of_the_program_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        _outcome(lambda: 1 // 0)


def test_an_error_of_files_at_work_is_no_bad_input():
    with pytest.raises(IOFailed), at_work():
        raise FileNotFoundError(2, "somebody deleted it")
    with pytest.raises(CannotGoOn, match="a row is damaged"), at_work():
        raise SpecaufError("a row is damaged", "a whole file", "copy it again")
    with pytest.raises(IOFailed, match="once"), at_work():
        raise IOFailed("once", "b", "c")


SWALLOWS = """
import time
from specauf_jax.signals import interruptible
with interruptible():
    try:
        print("ready", flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        try:
            print("swallowed", flush=True)
            time.sleep(60)
        except KeyboardInterrupt:
            time.sleep(60)
"""


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_ends_even_what_swallows_it(times):
    process = start(SWALLOWS)
    assert process.stdout.readline() == "ready\n"
    begin = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "swallowed\n"
    if times == 2:
        process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert process.returncode == 130
    assert (time.monotonic() - begin < 2) == (times == 2)


def test_a_background_job_is_left_alone():
    process = start(SWALLOWS.replace("sleep(60)", "sleep(4)", 1), sigint=signal.SIG_IGN)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=10)[0] == "" and process.returncode == 0


def test_ctrl_c_while_starting():
    line = "import sys; from specauf_jax.__main__ import run; print('ready', flush=True); sys.exit(run())"
    for delay in (0.05, 0.6, 1.2):
        process = start(line, "generate", "--target", "x", "--prompts", "y")
        process.stdout.readline()
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=5)
        assert process.returncode in (130, 2), said  # 2: it was quicker
        assert "Traceback" not in said


def test_a_closed_pipe_and_an_odd_encoding_are_no_faults():
    read, write = os.pipe()
    os.close(read)
    for arguments in (["--help"], ["train", "--help"]):
        done = subprocess.run([sys.executable, "-m", "specauf_jax", *arguments], env=ENVIRONMENT, stdout=write,
                              stderr=subprocess.PIPE, text=True)  # fmt: skip
        assert not done.stderr and done.returncode == 141, done.stderr
    line = [sys.executable, "-m", "specauf_jax", "trian"]
    assert subprocess.run(line, env=ENVIRONMENT, stdout=write, stderr=write).returncode == 2
    os.close(write)
    done = subprocess.run([sys.executable, "-m", "specauf_jax", "doctor", "--target", "…", "--drafter", "λ"],
                          env=ENVIRONMENT | {"PYTHONIOENCODING": "ascii"}, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 2 and "does not exist" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_stream_that_is_not_open_is_no_fault(closed):
    line = f"{sys.executable} -m specauf_jax --help {closed}"
    done = subprocess.run(line, shell=True, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr


def test_the_last_word_of_a_process_needs_no_reader():
    read, write = os.pipe()
    os.close(read)
    code = (
        "import time; from specauf_jax.signals import leave; import threading; "
        "threading.Thread(target=leave, args=('interrupted', 130)).start(); time.sleep(9)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, stderr=write)
    os.close(write)
    assert done.returncode == 130


def test_names_are_shown_as_they_are(tmp_path, capsys):
    run = tmp_path / "r:cat:[red]"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1, "tau": 2.0}\n')
    assert cli.main(["report", str(run), "--out", str(tmp_path / ":cat:.html")]) == 0
    assert ":cat:.html" in capsys.readouterr().out.replace("\n", "")


def test_a_name_that_is_not_utf_8_is_written_with_question_marks(tmp_path):
    files.write_text(tmp_path / "page.html", os.fsdecode(b"r\xff"))
    assert (tmp_path / "page.html").read_text() == "r?"


def test_a_platform_that_is_not_there():
    line = [
        sys.executable,
        "-m",
        "specauf_jax",
        "generate",
        "--target",
        "t",
        "--prompts",
        "p",
        "--method",
        "autoregressive",
    ]
    done = subprocess.run(line, env=ENVIRONMENT | {"JAX_PLATFORMS": "tpu"}, capture_output=True, text=True)
    assert done.returncode == 2 and "JAX_PLATFORMS=tpu" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "libtpu,files,given,expected",
    [(True, [], None, "cpu"), (True, ["/dev/accel0"], None, None), (True, ["/dev/nvidia0"], None, None),
     (False, [], None, None), (True, [], "tpu", "tpu")],
)  # fmt: skip
def test_a_libtpu_without_chips_is_left_alone(libtpu, files, given, expected, monkeypatch):
    monkeypatch.setattr(machine, "_has_libtpu", lambda: libtpu)
    monkeypatch.setattr(machine.glob, "glob", lambda pattern: fnmatch.filter(files, pattern))
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    if given:
        monkeypatch.setenv("JAX_PLATFORMS", given)
    machine.choose_platform()
    assert os.environ.get("JAX_PLATFORMS") == expected and os.environ["JAX_ENABLE_X64"] == "0"


# ---------------------------------------------------------------------------------------------
# Where results go


def test_output_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "prompts").write_text("p")
    (tmp_path / "text").write_text("t")
    (tmp_path / "link").symlink_to("prompts")
    os.mkfifo(tmp_path / "pipe")
    wrong = {"": "empty path", "  ": "empty path", "folder": "is a folder", "pipe": "device or pipe",
             "/dev/null": "device or pipe", "prompts": "written over prompts", "link": "written over prompts",
             "folder/../prompts": "written over prompts", "folder/inside": "written over folder",
             "text/x": "text is no folder", "text/x/y": "text is no folder"}  # fmt: skip
    for path, reason in wrong.items():
        with pytest.raises(SpecaufError, match=reason):
            files.output_file(path, "prompts", None, "folder")
    assert files.output_file("new/results.json", "prompts").name == "results.json"
    assert not (tmp_path / "new").exists()


def test_links_stay_where_results_are_written_through_them(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real.json").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "link.json").symlink_to(tmp_path / "real.json")
    files.write_text(tmp_path / "link.json", "new")
    with files.replace_folder(tmp_path / "link") as folder:
        (folder / "a").write_text("new")
    (tmp_path / "empty").mkdir()
    (tmp_path / "fresh").symlink_to(tmp_path / "empty")
    with files.fresh_folder(tmp_path / "fresh") as folder:
        (folder / "a").write_text("new")
    for name in ("link", "link.json", "fresh"):
        assert (tmp_path / name).is_symlink()
    assert (tmp_path / "real.json").read_text() == (tmp_path / "real/a").read_text() == "new"
    assert (tmp_path / "empty/a").exists() and not list(tmp_path.glob(".*"))


def test_one_job_a_folder_and_no_lock_of_a_killed_one(tmp_path):
    code = f"""
import time
from specauf_jax.files import sole_user
with sole_user({str(tmp_path / "run")!r}):
    print("ready", flush=True)
    time.sleep(60)
"""
    process = start(code)
    process.stdout.readline()
    with pytest.raises(SpecaufError, match="another job is at work"), files.sole_user(tmp_path / "run"):
        pass
    process.kill()
    process.communicate()
    with files.sole_user(tmp_path / "run"), files.sole_user(tmp_path / "other"):
        pass
    assert not list((tmp_path / "run").iterdir())


def run_record_of(trained: str) -> str:
    return json.dumps({"train": {}, "target": "t"} | ({"objective": {}} if trained == "drafter" else {}))


@pytest.mark.parametrize(
    "there,inputs,reason",
    [
        ({"config.json": '{"architectures": ["Qwen3ForCausalLM"]}', "model.safetensors": ""}, [], "model.safetensors"),
        ({"config.json": '{"architectures": ["Qwen3ForCausalLM"]}'}, [], "config.json of something else"),
        ({"manifest.json": "{}"}, [], "manifest.json"),
        ({"dataset_info.json": "{}"}, [], "dataset_info.json"),
        ({"tokenizer.json": "{}"}, [], "tokenizer.json"),
        ({"config.json": run_record_of("target")}, [], "config.json of something else"),
        ({"drafter/config.json": "{}", "drafter/notes": ""}, [], "something else than a"),
        ({}, ["run/drafter"], "while .*drafter is read"),
        ({}, ["run/checkpoints/3"], "while .*checkpoints/3 is read"),
        ({}, ["run"], "written over"),
        ({}, ["."], "written over"),
    ],
)
def test_a_run_writes_into_no_folder_of_something_else(there, inputs, reason, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, text in there.items():
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_text(text)
    with pytest.raises(SpecaufError, match=reason), run_folder("run", "drafter", None, *inputs):
        pass
    assert not inputs or not (tmp_path / "run").exists()


def test_a_run_goes_on_in_its_own_folder(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text(run_record_of("drafter"))
    (tmp_path / "run/notes.txt").write_text("mine")
    with run_folder(tmp_path / "run", "drafter", tmp_path / "data"):
        pass


def test_files_are_as_readable_as_the_umask_says(tmp_path):
    before = os.umask(0o027)
    try:
        write_tensors({"a": np.zeros(2, np.float32)}, tmp_path / "a.safetensors")
        files.write_text(tmp_path / "b", "b")
    finally:
        os.umask(before)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("a.safetensors", "b")] == [0o640, 0o640]


# ---------------------------------------------------------------------------------------------
# What results say of their making


def test_the_revision_is_that_of_this_project_alone(tmp_path, monkeypatch):
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "theirs"], check=True)
    inside = tmp_path / "project/specauf_jax"
    inside.mkdir(parents=True)
    monkeypatch.setattr(environment, "__file__", str(inside / "environment.py"))
    assert environment._revision() is None
    (tmp_path / "project/REVISION").write_text("abc123+\n")
    assert environment._revision() == "abc123+"
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "specauf_jax/environment.py"))
    assert len(environment._revision()) == 12
