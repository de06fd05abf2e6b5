"""The scripts that the README's figures come from, at sizes of no meaning: they run, and compare what they say."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

LAUNCH = Path(__file__).resolve().parents[1] / "launch/measure"


def run(tmp_path, script, *arguments) -> dict:
    command = [sys.executable, LAUNCH / script, *arguments, "--out", tmp_path / "out.json"]
    done = subprocess.run(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((tmp_path / "out.json").read_text())


def test_lm_head(tmp_path):
    sizes = ("--blocks", "8", "--slots", "3", "--width", "16", "--vocabulary", "64", "--chunk", "8", "--repeats", "1")
    seconds = run(tmp_path, "bench_lm_head.py", *sizes, "--active", "0.5", "1")["seconds"]
    assert {"recomputing all slots", "all slots", "up to first failures"} <= seconds["0.5"].keys()
    assert all(value > 0 for times in seconds.values() for value in times.values())


def test_attention(tmp_path):
    sizes = ("--S", "24", "--A", "5", "--K", "4", "--H", "2", "--G", "1", "--E", "8", "--documents", "2")
    forms = run(tmp_path, "bench_attention.py", *sizes, "--repeats", "1")["forms"]
    assert forms.keys() == {"block_attention", "chunked", "dot_product_attention"}
    assert forms["dot_product_attention"]["of_dense"] == 1


@pytest.fixture(scope="module")
def cost_curves():
    spec = importlib.util.spec_from_file_location("cost_curves", LAUNCH / "cost_curves.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
