"""Killed and interrupted work goes on to the same result, bit for bit."""

import dataclasses
import io
import json
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
from rich.console import Console

from specauf_jax import config as c
from specauf_jax.architecture import Drafter
from specauf_jax.commands import dialogues
from specauf_jax.commands import train as train_module
from specauf_jax.commands.prepare import prepare
from specauf_jax.commands.prepare_settings import Prepare
from specauf_jax.commands.regenerate import regenerate
from specauf_jax.commands.regenerate_settings import Regenerate
from specauf_jax.commands.train import train
from specauf_jax.commands.train_settings import Train
from specauf_jax.data.dataset import open_dataset
from specauf_jax.data.tokenizer import copy_tokenizer
from specauf_jax.errors import SpecaufError, Stopped
from specauf_jax.models.weights import save_target
from specauf_jax.training.checkpoint import Checkpoints
from specauf_jax.training.loop import MetricsLog

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("resume")
    lines = [f"line {i}: the quick brown fox jumps over {i * i} lazy dogs\n" for i in range(200)]
    (root / "text.txt").write_text("".join(lines))
    prepare(Prepare(input=(str(root / "text.txt"),), out=str(root / "data"), vocab_size=300, sequence_length=64), QUIET)
    target = tiny.target_config(vocab_size=300)
    save_target(tiny.target_params(target), target, root / "target")
    copy_tokenizer(root / "data/tokenizer", root / "target")
    return root


def settings(world, out, **changes) -> Train:
    optimisation = {"steps": 12, "batch_size": 2, "num_anchors": 4, "checkpoint_every": 2, "learning_rate": 1e-2}
    return Train(
        target=str(world / "target"),
        data=str(world / "data"),
        out=str(out),
        drafter=Drafter(block_size=4, num_hidden_layers=1, target_layer_ids=(1,)),
        train=c.TrainOptimisation(**(optimisation | changes)),
    )


def test_a_training_that_sigterm_stopped_goes_on_to_the_same_bits(world, tmp_path, monkeypatch):
    """One process; test_distributed kills and terminates two, test_remote_runs kills one in a write."""
    train(settings(world, tmp_path / "alone", checkpoint_every=100, log_every=1), QUIET)
    add = MetricsLog.add

    def terminated(log, number, metrics):
        add(log, number, metrics)
        if number == 4:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)  # a thread of its own hears it

    stopped = settings(world, tmp_path / "stopped", checkpoint_every=100, log_every=1)
    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "add", terminated)
        with pytest.raises(Stopped, match="saved at step") as found:
            train(stopped, QUIET)
    [newest] = [int(folder.name) for folder in (tmp_path / "stopped/checkpoints").iterdir()]
    assert 4 <= newest < 12 and f"at step {newest} of 12" in str(found.value)
    assert found.value.code == stopped.hosts.stopped_code
    said = io.StringIO()
    train(stopped, Console(file=said, width=1000))
    assert f"at step {newest} of 12" in said.getvalue()
    one, other = (tmp_path / name for name in ("alone", "stopped"))
    weights = "drafter/model.safetensors"
    assert (one / weights).read_bytes() == (other / weights).read_bytes()
    losses = [
        [(line["step"], line["loss"]) for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())]
        for run in (one, other)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 12


def test_objectives_one_after_another(world, tmp_path, monkeypatch):
    """Stopped behind the change and before it; the first part is that of the first objective alone."""
    staged = {"objectives": "decay@0,auf@0.5", "objective": c.Objective("decay", gamma=2.0)}

    def run(name, stop=None, changes=staged):
        config = dataclasses.replace(settings(world, tmp_path / name, log_every=1), **changes)
        with monkeypatch.context() as patch:
            if stop:
                patch.setattr("specauf_jax.training.loop.Watch.stopping", lambda *_: stop.pop(0))
            train(config, QUIET)
        return {
            line["step"]: line for line in map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        }

    straight = run("straight")
    alone = run("alone", changes={"objective": c.Objective("decay", gamma=2.0)})
    assert [straight[step]["loss"] for step in range(1, 7)] == [alone[step]["loss"] for step in range(1, 7)]
    assert straight[7]["tau"] == alone[7]["tau"] and straight[7]["loss"] != alone[7]["loss"]
    assert ["common_token_accuracy" in straight[step] for step in (1, 6, 7, 12)] == [True, True, False, False]
    for stop in ([False] * 3 + [True], [False] * 4 + [True]):  # at step 4, then at step 9
        with pytest.raises(Stopped):
            run("stopped", list(stop))
    resumed = run("stopped")
    weights = "drafter/model.safetensors"
    assert (tmp_path / "straight" / weights).read_bytes() == (tmp_path / "stopped" / weights).read_bytes()
    assert {step: line["loss"] for step, line in resumed.items()} == {s: line["loss"] for s, line in straight.items()}
    origin = json.loads((tmp_path / "straight/drafter/specauf.json").read_text())
    assert origin["objectives"] == "decay@0,auf@0.5" and origin["objective"]["name"] == "auf"


@pytest.mark.parametrize(
    "text", ["decay", "decay@0.1,auf@0.5", "decay@0,auf@1", "decay@0,auf@0", "dcay@0", "@0", "decay@x"]
)
def test_objectives_that_are_no_schedule_are_refused(world, tmp_path, text):
    with pytest.raises(SpecaufError, match="objectives is|name is"):
        dataclasses.replace(settings(world, tmp_path / "run"), objectives=text)


@pytest.mark.parametrize("text", ["decay@0,auf@0.04", "decay@0,auf@0.96", "decay@0,auf@0.5,decay@0.51"])
def test_an_objective_without_a_step_is_refused(world, tmp_path, text):
    with pytest.raises(SpecaufError, match=f"objectives {text} of 12 steps begin behind 0, "):
        dataclasses.replace(settings(world, tmp_path / "run"), objectives=text)


def test_survival_by_a_base_branch_that_knows_no_acceptance_is_refused(world, tmp_path):
    survival = c.Objective("survival", witness="base")
    for base in (c.Objective("auf"), c.Objective("auf", "kl", temperature=0.5)):
        with pytest.raises(SpecaufError, match="survival with witness base"):
            dataclasses.replace(settings(world, tmp_path / "run"), objective=survival, base_objective=base)


def test_settings_of_an_objective_that_does_not_come_are_refused(world, tmp_path):
    with pytest.raises(SpecaufError, match="objective.name griffin with objectives decay@0,auf@0.8"):
        dataclasses.replace(
            settings(world, tmp_path / "run"), objectives="decay@0,auf@0.8", objective=c.Objective("griffin")
        )


def test_the_newest_checkpoints_and_the_best_are_kept(world, tmp_path, monkeypatch):
    scores = iter([1.0, 9.0, None, 3.0, 4.0, 5.0])
    monkeypatch.setattr("specauf_jax.training.loop.MetricsLog.score", lambda self, name, step: next(scores))
    train(settings(world, tmp_path / "run"), QUIET)
    checkpoints = Checkpoints(tmp_path / "run/checkpoints", keep_last=None)
    assert checkpoints.steps() == [4, 10, 12]
    assert (checkpoints.latest(), checkpoints.best()) == (12, 4)
    checkpoints.close()


def test_metrics_of_lost_steps_are_written_once(world, tmp_path):
    """A run that stopped between checkpoints logs every step again, not twice."""
    run = tmp_path / "run"
    train(settings(world, run, log_every=1), QUIET)
    whole = (run / "metrics.jsonl").read_text().splitlines()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "loss": 1.0}\n{"step": 14, "lo')  # what a kill leaves
    train(settings(world, run, log_every=1), QUIET)
    assert (run / "metrics.jsonl").read_text().splitlines() == whole


def test_a_run_compiles_its_step_once_and_traces_warm_steps(world, tmp_path, monkeypatch):
    """Across checkpoints and logs; what goes between host and device goes by name, as the loop forbids the rest."""
    placed, make = [], train_module.place_drafter_step
    monkeypatch.setattr(train_module, "place_drafter_step", lambda *_: placed.append(make(*_)) or placed[-1])
    train(settings(world, tmp_path / "run", log_every=1, profile_steps=2), QUIET)
    assert len(placed) == 1 and placed[0].step._cache_size() == 1
    assert list((tmp_path / "run/profile").rglob("*.xplane.pb"))
    metrics = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == list(range(1, 13))
    last = metrics[-1]
    assert last["tokens_per_s"] == 2 * 64 / last["step_s"] and 0 < last["goodput"] < 1 and 0 < last["data_wait"] < 1
    assert last["tflop_per_s_target"] > 0 and last["tflop_per_s_drafter"] > 0


def test_an_interrupted_regeneration_does_not_go_on_with_other_data(world, tmp_path, monkeypatch):
    shutil.copytree(world / "data", tmp_path / "data")
    shutil.copytree(world / "target", tmp_path / "target")
    config = Regenerate(data=str(tmp_path / "data"), target=str(tmp_path / "target"), out=str(tmp_path / "out"),
                        prompt_length=8, max_new_tokens=2, batch_size=4, documents=8)  # fmt: skip

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(dialogues, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            regenerate(config, QUIET)
    shutil.rmtree(tmp_path / "data")
    prepare(Prepare(input=(str(world / "text.txt"),), out=str(tmp_path / "data"), sequence_length=60,
                    tokenizer=str(world / "data/tokenizer")), QUIET)  # fmt: skip
    with pytest.raises(SpecaufError, match="made with another data"):
        regenerate(config, QUIET)
    shutil.rmtree(tmp_path / "data")
    shutil.copytree(world / "data", tmp_path / "data")
    save_target(tiny.target_params(tiny.target_config(vocab_size=300), seed=1), tiny.target_config(vocab_size=300),
                tmp_path / "target")  # fmt: skip
    with pytest.raises(SpecaufError, match="made with another target"):
        regenerate(config, QUIET)
    (tmp_path / "new.parts").mkdir()
    (tmp_path / "new.parts/notes").write_text("mine")
    with pytest.raises(SpecaufError, match="new.parts holds something else"):
        regenerate(dataclasses.replace(config, out=str(tmp_path / "new")), QUIET)
    with pytest.raises(SpecaufError, match="max_new_tokens 65 for rows of 64 tokens"):
        regenerate(dataclasses.replace(config, out=str(tmp_path / "more"), max_new_tokens=65), QUIET)


def test_an_interrupted_regeneration_goes_on_where_it_stopped(world, tmp_path, monkeypatch):
    def config(out):
        sampling = c.Sampling(temperature=1.0)
        return Regenerate(
            data=str(world / "data"),
            target=str(world / "target"),
            out=str(tmp_path / out),
            prompt_length=8,
            max_new_tokens=6,
            batch_size=4,
            sampling=sampling,
        )

    regenerate(config("whole"), QUIET)
    save, saved = dialogues.save, []

    def interrupted(path, talks):
        if len(saved) == 2:
            raise KeyboardInterrupt
        saved.append(path.name)
        save(path, talks)

    monkeypatch.setattr(dialogues, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        regenerate(config("parts"), QUIET)
    assert not (tmp_path / "parts").exists()
    monkeypatch.setattr(dialogues, "save", lambda path, talks: (saved.append(path.name), save(path, talks)))
    regenerate(config("parts"), QUIET)
    assert len(saved) == len(set(saved)) > 3  # nothing was generated twice
    assert not (tmp_path / "parts.parts").exists()
    one, other = open_dataset(tmp_path / "whole"), open_dataset(tmp_path / "parts")
    assert len(one) == len(other)
    for i in range(len(one)):
        assert all(np.array_equal(one[i][name], other[i][name]) for name in one[i])
