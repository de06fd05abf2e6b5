"""Endless, reshuffled, resumable batches of a prepared dataset."""

import numpy as np

from specauf_jax.data.dataset import open_dataset
from specauf_jax.data.packing import document_positions
from specauf_jax.errors import SpecaufError


def make_loader(folder, batch_size: int, seed: int, *, shard_index: int = 0, shard_count: int = 1):
    """A grain iterator over batches, shuffled anew each epoch; a batch may span two epochs.

    The order of the global batches depends on the seed alone. Shard i gets the i-th run of
    b = batch_size / shard_count rows of each, so that the shards' batches, one after another, are
    the batch that a single shard would get.

    Args:
      folder: written by `specauf prepare`.
      batch_size: rows B of the global batch.
      seed: of the shuffle.
      shard_index: this process's shard, from 0.
      shard_count: processes that read different rows.

    Returns:
      An iterator of {`tokens`, `document_ids`, `positions`: int32 [b, S], `loss_mask`: bool [b, S]}
      whose `get_state()` is a JSON-serialisable dict for `set_state()`.
    """
    # grain imports jax, which must not happen before the command has set its platform up.
    import grain

    if batch_size % shard_count or not 0 <= shard_index < shard_count:
        raise SpecaufError(f"batch_size {batch_size} over {shard_count} data shards (this is shard {shard_index})",
                           "a multiple of the shards", "change --train.batch-size or the mesh")  # fmt: skip
    rows = open_dataset(folder)
    mine = slice(shard_index * batch_size // shard_count, (shard_index + 1) * batch_size // shard_count)
    indices = grain.MapDataset.range(len(rows)).seed(seed).shuffle().repeat()
    batches = indices.batch(batch_size).map(lambda batch: _read(rows, batch[mine]))
    # One reader, two batches ahead: a row takes a tenth of a millisecond, more threads only contend.
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))


def _read(rows, indices: np.ndarray) -> dict:
    read = [rows[int(index)] for index in indices]
    batch = {name: np.stack([row[name] for row in read]) for name in ("tokens", "loss_mask", "document_ids")}
    return batch | {"positions": document_positions(batch["document_ids"])}
