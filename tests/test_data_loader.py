import itertools
import json

import numpy as np
import pytest

from specauf_jax.data.dataset import write_dataset
from specauf_jax.data.loader import make_loader
from specauf_jax.data.packing import document_positions

S, ROWS = 8, 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Ten rows; the first token of a row is its number."""
    folder = tmp_path_factory.mktemp("data")
    ids = np.array([1, 1, 1, 2, 2, 2, 0, 0], np.int32)
    rows = (
        {"tokens": np.arange(S, dtype=np.int32) + 100 * i, "loss_mask": ids == 2, "document_ids": ids}
        for i in range(ROWS)
    )
    write_dataset(rows, folder, S)
    return folder


def numbers(batches):
    return [(batch["tokens"][:, 0] // 100).tolist() for batch in batches]


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def test_batches(folder):
    batch = next(make_loader(folder, 4, seed=0))
    assert {name: (value.shape, value.dtype.name) for name, value in batch.items()} == {
        "tokens": ((4, S), "int32"),
        "loss_mask": ((4, S), "bool"),
        "document_ids": ((4, S), "int32"),
        "positions": ((4, S), "int32"),
    }
    np.testing.assert_array_equal(batch["positions"], document_positions(batch["document_ids"]))


def test_each_epoch_has_every_row_once_in_a_new_order(folder):
    first, second = np.array(numbers(take(make_loader(folder, 5, seed=0), 4))).reshape(2, ROWS)
    assert sorted(first) == sorted(second) == list(range(ROWS))
    assert first.tolist() != second.tolist()


def test_order_depends_on_the_seed_alone(folder):
    one, again, other = (numbers(take(make_loader(folder, 4, seed=seed), 6)) for seed in (1, 1, 2))
    assert one == again != other


def test_batch_larger_than_the_dataset(folder):
    (batch,) = numbers(take(make_loader(folder, 24, seed=0), 1))
    assert sorted(batch[:ROWS]) == list(range(ROWS)) and len(batch) == 24


@pytest.mark.parametrize("count", [2, 4])
def test_processes_rows_make_up_the_global_batch(folder, count):
    whole = numbers(take(make_loader(folder, 4, seed=3), 7))
    parts = np.split(np.arange(4), count)
    shards = [numbers(take(make_loader(folder, 4, 3, rows=rows), 7)) for rows in parts]
    assert [list(itertools.chain(*parts)) for parts in zip(*shards, strict=True)] == whole


def test_resume_from_json_state_in_the_middle_of_an_epoch(folder):
    loader = make_loader(folder, 4, seed=5)
    take(loader, 4)
    state = json.loads(json.dumps(loader.get_state()))
    expected = take(loader, 5)
    resumed = make_loader(folder, 4, seed=5)
    next(resumed)
    resumed.set_state(state)
    for batch, want in zip(take(resumed, 5), expected, strict=True):
        for name in want:
            np.testing.assert_array_equal(batch[name], want[name])


def test_state_carries_over_to_another_number_of_processes(folder):
    whole = make_loader(folder, 4, seed=5)
    take(whole, 3)
    shard = make_loader(folder, 4, seed=5, rows=np.array([2, 3]))
    shard.set_state(whole.get_state())
    assert numbers([next(shard)]) == [numbers([next(whole)])[0][2:]]
