"""The dataset on disk: packed rows as a TFDS dataset in ArrayRecord files, and its manifest.

No TensorFlow: rows go through TFDS's own feature encoding into an ArrayRecord file, and TFDS's
metadata is written beside it, so that `tfds.builder_from_directory(...).as_data_source()` reads it.
"""

import contextlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from specauf_jax.errors import SpecaufError
from specauf_jax.files import as_path, fresh_folder, local_copy, parse_json, read_bytes

NAME = "specauf"
MANIFEST_KEYS = ("sequence_length", "rows", "documents", "tokens", "supervised_tokens", "supervised_share",
                 "truncated_documents", "bad_records", "tokenizer_sha256", "template_sha256", "vocab_size",
                 "mask_token_id", "eos_token_id", "source", "prompts", "template_args", "largest_token_id")  # fmt: skip
_ADDED: dict[str, Any] = {"template_args": {}, "largest_token_id": None}
"""Keys that manifests of earlier versions lack, and what they are taken for; None is unknown."""
REPREPARE = "delete the folder and run `specauf prepare` again"


def write_dataset(rows: Iterable[dict], folder, sequence_length: int) -> int:
    """Write rows of `packing.pack` to `folder`/dataset/, one at a time; returns their number.

    Raises:
      SpecaufError: `folder`/dataset/ exists, or there are no rows. Nothing is left behind then.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    features = _features(sequence_length)
    with fresh_folder(Path(folder) / "dataset") as partial:
        # Group size 1 is what random access needs.
        writer = ArrayRecordWriter(str(partial / f"{NAME}-train.array_record-00000-of-00001"), "group_size:1")
        count = size = 0
        try:
            for row in rows:
                record = features.serialize_example(row)
                with _disk_errors():
                    writer.write(record)
                count, size = count + 1, size + len(record)
        finally:
            with _disk_errors():
                writer.close()
        if not count:
            raise SpecaufError("the source gave no rows", "at least one document", "check the input")
        _write_metadata(partial, features, count, size)
    return count


@contextlib.contextmanager
def _disk_errors():
    """ArrayRecord tells of a full disk with a RuntimeError, as of everything."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(str(error)) from error


def _features(sequence_length: int):
    # TFDS takes half a second to import, and is needed only where a dataset is written or opened.
    import tensorflow_datasets as tfds

    kinds = {"tokens": np.int32, "loss_mask": np.bool_, "document_ids": np.int32}
    tensors = {name: tfds.features.Tensor(shape=(sequence_length,), dtype=dtype) for name, dtype in kinds.items()}
    return tfds.features.FeaturesDict(tensors)


def _write_metadata(folder: Path, features, count: int, size: int) -> None:
    import tensorflow_datasets as tfds

    template = tfds.core.ShardedFileTemplate(data_dir=folder, dataset_name=NAME, split="train",
                                             filetype_suffix="array_record")  # fmt: skip
    split = tfds.core.SplitInfo(name="train", shard_lengths=[count], num_bytes=size, filename_template=template)
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=features,
        split_infos=[split],
        version="1.0.0",
        description="Packed token rows with loss masks, written by specauf prepare.",
        check_data=False,  # its check reads through tf.data
    )


class PackedRows:
    """Random access to a dataset: `len`, and `[i]` for a row as `packing.pack` made it."""

    def __init__(self, source, folder: Path):
        self._source, self._folder = source, folder

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index) -> dict:
        try:
            row = self._source[index]
        except RuntimeError as error:  # what ArrayRecord raises for nearly every damaged file
            raise self._damaged(str(error).splitlines()[0]) from error
        if any(value is None for value in row.values()):  # what it gives where a file ends between two blocks
            raise self._damaged(f"row {index} is missing")
        return row

    def _damaged(self, reason: str) -> SpecaufError:
        return SpecaufError(f"{self._folder / 'dataset'} is truncated or damaged: {reason}",
                            "the file as it was written", f"copy it again, or {REPREPARE}")  # fmt: skip


def open_dataset(folder) -> PackedRows:
    """The rows of `folder`/dataset/, read on demand.

    Raises:
      SpecaufError: missing, not written by `write_dataset`, incomplete or damaged.
    """
    import tensorflow_datasets as tfds

    folder = local_copy(folder)
    if not (folder / "dataset").is_dir():
        raise SpecaufError(f"{folder} has no dataset/ folder", "a folder written by `specauf prepare`",
                           "check the path, or run `specauf prepare --out` with it")  # fmt: skip
    try:
        builder = tfds.builder_from_directory(folder / "dataset")
        found = dict(builder.info.features)
        source = builder.as_data_source(split="train")
    except Exception as error:  # TFDS raises a dozen kinds here, KeyError and bare AssertionError among them
        raise _not_ours(folder, str(error).splitlines()[0] if str(error) else type(error).__name__) from error
    if set(found) != {"tokens", "loss_mask", "document_ids"}:
        raise _not_ours(folder, f"its features are {', '.join(sorted(found))}")
    rows = PackedRows(source, folder)
    rows[len(rows) - 1]  # the file's index stands at its end, so that any truncation shows here
    _check_count(folder, len(rows))
    return rows


def _not_ours(folder: Path, reason: str) -> SpecaufError:
    return SpecaufError(f"{folder / 'dataset'} cannot be read as a packed dataset: {reason}",
                        "a dataset written by `specauf prepare` or `specauf regenerate`", REPREPARE)  # fmt: skip


def _check_count(folder: Path, count: int) -> None:
    if not (folder / "manifest.json").exists():
        return
    expected = read_manifest(folder)["rows"]
    if count != expected:
        raise SpecaufError(f"{folder / 'dataset'} holds {count} rows", f"the manifest's {expected}", REPREPARE)


def write_manifest(folder, manifest: dict) -> None:
    """Write `folder`/manifest.json in one step (keys: MANIFEST_KEYS)."""
    if set(manifest) != set(MANIFEST_KEYS):
        raise ValueError(f"manifest keys differ: {sorted(set(manifest) ^ set(MANIFEST_KEYS))}")
    partial = Path(folder) / ".manifest.json.partial"
    partial.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, Path(folder) / "manifest.json")


def read_manifest(folder) -> dict:
    """The manifest of a prepared folder (keys: MANIFEST_KEYS; what earlier versions did not write is added).

    Raises:
      SpecaufError: missing or not a manifest.
    """
    path = as_path(folder) / "manifest.json"
    try:
        manifest = parse_json(read_bytes(path))
    except FileNotFoundError as error:
        raise SpecaufError(f"{path} does not exist", "a folder written by `specauf prepare`",
                           "check the path, or run `specauf prepare --out` with it") from error  # fmt: skip
    except (OSError, ValueError) as error:
        raise SpecaufError(f"{path} cannot be read: {error}", "the JSON of `specauf prepare`", REPREPARE) from error
    if isinstance(manifest, dict):
        manifest |= {key: value for key, value in _ADDED.items() if key not in manifest}
    missing = [key for key in MANIFEST_KEYS if not isinstance(manifest, dict) or key not in manifest]
    if missing:
        raise SpecaufError(f"{path} lacks {', '.join(missing)}", "the manifest of this version", REPREPARE)
    return manifest
