import numpy as np
import pytest

from specauf_jax.data import dataset
from specauf_jax.errors import SpecaufError
from specauf_jax.files import fresh_folder

S = 16


def make_rows(count):
    rng = np.random.default_rng(0)
    for _ in range(count):
        yield {
            "tokens": rng.integers(0, 2**31 - 1, S, dtype=np.int32),
            "loss_mask": rng.integers(0, 2, S) == 1,
            "document_ids": np.sort(rng.integers(0, 3, S)).astype(np.int32),
        }


def data_file(folder):
    (path,) = (folder / "dataset").glob("*.array_record-*")
    return path


def test_write_and_open(tmp_path):
    assert dataset.write_dataset(make_rows(7), tmp_path, S) == 7
    opened = dataset.open_dataset(tmp_path)
    assert len(opened) == 7
    for index, row in enumerate(make_rows(7)):
        assert set(opened[index]) == set(row)
        for name, values in row.items():
            np.testing.assert_array_equal(opened[index][name], values)
            assert opened[index][name].dtype == values.dtype


def test_tfds_itself_reads_it(tmp_path):
    import tensorflow_datasets as tfds

    dataset.write_dataset(make_rows(3), tmp_path, S)
    builder = tfds.builder_from_directory(tmp_path / "dataset")
    assert builder.info.splits["train"].num_examples == 3
    assert builder.as_data_source(split="train")[2]["tokens"].shape == (S,)


@pytest.mark.parametrize("keep", [0, 1000, 70_000, -1])
def test_truncated_file(tmp_path, keep):
    dataset.write_dataset(make_rows(2000), tmp_path, S)
    path = data_file(tmp_path)
    assert path.stat().st_size > 70_000
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(SpecaufError, match="truncated or damaged"):
        dataset.open_dataset(tmp_path)


def test_damage_in_the_middle_shows_when_read(tmp_path):
    dataset.write_dataset(make_rows(2000), tmp_path, S)
    path = data_file(tmp_path)
    content = bytearray(path.read_bytes())
    content[1000:1200] = bytes(200)
    path.write_bytes(content)
    rows = dataset.open_dataset(tmp_path)
    with pytest.raises(SpecaufError, match="truncated or damaged"):
        [rows[index] for index in range(len(rows))]


def test_failed_write_leaves_nothing(tmp_path):
    def failing():
        yield from make_rows(3)
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        dataset.write_dataset(failing(), tmp_path, S)
    assert list(tmp_path.iterdir()) == []


def test_existing_dataset_is_left_alone(tmp_path):
    dataset.write_dataset(make_rows(3), tmp_path, S)
    with pytest.raises(SpecaufError, match="already holds"):
        dataset.write_dataset(make_rows(5), tmp_path, S)
    assert len(dataset.open_dataset(tmp_path)) == 3


def test_no_rows(tmp_path):
    with pytest.raises(SpecaufError, match="no rows"):
        dataset.write_dataset([], tmp_path, S)


def test_open_refuses_what_is_not_ours(tmp_path):
    with pytest.raises(SpecaufError, match="no dataset/ folder"):
        dataset.open_dataset(tmp_path)
    (tmp_path / "dataset").mkdir()
    with pytest.raises(SpecaufError, match="cannot be read as a packed dataset"):
        dataset.open_dataset(tmp_path)


def test_row_count_is_checked_against_the_manifest(tmp_path):
    dataset.write_dataset(make_rows(3), tmp_path, S)
    dataset.write_manifest(tmp_path, dict.fromkeys(dataset.MANIFEST_KEYS) | {"rows": 4})
    with pytest.raises(SpecaufError, match="holds 3 rows"):
        dataset.open_dataset(tmp_path)


def test_manifest(tmp_path):
    with pytest.raises(SpecaufError, match="does not exist"):
        dataset.read_manifest(tmp_path)
    manifest = dict.fromkeys(dataset.MANIFEST_KEYS, 1)
    dataset.write_manifest(tmp_path, manifest)
    assert dataset.read_manifest(tmp_path) == manifest
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]
    (tmp_path / "manifest.json").write_text('{"rows": 1}')
    with pytest.raises(SpecaufError, match="lacks sequence_length"):
        dataset.read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(SpecaufError, match="cannot be read"):
        dataset.read_manifest(tmp_path)


def test_fresh_folder_takes_an_empty_folder_only(tmp_path):
    (tmp_path / "empty").mkdir()
    with fresh_folder(tmp_path / "empty") as folder:
        (folder / "a").write_text("a")
    assert (tmp_path / "empty" / "a").read_text() == "a"
    with pytest.raises(SpecaufError, match="already holds files"), fresh_folder(tmp_path / "empty"):
        pytest.fail("work begun that cannot be kept")
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
