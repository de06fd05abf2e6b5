"""The core of training and decoding once more, compiled as users compile it: without the flags of conftest."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CORE = (
    "test_decoding.py::test_every_row_stops_at_its_own_end_of_sequence",
    "test_decoding.py::test_sampled_speculation_follows_the_targets_law",
    "test_step.py::test_a_step_is_the_gradient_of_the_loss_through_the_optimizer",
)


@pytest.mark.long
def test_core_with_the_flags_of_users():
    line = [sys.executable, "-m", "pytest", "-p", "no:xdist", "-p", "no:cacheprovider", *CORE]
    done = subprocess.run(
        line, cwd=Path(__file__).parent, env=os.environ | {"XLA_FLAGS": ""}, capture_output=True, text=True
    )
    assert done.returncode == 0 and "skipped" not in done.stdout, done.stdout + done.stderr
