"""Endless, reshuffled, resumable batches of a prepared dataset."""

from typing import Protocol

import numpy as np

from specauf_jax.data.dataset import open_dataset
from specauf_jax.data.packing import document_positions


class Loader(Protocol):
    """Batches without end: {`tokens`, `document_ids`, `positions`: int32 [b, S], `loss_mask`: bool [b, S]}."""

    def __next__(self) -> dict[str, np.ndarray]: ...

    def get_state(self) -> dict:
        """Where it stands, fit for JSON."""

    def set_state(self, state: dict) -> None:
        """Go on from there."""


def make_loader(folder, batch_size: int, seed: int, *, rows: np.ndarray | None = None) -> Loader:
    """A grain iterator over batches, shuffled anew each epoch; a batch may span two epochs.

    The order of the global batches depends on the seed alone, and so does the iterator's state: processes
    read different rows of the same batches, and any number of them goes on where any other stopped.

    Args:
      folder: written by `specauf prepare`.
      batch_size: rows B of the global batch.
      seed: of the shuffle.
      rows: int `[b]`, which of the B rows to read; None for all.
    """
    # grain imports jax, which must not happen before the command has set its platform up.
    import grain

    source = open_dataset(folder)
    mine = slice(None) if rows is None else rows
    indices = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()
    batches = indices.batch(batch_size).map(lambda batch: _read(source, batch[mine]))
    # One reader, two batches ahead: a row takes a tenth of a millisecond, more threads only contend.
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))


def _read(rows, indices: np.ndarray) -> dict:
    read = [rows[int(index)] for index in indices]
    batch = {name: np.stack([row[name] for row in read]) for name in ("tokens", "loss_mask", "document_ids")}
    return batch | {"positions": document_positions(batch["document_ids"])}
