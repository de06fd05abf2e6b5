"""Whatever happens to the newest checkpoint's files, a run goes on from the one before and says why."""

import io
import itertools
import json
import shutil
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from rich.console import Console

from specauf_jax import config as c
from specauf_jax.errors import SpecaufError
from specauf_jax.sharding import batch_sharding, make_mesh, parameter_sharding, placed
from specauf_jax.training.checkpoint import Checkpoints, Damaged, _check_config
from specauf_jax.training.loop import Run, _cut, train_loop
from specauf_jax.training.step import TrainState

CONFIG = {"sequence_length": 4, "train": {"seed": 0}}


class Counting:
    """A loader of batches that hold their number."""

    def __init__(self):
        self.number = 0

    def __next__(self):
        self.number += 1
        rows = np.full((2, 4), self.number, np.int32)
        return {"tokens": rows, "positions": rows, "document_ids": rows, "loss_mask": rows > 0}

    def get_state(self):
        return {"number": self.number}

    def set_state(self, state):
        self.number = state["number"]


def noise():
    """Numbers that no compression shortens."""
    return jax.random.normal(jax.random.key(0), (20_000,))


def step(state, batch):
    value = state.params["w"] + batch.tokens.astype(jnp.float32).sum() + noise()
    params = {"w": value, "half": (state.params["half"] + 1).astype(jnp.bfloat16)}
    return TrainState(step=state.step + 1, params=params, opt_state=state.opt_state), {
        "loss": value[0] / 7,
        "nonfinite": {},
    }


jitted = jax.jit(step)


def initial():
    params = {"w": jnp.zeros(20_000), "half": jnp.zeros(3, jnp.bfloat16)}
    return TrainState(step=jnp.int32(0), params=params, opt_state={"bits": jnp.arange(40, dtype=jnp.uint8)})


def make_run(out, steps=6, **changes) -> Run:
    mesh = make_mesh(c.Mesh(), jax.devices()[:1])
    shapes = jax.eval_shape(initial)
    settings = {
        "out": out,
        "train": c.Optimisation(steps=steps, batch_size=2, checkpoint_every=2, keep_last=9),
        "hosts": c.Hosts(),
        "flops": lambda *_: {"target": 1e9},
        "config": CONFIG,
        "environment": {},
        "step": lambda number, *arguments: jitted(*arguments),
        "initialise": initial,
        "like": placed(shapes, parameter_sharding(shapes, mesh)),
        "loader": Counting(),
        "batch_sharding": batch_sharding(mesh),
        "score": "loss",
        "shown": ("loss",),
    }
    return Run(**(settings | changes))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run of 6 steps with checkpoints 2, 4 and 6, and its state."""
    out = tmp_path_factory.mktemp("whole") / "run"
    return out, jax.device_get(train_loop(make_run(out), Console(quiet=True)))


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def largest(folder):
    """That which holds the numbers."""
    return max(files(folder / "state/ocdbt.process_0/d"), key=lambda path: path.stat().st_size)


def named(name):
    def find(folder):
        return next(path for path in files(folder) if path.name == name)

    return find


def truncate(share):
    return lambda path: path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def flip(share):
    def damage(path):
        data = bytearray(path.read_bytes())
        data[min(int(len(data) * share), len(data) - 1)] ^= 0x10
        path.write_bytes(data)

    return damage


def zero(path):
    path.write_bytes(bytes(path.stat().st_size))


def delete(path):
    path.unlink()


def other_json(path):
    path.write_text('{"another": 1}')


def all_state_files(folder):
    return folder / "state"


DAMAGE = {
    "state folder deleted": (all_state_files, shutil.rmtree),
    "state folder emptied": (all_state_files, lambda path: (shutil.rmtree(path), path.mkdir())),
    "checksums deleted": (lambda folder: folder / "checksums", shutil.rmtree),
    "iterator deleted": (lambda folder: folder / "iterator", shutil.rmtree),
    "config deleted": (lambda folder: folder / "config", shutil.rmtree),
    "array metadata deleted": (named("_METADATA"), delete),
    "array metadata truncated": (named("_METADATA"), truncate(0.5)),
    "array metadata emptied": (named("_METADATA"), truncate(0)),
    "array metadata of another": (named("_METADATA"), other_json),
    "manifest deleted": (named("manifest.ocdbt"), delete),
    "manifest truncated": (named("manifest.ocdbt"), truncate(0.5)),
    "manifest flipped": (named("manifest.ocdbt"), flip(0.5)),
    "largest file deleted": (largest, delete),
    "largest file truncated": (largest, truncate(0.5)),
    "largest file emptied": (largest, truncate(0)),
    "largest file zeroed": (largest, zero),
    "largest file flipped at the start": (largest, flip(0.0)),
    "largest file flipped in the middle": (largest, flip(0.5)),
    "everything truncated": (lambda folder: folder, lambda folder: [truncate(0.7)(path) for path in files(folder)]),
    "everything deleted": (lambda folder: folder, lambda folder: [path.unlink() for path in files(folder)]),
    "step metadata deleted": (named("_CHECKPOINT_METADATA"), delete),
    "step metadata garbled": (named("_CHECKPOINT_METADATA"), truncate(0.3)),
    "score garbled": (lambda folder: folder / "metrics/metrics", truncate(0.5)),
    "score of another": (lambda folder: folder / "metrics/metrics", other_json),
    "folder emptied": (lambda folder: folder, lambda folder: (shutil.rmtree(folder), folder.mkdir())),
}
HARMLESS = {"step metadata deleted", "step metadata garbled"}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(name, whole, tmp_path):
    source, expected = whole
    shutil.copytree(source, tmp_path / "run")
    newest = tmp_path / "run/checkpoints/6"
    where, damage = DAMAGE[name]
    damage(where(newest))
    said = io.StringIO()
    state = train_loop(make_run(tmp_path / "run"), Console(file=said, width=400))
    chex.assert_trees_all_equal(jax.device_get(state), expected)
    if name not in HARMLESS:
        assert "checkpoint 6 is damaged" in said.getvalue() and "at step 4 of 6" in said.getvalue()
        [aside] = (tmp_path / "run/damaged_checkpoints").iterdir()
        assert aside.name.startswith("6.")
    checkpoints = Checkpoints(tmp_path / "run/checkpoints", keep_last=None)
    assert checkpoints.latest() == 6
    checkpoints.close()


@pytest.mark.parametrize("seed", range(8))
def test_a_flipped_bit_anywhere_in_the_arrays_is_noticed(seed, whole, tmp_path):
    source, expected = whole
    shutil.copytree(source, tmp_path / "run")
    draw = np.random.default_rng(seed)
    path = draw.choice([path for path in files(tmp_path / "run/checkpoints/6/state") if path.parent.name == "d"])
    flip(draw.uniform())(path)
    state = train_loop(make_run(tmp_path / "run"), Console(quiet=True))
    chex.assert_trees_all_equal(jax.device_get(state), expected)


def test_all_damaged_begins_anew(whole, tmp_path):
    source, expected = whole
    shutil.copytree(source, tmp_path / "run")
    for number in (2, 4, 6):
        shutil.rmtree(tmp_path / f"run/checkpoints/{number}/state")
    state = train_loop(make_run(tmp_path / "run"), Console(quiet=True))
    chex.assert_trees_all_equal(jax.device_get(state), expected)
    assert len(list((tmp_path / "run/damaged_checkpoints").iterdir())) == 3


def test_another_runs_checkpoint_is_refused_not_set_aside(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "run")
    with pytest.raises(SpecaufError, match="train.seed = 0, not 1"):
        train_loop(make_run(tmp_path / "run", config=CONFIG | {"train": {"seed": 1}}), Console(quiet=True))
    assert (tmp_path / "run/checkpoints/6").is_dir()


def test_what_may_change_between_a_run_and_its_continuation(whole, tmp_path):
    free = {"mesh": {"fsdp": 4}, "hosts": {"count": 2}, "out": "there", "train": {"seed": 0, "remat": "layers"}}
    shutil.copytree(whole[0], tmp_path / "run")
    train_loop(make_run(tmp_path / "run", config=CONFIG | free), Console(quiet=True))


def test_a_path_may_be_spelled_in_another_way(whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one, other = {"data": "data", "target": "there/target"}, {"data": "./data/", "target": f"{tmp_path}/there/target"}
    _check_config("run", one, other)
    with pytest.raises(SpecaufError, match="data = .*elsewhere"):
        _check_config("run", one, other | {"data": "elsewhere"})


def test_somebodys_copy_of_a_checkpoint_is_passed_over(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "run")
    shutil.copytree(tmp_path / "run/checkpoints/6", tmp_path / "run/checkpoints/6.backup")
    (tmp_path / "run/checkpoints/6.backup/metrics/metrics").write_text("x")
    train_loop(make_run(tmp_path / "run"), Console(quiet=True))
    assert (tmp_path / "run/checkpoints/6.backup").is_dir() and not (tmp_path / "run/damaged_checkpoints").exists()


def test_lines_that_others_wrote_into_the_metrics_stay(tmp_path):
    lines = ['{"step": 1}', '{"note": "by hand"}', '{"step": 3}', "plainly", "[1]", '{"step": 2, "los']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    _cut(tmp_path / "metrics.jsonl", tmp_path / "metrics.jsonl", 2)
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == [*lines[:2], *lines[3:5]]


def read_onto_eight_devices(folder: str) -> None:
    """Of a process with 8 devices: what one device saved is the same; with other checksums it is refused."""
    tmp_path = Path(folder)
    mesh = make_mesh(c.Mesh(fsdp=4, tensor=2))
    params = {"lm_head": {"kernel": jax.random.normal(jax.random.key(0), (16, 64))}}
    shapes = jax.eval_shape(lambda: params)
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep_last=2)
    checkpoints.save(1, params, {}, CONFIG, None)
    checkpoints.wait()
    like = placed(shapes, parameter_sharding(shapes, mesh))
    restored, _ = checkpoints.restore(1, like, CONFIG)
    assert restored["lm_head"]["kernel"].sharding.is_equivalent_to(like["lm_head"]["kernel"].sharding, 2)
    chex.assert_trees_all_equal(jax.device_get(restored), jax.device_get(params))
    sums = tmp_path / "checkpoints/1/checksums/metadata"
    values = json.loads(sums.read_text())
    sums.write_text(json.dumps({name: value ^ 1 for name, value in values.items()}))
    with pytest.raises(Damaged, match="not those that were saved"):
        checkpoints.restore(1, like, CONFIG)
    checkpoints.close()
    print("both seen")


def test_checksums_are_of_the_numbers_on_any_mesh(tmp_path):
    said = tiny.on_eight_devices(f"import test_checkpoint; test_checkpoint.read_onto_eight_devices({str(tmp_path)!r})")
    assert said.splitlines()[-1] == "both seen"


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32, jnp.uint8])
def test_a_checksum_sees_every_single_change_and_every_swap(dtype):
    from specauf_jax.training.checkpoint import _checksum

    x = np.arange(24).reshape(2, 3, 4).astype(dtype)
    original, found = int(_checksum(jnp.asarray(x))), []
    for place in np.ndindex(x.shape):
        changed = x.copy()
        changed[place] += 1
        found.append(int(_checksum(jnp.asarray(changed))))
    for one, other in itertools.combinations(np.ndindex(x.shape), 2):
        swapped = x.copy()
        swapped[one], swapped[other] = x[other], x[one]
        found.append(int(_checksum(jnp.asarray(swapped))))
    assert len(found) == 24 + 24 * 23 // 2 and original not in found
