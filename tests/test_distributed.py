"""Several processes as one program: the same curve, the same files, an agreed end."""

import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from jax.sharding import AbstractMesh
from rich.console import Console
from safetensors.numpy import load_file
from test_synthesize import save_writer

from specauf_jax import config as c
from specauf_jax.cli import main
from specauf_jax.commands.generate import generate
from specauf_jax.commands.generate_settings import Generate
from specauf_jax.commands.prepare import prepare
from specauf_jax.commands.prepare_settings import Prepare
from specauf_jax.data.dataset import open_dataset
from specauf_jax.data.loader import make_loader
from specauf_jax.data.tokenizer import copy_tokenizer
from specauf_jax.distributed import Watch, everywhere, from_primary, to_host
from specauf_jax.errors import SpecaufError
from specauf_jax.models.weights import save_drafter, save_target
from specauf_jax.sharding import batch_sharding, make_mesh

LAUNCH = Path(__file__).parents[1] / "launch"
AXES = ("replica", "fsdp", "tensor")
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("hosts")
    lines = [f"line {i}: the quick brown fox jumps over {i * i} lazy dogs\n" for i in range(300)]
    (root / "text.txt").write_text("".join(lines))
    prepare(Prepare(input=(str(root / "text.txt"),), out=str(root / "data"), vocab_size=300, sequence_length=64), QUIET)
    target = tiny.target_config(vocab_size=300)
    save_target(tiny.target_params(target), target, root / "target")
    drafter = tiny.drafter_config(target, mask_token_id=3, target_layer_ids=(1,))
    save_drafter(tiny.drafter_params(drafter), drafter, root / "drafter")
    copy_tokenizer(root / "data/tokenizer", root / "target")
    prompts = [{"prompt": line} for line in lines[:5]]
    (root / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    return root


def command(world, out, **changes) -> list[str]:
    settings = {
        "steps": 16,
        "batch-size": 8,
        "num-anchors": 8,
        "learning-rate": 1e-2,
        "log-every": 1,
        "checkpoint-every": 10,
    }
    settings = {name.replace("_", "-"): value for name, value in (settings | changes).items()}
    flags = [part for name, value in settings.items() for part in (f"--train.{name}", str(value))]
    return ["train", "--target", str(world / "target"), "--data", str(world / "data"), "--out", str(out),
            "--drafter.block-size", "4", "--drafter.num-hidden-layers", "1", "--drafter.target-layer-ids", "1",
            *flags]  # fmt: skip


def simulate(hosts: int, devices: int, arguments: list[str], **options) -> subprocess.CompletedProcess:
    line = [sys.executable, str(LAUNCH / "simulate_hosts.py"), "-n", str(hosts), "--devices-per-host", str(devices)]
    return subprocess.run([*line, "--", *arguments], capture_output=True, text=True, timeout=400, **options)


def losses(run: Path) -> np.ndarray:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 17))
    return np.array([line["loss"] for line in lines])


@pytest.fixture(scope="module")
def one_device(world):
    """The run that all others are compared with: one process, this one, with one device."""
    assert main(command(world, world / "one")) == 0
    return world / "one"


def compare(run: Path, one_device: Path, said: str) -> None:
    """The curve and the drafter of `run` are those of one device, and only the first of its processes spoke."""
    np.testing.assert_allclose(losses(run), losses(one_device), rtol=1e-5)
    one, other = (load_file(each / "drafter/model.safetensors") for each in (one_device, run))
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_allclose(other[name], one[name], atol=2e-3)  # Adam turns a rounding near 0 into a step
    assert {line[:3] for line in said.splitlines() if "peer ranks" not in line} == {"[0]"}
    assert said.count("drafter written") == 1


@pytest.mark.long
def test_four_processes_train_as_one_does(world, one_device):
    out = world / "four"
    done = simulate(4, 1, command(world, out) + ["--mesh.fsdp", "2", "--mesh.tensor", "2"])
    assert done.returncode == 0, done.stdout
    compare(out, one_device, done.stdout)


@pytest.mark.parametrize(
    "hosts,devices,accumulation,mesh", [(1, 8, 1, []), (2, 2, 2, ["--mesh.fsdp", "1", "--mesh.tensor", "4"])]
)
@pytest.mark.long
def test_a_run_goes_on_with_other_processes_and_mesh(hosts, devices, accumulation, mesh, world, one_device):
    out = world / f"continued{hosts}{devices}"
    shutil.copytree(one_device, out)
    shutil.rmtree(out / "checkpoints/16")
    shutil.rmtree(out / "drafter")
    done = simulate(hosts, devices, command(world, out, accumulation=accumulation) + mesh)
    assert done.returncode == 0 and "at step 10 of 16" in done.stdout, done.stdout
    compare(out, one_device, done.stdout)


@pytest.mark.long
def test_killed_and_terminated_processes_end_with_the_same_bits(world, tmp_path):
    line = [sys.executable, str(LAUNCH / "measure/kill_and_resume.py"), "--target", str(world / "target"),
            "--data", str(world / "data"), "--out", str(tmp_path / "kill"), "--hosts", "2", "--kills", "3",
            "--steps", "60", "--checkpoint-every", "4", "--",
            *("--drafter.block-size", "4", "--drafter.target-layer-ids", "1", "--train.num-anchors", "8")]  # fmt: skip
    done = subprocess.run(line, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "after 3 ends in time: bit-identical; 0 wrong" in done.stdout
    assert all(kind in done.stdout for kind in ("1: kill one;", "2: terminate all;", "3: kill in a write;"))


ON_HOSTS = """
import json, sys
from specauf_jax.cli import main
from specauf_jax.config import Hosts
from specauf_jax.distributed import joined
with joined(Hosts(coordinator=sys.argv[1], count=2, index=int(sys.argv[2]))):
    for command in json.loads(sys.argv[3]):
        assert main(command) == 0
"""


@pytest.mark.long
def test_commands_that_decode_give_on_two_hosts_what_they_give_on_one(world):
    save_writer(world / "writer/target")

    def commands(name):
        out, prompts = world / name, str(world / "prompts.jsonl")
        models = ["--target", str(world / "target"), "--drafter", str(world / "drafter"), "--batch-size", "4",
                  "--max-new-tokens", "12"]  # fmt: skip
        return [
            ["generate", *models, "--prompts", prompts, "--out", f"{out}.jsonl", "--temperature", "0.7"],
            ["evaluate", *models, "--prompts", f"a={prompts}", "--out", f"{out}.json", "--repeats", "1"],
            ["regenerate", "--data", str(world / "data"), "--target", str(world / "target"), "--out", f"{out}.data",
             "--documents", "9", "--prompt-length", "8", "--max-new-tokens", "6", "--batch-size", "4",
             "--drafter", str(world / "drafter")],
            ["synthesize", "--target", str(world / "writer/target"), "--out", f"{out}.written", "--conversations", "5",
             "--heldout-prompts", "1", "--max-user-tokens", "12", "--max-new-tokens", "6", "--batch-size", "4",
             "--sequence-length", "64"],
        ]  # fmt: skip

    def outputs(name):
        results = json.loads((world / f"{name}.json").read_text())["overall"]
        rows = open_dataset(world / f"{name}.data")
        return (
            (world / f"{name}.jsonl").read_text(),
            {name: results[name] for name in ("tau_micro", "tau_macro", "exact", "compared")},
            [rows[i]["tokens"].tolist() for i in range(len(rows))],
            (world / f"{name}.written/conversations.jsonl").read_text(),
        )

    assert all(main(command) == 0 for command in commands("one_host"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{probe.getsockname()[1]}"
    # One process a host runs all three commands: a process costs more than a command.
    lines = [[sys.executable, "-c", ON_HOSTS, coordinator, str(i), json.dumps(commands("two_hosts"))] for i in range(2)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
    hosts = [subprocess.Popen(line, env=environment, stderr=subprocess.PIPE, text=True) for line in lines]
    said = [host.communicate(timeout=400)[1] for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], said
    assert outputs("one_host") == outputs("two_hosts")


def test_every_example_once_an_epoch_for_any_hosts_and_restarts(world):
    """Two epochs read by 1, 2 and 4 processes, with a restart and another number of them in between."""
    count, B = len(open_dataset(world / "data")), 8
    whole = make_loader(world / "data", B, 0)
    expected = [next(whole)["tokens"] for _ in range(2 * count // B)]
    state, seen = None, []
    for hosts, batches in ((1, 3), (2, 5), (4, 4), (2, 7), (1, None)):
        loaders = [make_loader(world / "data", B, 0, rows=rows) for rows in np.split(np.arange(B), hosts)]
        for loader in loaders:
            if state is not None:
                loader.set_state(state)
        for _ in range(2 * count // B - len(seen) if batches is None else batches):
            seen.append(np.concatenate([next(loader)["tokens"] for loader in loaders]))
        states = [loader.get_state() for loader in loaders]
        assert all(other == states[0] for other in states)  # whichever process writes the checkpoint
        state = json.loads(json.dumps(states[0]))
    np.testing.assert_array_equal(seen, expected)
    rows = open_dataset(world / "data")
    everything = sorted(rows[i]["tokens"].tobytes() for i in range(count))
    flat = [row.tobytes() for batch in seen for row in batch]
    first, second = flat[:count], flat[count : 2 * count]
    assert sorted(first) == everything
    assert set(second) <= set(everything) and len(set(second)) == len(second)


def test_values_for_all_processes_of_one():
    assert everywhere(True) and not everywhere(False)
    np.testing.assert_array_equal(from_primary(np.array([3, 1])), [3, 1])
    x = jax.device_put(np.arange(8.0), batch_sharding(make_mesh(c.Mesh())))
    np.testing.assert_array_equal(to_host({"x": x})["x"], np.arange(8.0))


def test_sigterm_is_answered_after_a_step_and_given_back_at_the_end():
    before = signal.getsignal(signal.SIGTERM)
    mesh = make_mesh(c.Mesh())
    with Watch(c.Hosts()) as watch:
        assert not watch.stopping(mesh)
        os.kill(os.getpid(), signal.SIGTERM)
        until = time.monotonic() + 5
        while not watch.stopping(mesh) and time.monotonic() < until:
            time.sleep(0.01)
        assert watch.stopping(mesh)
    assert signal.getsignal(signal.SIGTERM) is before


def run_watch(body: str, **hosts) -> subprocess.CompletedProcess:
    code = f"""
import os, signal, time
from specauf_jax.config import Hosts
from specauf_jax.distributed import Watch
with Watch(Hosts(**{hosts})) as watch:
    {body}
print("went on")
"""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


def test_sigterm_before_the_first_step_ends_at_once():
    done = run_watch("os.kill(os.getpid(), signal.SIGTERM); time.sleep(30)", stopped_code=7)
    assert done.returncode == 7 and "nothing to save" in done.stderr and "went on" not in done.stdout


def test_jax_alone_does_not_tell_a_single_process_of_sigterm():
    """Why there is a `Watch`: JAX's preemption service works in runs of several processes only."""
    code = """
import os, signal, time
from jax.experimental import multihost_utils
multihost_utils.reached_preemption_sync_point(0)
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(30)
"""
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"JAX_PLATFORMS": "cpu"}, timeout=60)
    assert done.returncode == -signal.SIGTERM


def test_a_process_that_hangs_ends_itself_and_says_where():
    done = run_watch("watch.beat(); time.sleep(30)", stall_s=1)
    assert done.returncode == 1
    assert "no step for 1 s" in done.stderr and 'File "<string>"' in done.stderr


@pytest.mark.parametrize(
    "flags", [["--hosts.count", "2"], ["--hosts.coordinator", "a:1", "--hosts.count", "2", "--hosts.index", "2"]]
)
def test_hosts_are_told_wholly_or_not_at_all(flags, world, capsys):
    assert main([*command(world, "nowhere"), *flags]) == 2
    assert "all three or none" in capsys.readouterr().err


def test_hosts_that_do_not_come_are_named(world):
    flags = ["--hosts.coordinator", "127.0.0.1:1", "--hosts.count", "2", "--hosts.index", "1", "--hosts.join-s", "2"]
    line = [sys.executable, "-m", "specauf_jax", *command(world, world / "alone"), *flags]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "not all processes of the run came within 2 s" in done.stderr
    assert not (world / "alone").exists()


def test_batch_that_does_not_spread(world, monkeypatch):
    monkeypatch.setattr("specauf_jax.commands.generate.make_mesh", lambda *_: AbstractMesh((2, 4, 1), AXES))
    config = Generate(target=str(world / "target"), prompts=str(world / "prompts.jsonl"), method="autoregressive")
    with pytest.raises(SpecaufError, match="batch_size 4 over 8 parts"):
        generate(dataclasses.replace(config, batch_size=4, out="x"), QUIET)


def test_streams_are_for_one_host(world, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    config = Generate(target=str(world / "target"), prompts=str(world / "prompts.jsonl"), method="autoregressive")
    with pytest.raises(SpecaufError, match="no --out on several hosts"):
        generate(config, QUIET)
