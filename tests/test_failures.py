"""How commands end: codes, one failure for all processes, signals, disks, terminals."""

import os
import socket
import subprocess
import sys
import time

import pytest

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
