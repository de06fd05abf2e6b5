"""Every script of launch/measure runs, at sizes of no meaning, and says what it should.

Scripts that call `specauf` call one here that takes no time; what they ask of it must be what the real one knows.
"""

import json
import os
import re
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
def world(tmp_path_factory) -> Path:
    """text, target and drafter, made by the commands themselves."""
    world = tmp_path_factory.mktemp("measuring")
    small = ["--target.hidden-size", 32, "--target.intermediate-size", 48, "--target.num-hidden-layers", 1,
             "--target.num-attention-heads", 2, "--target.num-key-value-heads", 1, "--target.head-dim", 16]  # fmt: skip
    steps = ["--train.steps", 2, "--train.batch-size", 2]
    text = ["--corpus-bytes", 60_000, "--vocab-size", 300, "--sequence-length", 64, "--heldout-prompts", 2]
    folders = ["--target", world / "pretrain/target", "--data", world / "text", "--out", world / "train"]
    for line in (
        ["prepare", "--corpus", "stdlib", *text, "--prompt-length", 8, "--out", world / "text"],
        ["pretrain", "--data", world / "text", "--out", world / "pretrain", *steps, *small],
        [
            "train",
            *folders,
            *steps,
            "--drafter.block-size",
            4,
            "--drafter.num-hidden-layers",
            1,
            "--train.num-anchors",
            4,
        ],
    ):
        assert cli.main(list(map(str, line))) == 0
    return world


def folders(world: Path) -> list:
    """What exactness.py needs."""
    return ["--target", world / "pretrain/target", "--drafter", world / "train/drafter", "--data", world / "text"]


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


COMMANDS = """
import json, pathlib, sys
with open("asked", "a") as file: file.write(json.dumps(sys.argv[1:]) + "\\n")
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
if sys.argv[1] in ("prepare", "regenerate"):
    (out / "prompts").mkdir(parents=True)
    (out / "manifest.json").touch()
    for name in ("asyncio", "json", "email", "docstrings"):
        (out / f"prompts/{name}.jsonl").write_text("".join(f"{name} {i}\\n" for i in range(9)))
if sys.argv[1] == "pretrain":
    (out / "target").mkdir(parents=True)
    (out / "target/config.json").touch()
"""
"""A specauf that leaves the files which the script looks for."""


def test_bench_decode(tmp_path):
    """Its commands follow each other, exist, and are not repeated when it goes on."""
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    for name in ("requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / "specauf.py").write_text(COMMANDS)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/specauf").write_text(f'#!/bin/bash\nexec {sys.executable} specauf.py "$@"\n')
    (tmp_path / ".venv/bin/specauf").chmod(0o755)
    pins = "cat requirements.txt pyproject.toml | cksum > .venv/installed"  # as if it were set up
    subprocess.run(["bash", "-c", pins], cwd=tmp_path, check=True)
    for _ in range(2):
        process("bash", "launch/measure/bench_decode.sh", "--short", tree=tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "asked").read_text().splitlines()]
    names = ["prepare", "pretrain", "regenerate", "train", "export", "benchmark"]
    assert [line[0] for line in lines] == names + names[3:]
    train, benchmark = parsed(lines[3]), parsed(lines[5])
    assert [parsed(line) for line in lines][3:6] == [parsed(line) for line in lines][6:]
    assert (train.base_objective.name, train.objective.name) == ("auf_decay", "decay")
    prompts = (tmp_path / benchmark.prompts).read_text().splitlines()
    assert len(prompts) == 16 and prompts[3:5] == ["asyncio 3", "json 0"]


@pytest.mark.long
def test_exactness(world, capsys):
    assert run("exactness.py", *folders(world), "--prompts", 1, "--max-new-tokens", 9) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("1 prompts of") and lines[-1] == "exact"
    assert sum(line.endswith("stopped early, exact") for line in lines) == 16


def test_exactness_sees_a_wrong_token(world, capsys, monkeypatch):
    from specauf_jax.decoding import generate as module

    def wrong(drafter_params, *arguments, generate=module.generate, **settings):
        found = generate(drafter_params, *arguments, **settings)
        if drafter_params is not None:
            found[0].tokens[-1] += 1
        return found

    monkeypatch.setattr(module, "generate", wrong)
    settings = ("--prompts", 1, "--max-new-tokens", 9, "--tree-nodes", 0)
    assert run("exactness.py", *folders(world), *settings) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "8 DIFFERENT"


def test_generation(world, tmp_path):
    """Of this tree against itself."""
    prompts = "".join(json.dumps({"prompt": "import json\n" * n}) + "\n" for n in (1, 3, 2))
    (tmp_path / "prompts.jsonl").write_text(prompts)
    line = [sys.executable, MEASURE / "bench_generation.py", ROOT, "--target", world / "pretrain/target", "--prompts",
            tmp_path / "prompts.jsonl", "--mixed", "--max-new-tokens", 14, "--batch-size", 2, "--repeats", 1,
            "--out", tmp_path / "out.json"]  # fmt: skip
    said = process(*line, tree=ROOT).splitlines()
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["same"] and found["trees"].keys() == {"before", "now"}
    before, now = found["trees"].values()
    assert found["ratio"] == pytest.approx(now["tokens_per_s"] / before["tokens_per_s"])
    assert 0 < now["tokens"] == before["tokens"] <= 3 * 14
    assert now["compilations"] > 0 == now["later_compilations"]
    assert said[0].startswith("before: ") and said[-1].endswith(" x; tokens agree")


# ---------------------------------------------------------------------------------------------
# Training


def test_packing(world, tmp_path):
    sizes = ("--sequence-length", 128, "--batch-tokens", 128, "--width", 64, "--repeats", 1)
    assert run("bench_packing.py", "--data", world / "text", *sizes, "--out", tmp_path / "out.json") == 0
    layouts = json.loads((tmp_path / "out.json").read_text())["layouts"]
    assert layouts.keys() == {"packed", "bucketed", "single"}
    assert layouts["packed"]["filled"] >= layouts["bucketed"]["filled"] >= layouts["single"]["filled"] > 0


SPECAUF = """
import json, pathlib, sys
with open("asked", "a") as file: file.write(json.dumps(sys.argv[1:]) + "\\n")
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
if sys.argv[1] == "train":
    out.mkdir()
else:
    tau = {"decay": 2, "decay_then_auf": 3, "domino_b_auf_d": 5}[out.parent.name.rsplit("_", 2)[0]]
    tau += int(out.parent.name[-1])
    one = {"tau_micro": tau, "tau_outside_loops": tau - 1, "exact": tau != 4}
    out.write_text(json.dumps({"overall": one, "sets": {"json": one}}))
"""
"""A specauf whose training takes no time, and whose tau follows from the objective and the seed."""


def test_study(tmp_path):
    """Every combination is trained and evaluated once, in its order; then only the table is printed again."""
    (tmp_path / "specauf_jax").mkdir()
    (tmp_path / "specauf_jax/__main__.py").write_text(SPECAUF)
    (tmp_path / "data/prompts").mkdir(parents=True)
    (tmp_path / "data/prompts/json.jsonl").touch()
    line = [sys.executable, MEASURE / "study.py", "--target", "t", "--data", "data", "--out", "out", "--steps", 20,
            "--objectives", "decay>auf", "decay", "domino_b_auf_d", "--seeds", 0, 2, "--workers", 1]  # fmt: skip
    for _ in range(2):
        said = process(*line, tree=tmp_path)
        assert said.splitlines()[-5:] == [
            "| steps | objective | mean | json | outside loops | gain | all exact |",
            "|---|---|---|---|---|---|---|",
            "| 20 | decay>auf | 4.000 ± 1.414 | 4.000 ± 1.414 | 3.000 ± 1.414 | +0.0 % | yes |",
            "| 20 | decay | 3.000 ± 1.414 | 3.000 ± 1.414 | 2.000 ± 1.414 | -25.0 % | NO |",
            "| 20 | domino_b_auf_d | 6.000 ± 1.414 | 6.000 ± 1.414 | 5.000 ± 1.414 | +50.0 % | yes |",
        ]
    asked = [parsed(json.loads(line)) for line in (tmp_path / "asked").read_text().splitlines()]
    trained, evaluated = asked[::2], asked[1::2]
    assert len(trained) == 6 and [e.drafter for e in evaluated] == [f"{t.out}/drafter" for t in trained]
    assert [t.init_from for t in trained] == [None] * 4 + [f"out/decay_20_{seed}/drafter" for seed in (0, 2)]
    assert [t.train.steps for t in trained] == [20] * 4 + [2] * 2
    assert trained[4].train.learning_rate == 1e-3 and trained[-1].objective.name == "auf"
    domino = trained[1]
    assert (domino.base_objective.name, domino.objective.name) == ("auf_decay", "decay")
    assert domino.drafter.projector_type == "domino" and domino.train.seed == 0


@pytest.mark.parametrize("name", ["domino_baseline", "domino_b_auf", "domino_s_auf", "domino_f_auf"])
def test_objectives_of_the_study(name):
    study = load("study.py")
    settings = parsed(["train", "--target", "t", "--data", "d", "--out", "o", *study.objective(name)])
    branches = settings.base_objective.name, settings.objective.name, settings.objective.witness
    assert branches == study.DOMINO[name]


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


def test_host_memory(tmp_path):
    sizes = ("--layers", 1, "--width", 256, "--vocabulary", 64, "--devices", 8, "--dtype", "float32")
    said = process(sys.executable, MEASURE / "host_memory.py", "--folder", tmp_path, *sizes, tree=ROOT)
    assert "8 device(s)" in said and "MiB of host memory beside them" in said
    stored = (tmp_path / "model-00001.safetensors").stat().st_size
    assert 1_600_000 < stored < 1_700_000  # 0.82 M numbers of bfloat16


def test_the_matrix_of_compilations(tmp_path):
    """With a `specauf compile` that writes its report at once; the second time nothing is compiled."""
    report = {
        "devices": 16,
        "hbm_bytes": 2**34,
        "fits": False,
        "rows": {"train": 64},
        "meta": {"recipe": {"train": {"accumulation": 4}}},
    }
    program = {"flops": 3e12, "collectives": {"all-gather": {"bytes": 2**31}}, "argument_bytes": 2**30,
               "temporary_bytes": 2**31, "peak_bytes": 3 * 2**30, "seconds": {"at_40_percent": 1.5},
               "time": {"compiler": {"target": [1, 1], "blocks": [2, 2], "lm_head": [0.5, 3]}, "total": [3.5, 7],
                        "collectives": [0, 1], "utilisation": [0.301, 0.629]}}  # fmt: skip
    report |= {"train": program, "decode": program}
    timed = report | {"train": program, "decode": None}
    without_room = report | {"train": program | {"time": None}}
    reports = {"v5e:4x4": report, "tpu7x:2x2x4": timed, "v5p:4x4x8": timed, "v6e:4x4": without_room}
    package = f"""
import json, pathlib, sys
report = json.loads({json.dumps(json.dumps(reports))})[sys.argv[sys.argv.index("--topology") + 1]]
pathlib.Path(sys.argv[sys.argv.index("--out") + 1]).write_text(json.dumps(report))
with open("asked", "a") as file: file.write(json.dumps(sys.argv[1:]) + "\\n")
sys.exit(1)
"""
    (tmp_path / "specauf_jax").mkdir()
    (tmp_path / "specauf_jax/__main__.py").write_text(package)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}

    def last_line(out: str, topology: str, *more: str) -> str:
        line = [sys.executable, MEASURE / "compile_matrix.py", "--recipes", ROOT / "configs/tiny_cpu.py",
                "--topologies", topology, "--out", tmp_path / out, *more]  # fmt: skip
        done = subprocess.run(line, env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 1 and done.stdout, done.stderr  # something does not fit
        return done.stdout.splitlines()[-1]

    for _ in range(2):
        expected = "| 16 × 4 | 16.00 | 1.00 + 2.00 = **3.00** | 1.00 + 2.00 = **3.00** | no | 2 | 3 | 1.50 |"
        assert last_line("out", "v5e:4x4") == f"| tiny_cpu | v5e:4x4 | 16 {expected}"
    expected = "| 16 × 4 | 16.00 | 3.00 | 1.00 | 2.00 | 3.00 | 0.00 to 1.00 | 3.50 to 7.00 | 30 to 63 % |"
    for topology in ("v5e:4x4", "tpu7x:2x2x4", "v5p:4x4x8"):
        assert last_line("out", topology, "--time") == f"| tiny_cpu | {topology} | 16 {expected}"
    assert last_line("out", "v6e:4x4", "--time") == f"| tiny_cpu | v6e:4x4 | 16 | 16 × 4 | 16.00 | 3.00 |{' – |' * 6}"
    asked = [parsed(json.loads(line)) for line in (tmp_path / "asked").read_text().splitlines()]
    found = [(x.topology, x.batch_size, x.accumulation, x.only, x.code) for x in asked]
    assert found == [("v5e:4x4", 64, None, None, False), ("v5e:4x4", 64, None, "train", True),
                     ("tpu7x:2x2x4", 64, 1, "train", True), ("v5p:4x4x8", 128, 1, "train", True),
                     ("v6e:4x4", 64, 1, "train", True)]  # fmt: skip


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


def test_round(tmp_path, capsys):
    out = tmp_path / "round.json"
    small = ["--width", 128, "--target-layers", 2, "--drafter-layers", 1, "--vocabulary", 64, "--block-size", 4]
    assert run("bench_round.py", *small, "--batch-sizes", 2, "--prompt-length", 5, "--new-tokens", 4, "--repeats", 1,
               "--out", out) == 0  # fmt: skip
    found = json.loads(out.read_text())["batch_sizes"]["2"]
    assert found["exact"] is True and found["compared"] == 2 and found["drafter"]["ms_per_round"] > 0
    assert "batch   2: a step" in capsys.readouterr().out


@pytest.mark.long
def test_device(tmp_path):
    """All four parts, on a CPU."""
    device = ["bash", MEASURE / "device.sh", "--toy", "--seconds", "900", "--out", tmp_path]
    done = subprocess.run(device, env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert list(summary) == ["attention", "lm_head", "train", "decode"]
    assert all(outcome.startswith("measured in ") for outcome in summary.values())
    read = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in summary}
    forms = {"recomputing all slots, ce", "all slots, ce", "up to first failures, ce"}
    assert forms <= read["lm_head"]["seconds"]["0.5"].keys()
    assert read["attention"]["forms"].keys() == {"block_attention", "chunked", "dot_product_attention"}
    assert read["train"]["training"].keys() == {"auf", "decay"}
    assert read["decode"]["batch_sizes"]["1"]["exact"] is True


FAILING = """
case "$*" in
  *bench_lm_head*) echo "ModuleNotFoundError: No module named 'grain'" >&2; exit 1 ;;
  *bench_attention*) sleep 60 ;;
  *benchmark-train*) exit 3 ;;
  *summary.json*) exec "$REAL" "$@" ;;
  *real_target.py*--seconds*) echo "asked: $*" ;;
esac
"""
"""A Python where the first part takes too long, the second lacks a module, the third fails."""


def test_device_tells_what_did_not_end_well(tmp_path):
    (tmp_path / "python").write_text(f"#!/bin/bash\n{FAILING}")
    (tmp_path / "python").chmod(0o755)
    environment = os.environ | {"PYTHON": str(tmp_path / "python"), "REAL": sys.executable}
    device = ["bash", MEASURE / "device.sh", "--toy", "--seconds", "30", "--out", tmp_path / "out"]
    study = ["--", "--target", "t", "--data", "d", "--arms", "auf", "--benchmarks", tmp_path / "none"]
    done = subprocess.run([*device, *study], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    outcomes = json.loads((tmp_path / "out/summary.json").read_text())
    assert list(outcomes) == ["attention", "lm_head", "train", "decode", "study"]
    outcomes = list(outcomes.values())
    assert re.fullmatch(r"stopped after its [12] s", outcomes[0])
    assert outcomes[1:3] == ["skipped: ModuleNotFoundError: No module named 'grain'", "failed with exit code 3"]
    assert all(re.fullmatch(r"measured in \d s", outcome) for outcome in outcomes[3:])
    [asked] = re.findall(r"asked: launch/measure/real_target.py (.*) --seconds (\d+)", done.stdout)
    assert asked[0] == f"--out {tmp_path}/out/study --dtype float32 --arms auf --target t --data d"
    assert int(asked[1]) <= 10  # 20 s before the end


@pytest.mark.parametrize("bad", [["--sceonds", "9"], ["--out"], [], ["--out", "x", "--seconds", "0"]])
def test_device_refuses(bad, tmp_path):
    done = subprocess.run(["bash", MEASURE / "device.sh", *bad], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "found" in done.stderr and "expected" in done.stderr
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------
# Plans through mazes


def test_mazes_have_one_path_and_plans_follow_it():
    script = load("prefix_task.py")
    mazes = script.Mazes(5, 4, 0)
    assert (mazes.open.sum((1, 2)) == 2 * 15).all()  # 16 cells, and no loop
    for maze in range(5):
        for cell in range(16):
            moves, valid = (x[0] for x in mazes.plans(np.array([maze]), np.array([cell]), 16))
            place, length = cell, int(valid.sum())
            for move in moves[:length]:
                assert mazes.open[maze, place, move]
                place += int(script.STEPS[move] @ [4, 1])
            assert place == mazes.goal[maze] and valid[:length].all() and (length == 0) == (cell == place)
    assert len(np.unique(mazes.open.reshape(5, -1), axis=0)) == 5


@pytest.mark.parametrize("wrong,per_plan", [(None, 4.0), (0, 1.0), (2, 3.0)])
def test_moves_of_plans_whose_first_wrong_move_is_known(wrong, per_plan):
    """The supervisor's move counts; only an episode's last plan may be shorter."""
    script = load("prefix_task.py")
    mazes = script.Mazes(20, 5, 1)
    maze, places = np.arange(20), []

    def planner(maps):
        cell = maps[..., 5].reshape(20, -1).argmax(-1)
        places.append(cell)
        moves, _ = mazes.plans(maze, cell, 4)
        if wrong is not None:
            moves[:, wrong] = (moves[:, wrong] + 1) % 4
        return moves

    found = script.episodes(planner, mazes, 4)
    first = np.where(mazes.goal == 0, 24, 0)
    lengths = np.array([mazes.plans(np.array([i]), first[i : i + 1], 25)[1].sum() for i in maze])
    np.testing.assert_allclose(found["plans"], np.ceil(lengths / per_plan).mean())
    np.testing.assert_allclose(found["moves_per_plan"], lengths.sum() / np.ceil(lengths / per_plan).sum())
    assert (found["accuracy"] == 1) == (wrong is None)


def test_prefix_task(tmp_path, capsys):
    small = ["--steps", 3, "--batch-size", 8, "--mazes", 20, "--held-out", 5, "--size", 3, "--moves", 3, "--layers", 1,
             "--channels", 4, "--seeds", 2]  # fmt: skip
    assert run("prefix_task.py", *small, "--objectives", "full", "auf", "--out", tmp_path / "out.json") == 0
    found = json.loads((tmp_path / "out.json").read_text())["found"]
    assert [len(found[name]) for name in ("full", "auf")] == [2, 2] and found["full"] != found["auf"]
    assert "| auf |" in capsys.readouterr().out
