"""Work along one axis in chunks, so that large intermediates exist for one chunk at a time."""

import jax
import jax.numpy as jnp
from jax import lax


def map_chunks(f, size: int, *arrays):
    """`f(*arrays)`, axis 1 of every array and result cut into chunks of `size`, one after another.

    Each chunk is rematerialised in the backward pass, so neither pass holds more than one chunk's
    intermediates. Axis 0 (rows, sharded over the mesh) stays whole: chunking it would move data
    between devices. The last chunk is filled up with zeros and the surplus dropped.

    Args:
      f: arrays `[B, n, ...]` → pytree of arrays `[B, n, ...]`, independent along axis 1.
      size: n of one chunk.
      *arrays: `[B, T, ...]`.

    Returns:
      Pytree of `[B, T, ...]`.
    """
    length = arrays[0].shape[1]
    if length <= size:
        return f(*arrays)
    count = -(-length // size)

    def split(x):
        x = jnp.pad(x, [(0, 0), (0, count * size - length)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], count, size, *x.shape[2:]), 1, 0)

    def join(y):
        y = jnp.moveaxis(y, 0, 1)
        return y.reshape(y.shape[0], count * size, *y.shape[3:])[:, :length]

    # The barrier keeps autodiff from computing what depends on indices alone (masks) for all chunks ahead.
    one = jax.checkpoint(lambda chunk: f(*lax.optimization_barrier(chunk)))
    result = lax.map(one, tuple(map(split, arrays)))
    return jax.tree.map(join, result)
