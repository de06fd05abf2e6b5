"""Every command on gs:// paths, with a training that is killed in the middle of a checkpoint and goes on."""

import json
import os
import signal
import subprocess
import sys

import gcs
import pytest
import tiny

from specauf_jax.cli import main
from specauf_jax.commands import dialogues
from specauf_jax.data.dataset import open_dataset
from specauf_jax.data.tokenizer import copy_tokenizer
from specauf_jax.files import local_copy, write_text
from specauf_jax.models.weights import load_drafter, save_target

TRAIN = ["train", "--target", "gs://bucket/target", "--data", "gs://bucket/data", "--drafter.block-size", "4",
         "--drafter.num-hidden-layers", "1", "--drafter.target-layer-ids", "1", "--train.steps", "12",
         "--train.batch-size", "2", "--train.num-anchors", "4", "--train.log-every", "1",
         "--train.checkpoint-every", "4"]  # fmt: skip
PROMPTS = [{"prompt": "line 7: the quick"}, {"prompt": "lazy dogs"}]


def run(*arguments: str) -> None:
    assert main(list(arguments)) == 0


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    """A bucket with data, target, prompts, and the run of a training that was killed in its checkpoint of step 8."""
    root = tmp_path_factory.mktemp("remote")
    with gcs.serving("bucket") as storage, pytest.MonkeyPatch.context() as patch:
        for name, value in (storage.environment | {"XDG_CACHE_HOME": str(root / "cache")}).items():
            patch.setenv(name, value)
        lines = [f"line {i}: the quick brown fox jumps over {i * i} lazy dogs\n" for i in range(200)]
        storage.write("text/a/1.txt", "".join(lines[:100]).encode())
        storage.write("text/2.txt", "".join(lines[100:]).encode())
        storage.write("prompts.jsonl", "".join(json.dumps(prompt) + "\n" for prompt in PROMPTS).encode())
        run("prepare", "--input", "gs://bucket/text", "--out", "gs://bucket/data", "--vocab-size", "300",
            "--sequence-length", "64")  # fmt: skip
        target = tiny.target_config(vocab_size=300)
        save_target(tiny.target_params(target), target, "gs://bucket/target")
        copy_tokenizer("gs://bucket/data/tokenizer", "gs://bucket/target")
        storage.before = lambda what, name: killed.kill() if name.startswith("run/checkpoints/8/") else None
        killed = subprocess.Popen([sys.executable, "-m", "specauf_jax", *TRAIN, "--out", "gs://bucket/run"],
                                  env=os.environ, stdout=subprocess.DEVNULL)  # fmt: skip
        assert killed.wait() == -signal.SIGKILL
        storage.before = lambda what, name: None
        yield storage


@pytest.fixture
def trained(storage):
    """The bucket with that training ended: by the first test, or here where that one does not run."""
    if not storage.names("run/drafter/"):
        run(*TRAIN, "--out", "gs://bucket/run")
    return storage


def steps(log: bytes) -> list[int]:
    return [json.loads(line)["step"] for line in log.splitlines()]


@pytest.mark.long
def test_a_killed_training_goes_on_to_the_same_bits(storage, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("jax.profiler.start_trace", lambda folder: write_text(folder / "trace", "x"))
    monkeypatch.setattr("jax.profiler.stop_trace", lambda: None)
    assert steps(storage.read("run/metrics.jsonl")) == list(range(1, 9))  # of which 5 to 8 come again
    run(*TRAIN, "--out", str(tmp_path / "whole"))
    capsys.readouterr()
    run(*TRAIN, "--out", "gs://bucket/run", "--train.profile-steps", "2")
    said = capsys.readouterr().out
    assert "resuming gs://bucket/run at step 4 of 12" in said
    assert tiny.same_bits(load_drafter("gs://bucket/run/drafter")[0], load_drafter(tmp_path / "whole/drafter")[0])
    assert storage.read("run/drafter/model.safetensors") == (tmp_path / "whole/drafter/model.safetensors").read_bytes()
    log, whole = storage.read("run/metrics.jsonl"), (tmp_path / "whole/metrics.jsonl").read_bytes()
    assert steps(log) == steps(whole) == list(range(1, 13))
    assert json.loads(log.splitlines()[-1])["loss"] == json.loads(whole.splitlines()[-1])["loss"]
    assert json.loads(storage.read("run/config.json"))["target"] == "gs://bucket/target"
    assert len(storage.names("run/tensorboard/")) == 2 and storage.names("run/profile") == ["run/profile/trace"]
    assert not [name for name in storage.names("") if ".part" in name]


def test_a_damaged_checkpoint_is_moved_aside(trained, capsys):
    storage = trained
    [newest] = storage.names("run/checkpoints/12/state/manifest.ocdbt")
    drafter = storage.read("run/drafter/model.safetensors")
    storage.write(newest, storage.read(newest)[:10])
    run(*TRAIN, "--out", "gs://bucket/run")
    said = capsys.readouterr().out
    assert "checkpoint 12 is damaged and was moved to gs://bucket/run/damaged_checkpoints/12." in said
    assert "resuming gs://bucket/run at step 8 of 12" in said
    assert storage.names("run/damaged_checkpoints/12.") and storage.read("run/drafter/model.safetensors") == drafter


def test_evaluate_generate_doctor_export_and_report(trained, capsys):
    storage = trained
    models = ["--target", "gs://bucket/target", "--drafter", "gs://bucket/run/drafter"]
    short = ["--max-new-tokens", "8"]
    run("evaluate", *models, *short, "--prompts", "mine=gs://bucket/prompts.jsonl", "--repeats", "1",
        "--out", "gs://bucket/run/results.json")  # fmt: skip
    results = json.loads(storage.read("run/results.json"))
    assert results["overall"]["exact"] and results["meta"]["objective"] == "auf"
    run("generate", *models, *short, "--prompts", "gs://bucket/prompts.jsonl", "--out", "gs://bucket/answers.jsonl")
    assert len(storage.read("answers.jsonl").splitlines()) == len(PROMPTS)
    run("doctor", *models, "--max-prompts", "0", "--out", "gs://bucket/doctor.json")
    assert json.loads(storage.read("doctor.json"))["summary"]["errors"] == 0
    run("export", "--run", "gs://bucket/run", "--step", "last", "--out", "gs://bucket/exported")
    run("export", "--drafter", "gs://bucket/run/drafter", "--out", "gs://bucket/exported")  # in the other's place
    assert storage.read("exported/model.safetensors") == storage.read("run/drafter/model.safetensors")
    run("report", "gs://bucket/run", "two=gs://bucket/run/results.json", "--out", "gs://bucket/report.html")
    tau = f"{results['overall']['tau_micro']:.3f}"
    assert tau in capsys.readouterr().out and tau.encode() in storage.read("report.html")


def test_a_killed_regeneration_goes_on(storage, monkeypatch):
    arguments = ["regenerate", "--data", "gs://bucket/data", "--target", "gs://bucket/target", "--prompt-length", "8",
                 "--max-new-tokens", "6", "--batch-size", "4", "--documents", "20"]  # fmt: skip
    run(*arguments, "--out", "gs://bucket/again/whole")
    save, saved = dialogues.save, []

    def interrupted(path, talks):
        if len(saved) == 1:
            raise KeyboardInterrupt
        saved.append(path.name)
        save(path, talks)

    monkeypatch.setattr(dialogues, "save", interrupted)
    assert main([*arguments, "--out", "gs://bucket/again/parts"]) == 130
    assert storage.names("again/parts") == ["again/parts.parts/0.json", "again/parts.parts/settings.json"]
    monkeypatch.setattr(dialogues, "save", save)
    seen = len(storage.seen)
    run(*arguments, "--out", "gs://bucket/again/parts")
    assert ("write", "again/parts.parts/0.json") not in storage.seen[seen:]
    assert not storage.names("again/parts.")
    whole, parts = (open_dataset(f"gs://bucket/again/{name}") for name in ("whole", "parts"))
    tokens = [[rows[i]["tokens"].tolist() for i in range(len(rows))] for rows in (whole, parts)]
    assert tokens[0] == tokens[1]


def test_bad_paths_are_told_before_any_work(storage, capsys):
    models = ["--target", "gs://bucket/target", "--drafter", "gs://bucket/none"]
    evaluate = ["evaluate", *models, "--prompts", "mine=gs://bucket/prompts.jsonl"]
    for arguments, said in (
        ([*evaluate, "--out", "gs://nothere/results.json"], "gs://nothere does not exist"),
        ([*evaluate, "--out", "gs://bucket/r.json"], "gs://bucket/none does not exist"),
        ([*TRAIN, "--out", "gs://nothere/run"], "gs://nothere does not exist"),
        (["prepare", "--input", "gs://bucket/text", "--out", "gs://bucket/data"], "already holds a prepared dataset"),
        (["prepare", "--input", "gs://bucket/none", "--out", "gs://bucket/x"], "gs://bucket/none does not exist"),
        (["report", "gs://bucket/none", "--out", "gs://bucket/report.html"], "gs://bucket/none does not exist"),
        (["export", "--run", "gs://bucket/none", "--out", "gs://bucket/x"], "gs://bucket/none does not exist"),
    ):
        assert main(arguments) == 2
        assert said in capsys.readouterr().err
    assert not storage.names("x")


def test_the_dataset_was_fetched_once(storage):
    """By the killed training, all later ones and the commands of this file."""
    assert [name for what, name in storage.seen if what == "read"].count("data/dataset/features.json") == 1
    assert (local_copy("gs://bucket/data") / "dataset/features.json").is_file()
