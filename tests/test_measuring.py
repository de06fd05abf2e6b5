"""Every script of launch/measure runs, at sizes of no meaning, and says what it should.

They share what `bench_decode.sh --short` leaves: a dataset, a target, a Domino drafter and prompts, in a copy of the
tree, so that nothing lands in this one.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from scripts import MEASURE, load, record_case, run

from specauf_jax import cli

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(MEASURE.glob("*.py"))


def process(*command, tree: Path, **environment) -> str:
    """What a command prints that runs in a tree, with that tree's package."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(tree)} | environment
    done = subprocess.run(list(map(str, command)), cwd=tree, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def parsed(command: list[str]):
    """The settings that a command line of specauf stands for; it must exist and be complete."""
    return cli._parse(cli.COMMANDS[command[0]][0], command[0], list(map(str, command[1:])))


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of the tree that has its environment already: this one."""
    tree = tmp_path_factory.mktemp("measuring") / "tree"
    for name in ("specauf_jax", "configs", "launch"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tree)
    (tree / ".venv").mkdir()
    (tree / ".venv/bin").symlink_to(Path(sys.executable).parent)
    pins = "cat requirements.txt pyproject.toml | cksum > .venv/installed"
    subprocess.run(["bash", "-c", pins], cwd=tree, check=True)
    return tree


@pytest.fixture(scope="module")
def world(tree) -> Path:
    """Data, target and drafter."""
    process("bash", "launch/measure/bench_decode.sh", "--short", tree=tree)
    return tree / "runs/bench_decode_short"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_help(script, capsys):
    assert run(script.name, "--help") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"launch/measure/{script.name}" in said  # its own command


def test_help_of_the_shell_scripts():
    for script in MEASURE.glob("*.sh"):
        done = subprocess.run(["bash", script, "--help"], capture_output=True, text=True, check=True)
        assert f"launch/measure/{script.name}" in done.stdout


# ---------------------------------------------------------------------------------------------
# Decoding


def test_bench_decode(world):
    decoding = json.loads((world / "speed.json").read_text())["decoding"]
    assert decoding.keys() == {"2"} and decoding["2"].keys() == {"autoregressive", "prompt_lookup", "domino"}


def test_exactness(world, capsys):
    folders = ["--target", world / "target", "--drafter", world / "drafter_domino", "--data", world / "text"]
    assert run("exactness.py", *folders, "--prompts", 1, "--max-new-tokens", 9) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("1 prompts of") and lines[-1] == "exact"
    assert sum("0 of 1 differ" in line for line in lines) == 8


def test_exactness_sees_a_wrong_token(world, capsys, monkeypatch):
    from specauf_jax.decoding import generate as module

    def wrong(drafter_params, *arguments, generate=module.generate, **settings):
        found = generate(drafter_params, *arguments, **settings)
        if drafter_params is not None:
            found[0].tokens[-1] += 1
        return found

    monkeypatch.setattr(module, "generate", wrong)
    folders = ["--target", world / "target", "--drafter", world / "drafter_domino", "--data", world / "text"]
    assert run("exactness.py", *folders, "--prompts", 1, "--max-new-tokens", 9) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "8 DIFFERENT"


# ---------------------------------------------------------------------------------------------
# Training


def test_packing(world, tmp_path):
    sizes = ("--sequence-length", 128, "--batch-tokens", 128, "--width", 64, "--repeats", 1)
    assert run("bench_packing.py", "--data", world / "data", *sizes, "--out", tmp_path / "out.json") == 0
    layouts = json.loads((tmp_path / "out.json").read_text())["layouts"]
    assert layouts.keys() == {"packed", "bucketed", "single"}
    assert layouts["packed"]["filled"] >= layouts["bucketed"]["filled"] >= layouts["single"]["filled"] > 0


def test_study(world, tmp_path, capsys):
    """A combination is trained and evaluated once, then only read."""
    line = ["--target", world / "target", "--data", world / "data", "--out", tmp_path, "--objectives", "decay",
            "--seeds", 3, "--steps", 2]  # fmt: skip
    assert run("study.py", *line) == run("study.py", *line) == 0
    said = capsys.readouterr().out.splitlines()
    assert [row.startswith("| 2 | decay | ") for row in said].count(True) == 2 and said[-1].endswith("| yes |")
    assert [path.name for path in tmp_path.iterdir()] == ["decay_2_3"]


@pytest.mark.parametrize("name", ["auf", "domino_baseline", "domino_b_auf", "domino_s_auf", "domino_f_auf"])
def test_objectives_of_the_study(name):
    study = load("study.py")
    settings = parsed(["train", "--target", "t", "--data", "d", "--out", "o", *study.objective(name)])
    base, final, witness = study.DOMINO.get(name, (None, name, "own"))
    assert (settings.objective.name, settings.objective.witness) == (final, witness)
    assert base in (None, settings.base_objective.name) and (settings.drafter.projector_type == "domino") == bool(base)


PACKAGE = """
import json, pathlib, sys
from specauf_jax import SPEED
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
out.mkdir()
(out.parent.parent / "asked.json").write_text(json.dumps(sys.argv[1:]))
lines = [{"tokens_per_s": 1}, {"tokens_per_s": SPEED}, {"tokens_per_s": SPEED}]
(out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
"""
"""A specauf whose training takes no time, and whose first line counts the compiling."""


def test_two_revisions(tmp_path, monkeypatch):
    """Of a repository whose second revision is three times as fast."""
    tree = tmp_path / "tree"
    (tree / "specauf_jax").mkdir(parents=True)
    (tree / "launch/measure").mkdir(parents=True)
    shutil.copy(MEASURE / "compare_revisions.py", tree / "launch/measure")
    (tree / "specauf_jax/__main__.py").write_text(PACKAGE)
    git = ["git", "-C", tree, "-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"]
    subprocess.run([*git, "init", "-q"], check=True)
    for speed in (100, 300):
        (tree / "specauf_jax/__init__.py").write_text(f"SPEED = {speed}\n")
        subprocess.run([*git, "add", "-A"], check=True)
        subprocess.run([*git, "commit", "-qm", str(speed)], check=True)
    script = tree / "launch/measure/compare_revisions.py"
    settings = ["--target", "t", "--data", "d"]
    said = process(sys.executable, script, "HEAD~1", "--repeats", 2, "--", *settings, tree=tree, TMPDIR=str(tmp_path))
    assert said.splitlines()[-1] == "before 100, now 300 tokens/s: 3.00 x"
    assert subprocess.check_output([*git, "worktree", "list"], text=True).count("\n") == 1
    assert parsed(json.loads((tmp_path / "asked.json").read_text())).train.log_every == 5


def test_lm_head(tmp_path):
    sizes = ("--blocks", 8, "--slots", 3, "--width", 16, "--vocabulary", 64, "--chunk", 8, "--repeats", 1)
    assert run("bench_lm_head.py", *sizes, "--active", 0.5, 1, "--out", tmp_path / "out.json") == 0
    seconds = json.loads((tmp_path / "out.json").read_text())["seconds"]
    assert {"recomputing all slots", "all slots", "up to first failures"} <= seconds["0.5"].keys()
    assert all(value > 0 for times in seconds.values() for value in times.values())


def test_attention(tmp_path):
    sizes = ("--S", 24, "--A", 5, "--K", 4, "--H", 2, "--G", 1, "--E", 8, "--documents", 2)
    assert run("bench_attention.py", *sizes, "--repeats", 1, "--out", tmp_path / "out.json") == 0
    forms = json.loads((tmp_path / "out.json").read_text())["forms"]
    assert forms.keys() == {"block_attention", "chunked", "dot_product_attention"}
    assert forms["dot_product_attention"]["of_dense"] == 1


@pytest.fixture(scope="module")
def cost_curves():
    return load("cost_curves.py")


def test_curves_are_ratios_to_their_base(cost_curves):
    """Of runs that cost nothing, with a model of their own."""
    asked = []

    def make(**sizes):
        asked.append(sizes)
        return lambda: np.zeros(1), sizes["A"] * sizes["K"] ** 2

    found = cost_curves.curves({"A": 4, "K": 2}, make, 1)
    assert len(asked) == 7  # 4 points a size, and the base once
    for letter, power in (("A", 1), ("K", 2)):
        points = found["curves"][letter]
        assert [p["model"] for p in points] == [p["factor"] ** power for p in points]
        assert points[1]["factor"] == points[1]["times"] == 1


def test_curves_run_a_whole_step(cost_curves):
    step, flops = cost_curves.train_step(128, B=1, S=16, A=2, K=4, V=64)
    state, metrics = step()
    assert int(state.step) == 1 and np.isfinite(metrics["loss"]) and flops > 0


def test_curves_run_the_same_round_again_and_again(cost_curves):
    again, flops = cost_curves.one_round(128, B=2, S=16, K=4, V=64)
    first, second = np.asarray(again()), np.asarray(again())
    np.testing.assert_array_equal(first, second)
    assert first[:, 16].any() and flops > 0


# ---------------------------------------------------------------------------------------------
# Memory


def test_host_memory(tmp_path, tree):
    sizes = ("--layers", 1, "--width", 256, "--vocabulary", 64, "--devices", 8, "--dtype", "float32")
    said = process(sys.executable, MEASURE / "host_memory.py", "--folder", tmp_path, *sizes, tree=tree)
    assert "8 device(s)" in said and "MiB of host memory beside them" in said
    stored = (tmp_path / "model-00001.safetensors").stat().st_size
    assert 2 * 10**6 < stored < 3 * 10**6  # 1.05 M numbers of bfloat16


def test_the_matrix_of_compilations(tmp_path):
    """With a `specauf compile` that writes its report at once; the second time nothing is compiled."""
    report = {
        "devices": 16,
        "hbm_bytes": 2**34,
        "fits": False,
        "rows": {"train": 64},
        "flops_per_step": 3e12,
        "meta": {"recipe": {"train": {"accumulation": 4}}},
        "collectives": {"all-gather": {"bytes": 2**31}},
    }
    program = {"argument_bytes": 2**30, "temporary_bytes": 2**31, "peak_bytes": 3 * 2**30,
               "seconds": {"at_40_percent": 1.5}}  # fmt: skip
    report |= {"train": program, "decode": program}
    package = f"""
import json, pathlib, sys
pathlib.Path(sys.argv[sys.argv.index("--out") + 1]).write_text({json.dumps(json.dumps(report))})
with open("asked", "a") as file: file.write(json.dumps(sys.argv[1:]) + "\\n")
sys.exit(1)
"""
    (tmp_path / "specauf_jax").mkdir()
    (tmp_path / "specauf_jax/__main__.py").write_text(package)
    line = [sys.executable, MEASURE / "compile_matrix.py", "--recipes", ROOT / "configs/tiny_cpu.py",
            "--topologies", "v5e:4x4", "--out", tmp_path / "out"]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    for _ in range(2):
        done = subprocess.run(line, env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 1  # something does not fit
        last = "| tiny_cpu | v5e:4x4 | 16 | 16 × 4 | 16.00 | 1.00 + 2.00 = **3.00** | 1.00 + 2.00 = **3.00** | no |"
        assert done.stdout.splitlines()[-1] == f"{last} 2 | 3 | 1.50 |"
    [asked] = (tmp_path / "asked").read_text().splitlines()
    settings = parsed(json.loads(asked))
    assert (settings.topology, settings.batch_size, settings.accumulation) == ("v5e:4x4", 64, 4)


# ---------------------------------------------------------------------------------------------
# The same numbers as before


@pytest.fixture
def golden():
    before = jax.config.jax_default_matmul_precision
    yield load("golden.py")
    jax.config.update("jax_default_matmul_precision", before)


def test_golden_sees_one_changed_number(golden, tmp_path, capsys):
    """Of a case with a target alone; tests/interop has one with drafters."""
    count = record_case(golden, tmp_path / "case", ())
    with np.load(tmp_path / "case/golden.npz") as arrays:
        arrays = dict(arrays)
    arrays["target_logits"][0, 0, 0] += 1e-3
    np.savez(tmp_path / "case/golden.npz", **arrays, forgotten=np.zeros(1))
    capsys.readouterr()
    assert run("golden.py", tmp_path) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"{count - 1} passed, 2 failed"
    assert [line.split()[2] for line in lines if "FAIL" in line] == ["target_logits:", "forgotten:"]


def test_golden_without_a_case(tmp_path):
    assert run("golden.py", tmp_path) == 2


# ---------------------------------------------------------------------------------------------
# A machine with a GPU


def test_device(tmp_path):
    """All four parts, on a CPU."""
    device = ["bash", MEASURE / "device.sh", "--toy", "--seconds", "900", "--out", tmp_path]
    done = subprocess.run(device, env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert list(summary) == ["attention", "lm_head", "train", "decode"]
    assert all(outcome.startswith("measured in ") for outcome in summary.values())
    read = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in summary}
    assert read["train"]["training"].keys() == {"auf", "decay"}
    assert read["decode"]["batch_sizes"]["1"]["different"] == 0


FAILING = """
case "$*" in
  *import_module*lm_head*) echo "ModuleNotFoundError: No module named 'grain'" >&2; exit 1 ;;
  *bench_attention*) sleep 60 ;;
  *benchmark-train*) exit 3 ;;
  *summary.json*) exec "$REAL" "$@" ;;
esac
"""
"""A Python where the first part takes too long, the second lacks a module, the third fails."""


def test_device_tells_what_did_not_end_well(tmp_path):
    (tmp_path / "python").write_text(f"#!/bin/bash\n{FAILING}")
    (tmp_path / "python").chmod(0o755)
    environment = os.environ | {"PYTHON": str(tmp_path / "python"), "REAL": sys.executable}
    device = ["bash", MEASURE / "device.sh", "--toy", "--seconds", "20", "--out", tmp_path / "out"]
    done = subprocess.run(device, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert list(json.loads((tmp_path / "out/summary.json").read_text()).values()) == [
        "stopped after its 2 s", "skipped: ModuleNotFoundError: No module named 'grain'", "failed with exit code 3",
        "measured in 0 s"]  # fmt: skip


@pytest.mark.parametrize("bad", [["--sceonds", "9"], ["--out"], [], ["--out", "x", "--seconds", "0"]])
def test_device_refuses(bad, tmp_path):
    done = subprocess.run(["bash", MEASURE / "device.sh", *bad], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "found" in done.stderr and "expected" in done.stderr
    assert not list(tmp_path.iterdir())
