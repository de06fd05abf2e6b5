"""Damaged checkpoints: a clear error every time, or the very model that was saved; no crash, no hang, no wrong load."""

import dataclasses
import json
import random
import shutil
import signal
import struct

import pytest
import tiny

from specauf_jax.errors import SpecaufError
from specauf_jax.models.weights import load_drafter, load_target, save_drafter, save_target

pytestmark = pytest.mark.filterwarnings("ignore::specauf_jax.errors.SpecaufWarning")  # garbled keys
CASES = 60  # of each kind of damage and model
TARGET = tiny.target_config(model_type="qwen2", num_hidden_layers=2)
DOMINO = tiny.domino_config(gru_hidden_dim=5)
JUNK = [None, -1, 0, 1, 3, 10**30, 2**31, 0.5, -0.0, 1e308, float("nan"), float("inf"), True, False, "", "x", "16", [],
        [1], [None], {}, {"a": 1}, "full_attention", ["x"] * 3, [0, 1, 2], [-1], [[1]], "\ud800"]  # fmt: skip


OTHER_FILES = ["../target/model.safetensors", "/etc/passwd", "config.json", "model-2.safetensors", "", "."]
DERIVED = {"layer_types", "sliding_window", "rope_scaling", "head_dim"}
"""Fields that may differ from the saved ones without standing in the file as they are."""


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Folders as saved: a target in one file, the same in shards, and a Domino drafter."""
    root = tmp_path_factory.mktemp("originals")
    save_target(tiny.target_params(TARGET), TARGET, root / "target")
    save_drafter(tiny.drafter_params(DOMINO), DOMINO, root / "drafter")
    shutil.copytree(root / "target", root / "sharded")
    (root / "sharded" / "model.safetensors").rename(root / "sharded" / "model-1.safetensors")
    names = header(root / "sharded" / "model-1.safetensors")
    weight_map = {name: "model-1.safetensors" for name in names if name != "__metadata__"}
    (root / "sharded" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return root


class Timeout(Exception):
    """A case took seconds."""


@pytest.fixture(autouse=True)
def no_hang():
    def ring(*_):
        raise Timeout

    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, 60)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)


def header(path) -> dict:
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        return json.loads(file.read(size))


def loaded_or_refused(folder):
    """(params, config), or None where the loader refused; its words name the folder and a remedy."""
    load = load_drafter if folder.name == "drafter" else load_target
    try:
        return load(folder)
    except SpecaufError as error:
        assert folder.name in error.found and error.expected and error.remedy, error
        return None


def leaves(value) -> list:
    """Every value in a JSON document, lists whole."""
    return [leaf for x in value.values() for leaf in leaves(x)] if isinstance(value, dict) else [value]


def check_same_weights(params, kind: str) -> None:
    saved = tiny.drafter_params(DOMINO) if kind == "drafter" else tiny.target_params(TARGET)
    assert tiny.same_bits(params, saved)


def damage_json(rng: random.Random, values: dict) -> dict:
    """One key, at any depth, removed, renamed, or given another value."""
    values = json.loads(json.dumps(values))
    place = values
    while True:
        key = rng.choice(sorted(place))
        if not (isinstance(place[key], dict) and place[key] and rng.random() < 0.8):
            break
        place = place[key]
    match rng.choice(["remove", "rename", "junk", "junk", "junk", "neighbour"]):
        case "remove":
            del place[key]
        case "rename":
            place[key + rng.choice("_sx")] = place.pop(key)
        case "junk":
            place[key] = rng.choice(JUNK)
        case "neighbour":
            place[key] = place[key] + rng.choice([-1, 1]) if type(place[key]) is int else rng.choice(JUNK)
    return values


def damage_bytes(rng: random.Random, data: bytes, end: int) -> bytes:
    """Bytes before `end` changed, removed or doubled, or the file cut off."""
    data = bytearray(data)
    at = rng.randrange(end)
    match rng.choice(["change", "change", "change", "remove", "double", "cut"]):
        case "change":
            for _ in range(rng.choice([1, 1, 4])):
                data[rng.randrange(end)] = rng.randrange(256)
        case "remove":
            del data[at : at + rng.choice([1, 8, 100])]
        case "double":
            data[at:at] = data[at : at + rng.choice([1, 8, 100])]
        case "cut":
            del data[rng.randrange(len(data)) :]
    return bytes(data)


@pytest.mark.parametrize("kind", ["target", "drafter"])
def test_config(originals, tmp_path, kind):
    """What loads has the saved weights, and an architecture that computes with them what the file says."""
    values = json.loads((originals / kind / "config.json").read_text())
    saved = DOMINO if kind == "drafter" else TARGET
    outcomes = []
    for case in range(2 * CASES):
        folder = shutil.copytree(originals / kind, tmp_path / str(case) / kind)
        damaged = damage_json(random.Random(case), values)
        (folder / "config.json").write_text(json.dumps(damaged))
        found = loaded_or_refused(folder)
        outcomes.append(found is not None)
        if found is None:
            continue
        params, config = found
        check_same_weights(params, kind)
        said = [None, *leaves(damaged)]
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            if value != getattr(saved, field.name) and field.name not in DERIVED:
                value = list(value) if isinstance(value, tuple) else value
                same = [x == value and isinstance(x, bool) == isinstance(value, bool) for x in said]
                assert any(same), field.name
    assert 0.2 < sum(outcomes) / len(outcomes) < 0.8  # both ends are reached


@pytest.mark.parametrize("kind", ["target", "drafter", "sharded"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_bytes_of_json(originals, tmp_path, kind, name):
    if not (originals / kind / name).exists():
        return
    outcomes = []
    for case in range(CASES):
        folder = shutil.copytree(originals / kind, tmp_path / str(case) / kind)
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(damage_bytes(random.Random(case), data, len(data)))
        found = loaded_or_refused(folder)
        outcomes.append(found is not None)
        if found:
            check_same_weights(found[0], kind)
    assert not all(outcomes)


@pytest.mark.parametrize("kind", ["target", "drafter", "sharded"])
def test_bytes_of_a_header(originals, tmp_path, kind):
    name = "model-1.safetensors" if kind == "sharded" else "model.safetensors"
    outcomes = []
    for case in range(CASES):
        folder = shutil.copytree(originals / kind, tmp_path / str(case) / kind)
        data = (folder / name).read_bytes()
        (size,) = struct.unpack("<Q", data[:8])
        (folder / name).write_bytes(damage_bytes(random.Random(case), data, 8 + size))
        found = loaded_or_refused(folder)
        outcomes.append(found is not None)
        if found:
            check_same_weights(found[0], kind)
    assert sum(outcomes) / len(outcomes) < 0.2


@pytest.mark.parametrize("kind", ["target", "drafter"])
def test_entries_of_a_header(originals, tmp_path, kind):
    """A header that is whole JSON, with an entry that says something else."""
    path = originals / kind / "model.safetensors"
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    for case in range(CASES):
        folder = shutil.copytree(originals / kind, tmp_path / str(case) / kind)
        damaged = json.dumps(damage_json(random.Random(case), header(path))).encode()
        (folder / path.name).write_bytes(struct.pack("<Q", len(damaged)) + damaged + data[8 + size :])
        found = loaded_or_refused(folder)
        if found:
            check_same_weights(found[0], kind)


def test_index(originals, tmp_path):
    values = json.loads((originals / "sharded" / "model.safetensors.index.json").read_text())
    outcomes = []
    for case in range(CASES):
        folder = shutil.copytree(originals / "sharded", tmp_path / str(case) / "sharded")
        rng = random.Random(case)
        damaged = damage_json(rng, values)
        if case % 3 == 0:
            name = rng.choice(sorted(values["weight_map"]))
            damaged = {"weight_map": values["weight_map"] | {name: rng.choice(OTHER_FILES)}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(damaged))
        found = loaded_or_refused(folder)
        outcomes.append(found is not None)
        if found:
            check_same_weights(found[0], "target")
    assert not any(outcomes)
