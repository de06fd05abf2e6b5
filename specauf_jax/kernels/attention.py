"""Attention over a cache: every query sees the positions `start <= j < stop` of its row; and writing to it.

For decoding. Tiles of the cache are read one after another, up to the last one that any row sees, in place: a layer
taken out of the cache would be a copy. Training's attention is in block_attention.py.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from specauf_jax.kernels.block_attention_xla import FLOOR, absorb
from specauf_jax.sharding import heads_spec, mesh_of, per_device, rows_spec

NO_WINDOW = 0  # as the `window` of a layer that has none
TILE, TILE_ON_CPU, TILE_ON_GPU = 1024, 64, 4096  # positions of the cache whose scores exist at one time


@jax.named_scope("attention")
def cached_attention(q, cache_k, cache_v, layer, start, stop, own=None, sinks=None) -> jax.Array:
    """Softmax attention with grouped key/value heads. Has no gradient.

    Args:
      q: `[B, T, H, E]`.
      cache_k, cache_v: `[N, B, G, S, E]`, H a multiple of G.
      layer: int [], which of the N is meant.
      start, stop: int `[B, T]`; a query that sees nothing gets 0.
      own: keys and values `[B, T, G, E]` that are not in the cache, and bool `[B, T, T]`, which of them each query
        sees; None for none.
      sinks: `[H]`, a score beside those of what is seen, whose share of the softmax goes nowhere; None for none.

    Returns:
      `[B, T, H, E]` in q's dtype.
    """
    mesh, B, G = mesh_of(q), q.shape[0], cache_k.shape[2]
    rows, heads = rows_spec(mesh, B), heads_spec(mesh, B, G, 2)
    cache = PartitionSpec(None, *heads_spec(mesh, B, G, 1))
    own_specs = None if own is None else (heads, heads, rows)
    of_heads = None if sinks is None else PartitionSpec(heads[2])
    specs = (heads, cache, cache, PartitionSpec(), rows, rows, own_specs, of_heads)

    def run(*arrays):
        cpu, gpu, tpu = (functools.partial(_attend, most=most) for most in (TILE_ON_CPU, TILE_ON_GPU, TILE))
        return lax.platform_dependent(*arrays, cpu=cpu, cuda=gpu, default=tpu)

    return per_device(run, mesh, specs, heads)(q, cache_k, cache_v, jnp.asarray(layer), start, stop, own, sinks)


def _attend(q, cache_k, cache_v, layer, start, stop, own, sinks, *, most: int):
    """`cached_attention` of what one device holds, in tiles of at most so many positions."""
    (B, T, H, E), (G, S) = q.shape, cache_k.shape[2:4]
    size = min(most, S)
    queries = q.reshape(B, T, G, H // G, E).transpose(0, 2, 1, 3, 4).reshape(B, G, -1, E)
    state = jnp.full(queries.shape[:-1], FLOOR), jnp.zeros(queries.shape[:-1]), jnp.zeros(queries.shape, jnp.float32)

    def of_queries(x):  # [B, T, …] → [B, 1, T·H/G, …]
        return jnp.repeat(x, H // G, axis=1)[:, None]

    if own is not None:
        keys, values = (jnp.moveaxis(x, 2, 1) for x in own[:2])
        state = absorb(state, queries, keys, values, of_queries(own[2]))
    from_, to = of_queries(start[..., None]), of_queries(stop[..., None])

    def tile(i, state):
        at = jnp.minimum(i * size, S - size)  # the last tile may overlap the one before it
        place, shape = (layer, 0, 0, at, 0), (1, B, G, size, E)
        keys, values = (lax.dynamic_slice(x, place, shape)[0] for x in (cache_k, cache_v))
        j = at + jnp.arange(size)
        return absorb(state, queries, keys, values, (j >= jnp.maximum(from_, i * size)) & (j < to))

    first, last = jnp.where(stop > start, start, S).min() // size, -(-jnp.minimum(stop, S).max() // size)
    peak, total, mixed = tile(0, state) if size == S else lax.fori_loop(first, last, tile, state)
    if sinks is not None:  # [H] → [G, T·H/G], in the order of the queries
        scores = jnp.tile(sinks.astype(jnp.float32).reshape(G, -1), (1, T))
        new = jnp.maximum(peak, scores)
        total, mixed = jnp.exp(peak - new) * total + jnp.exp(scores - new), jnp.exp(peak - new)[..., None] * mixed
    mixed = (mixed / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)[..., None]).astype(q.dtype)
    return mixed.reshape(B, G, T, H // G, E).transpose(0, 2, 1, 3, 4).reshape(q.shape)


def write_entries(cache: jax.Array, new: jax.Array, first: jax.Array, layer: jax.Array) -> jax.Array:
    """A cache `[N, B, G, S, E]` with `[n, B, T, G, E]` from `layer` and from each row's position `first` on."""
    mesh, (n, B, _, G, _) = mesh_of(cache), new.shape
    entries = PartitionSpec(None, *heads_spec(mesh, B, G, 2))
    specs = (PartitionSpec(None, *heads_spec(mesh, B, G, 1)), entries, rows_spec(mesh, B), PartitionSpec())

    def scattered(cache, new, first, layer):
        rows, positions = jnp.arange(new.shape[1])[:, None], first[:, None] + jnp.arange(new.shape[2])
        if n == 1:
            return cache.at[layer, rows, :, positions].set(new[0])
        layers = layer + jnp.arange(n)[:, None, None]
        return cache.at[layers, rows, :, positions].set(new)

    def row_by_row(cache, new, first, layer):  # a scatter would choose a layout that attention then has to turn
        new = jnp.moveaxis(new, 2, 3)
        for b in range(new.shape[1]):
            cache = lax.dynamic_update_slice(cache, new[:, b : b + 1], (layer, b, 0, first[b], 0))
        return cache

    def run(*arrays):
        return lax.platform_dependent(*arrays, tpu=row_by_row, default=scattered)

    return per_device(run, mesh, specs, specs[0])(cache, new, first, layer)


def in_range(start, stop, length: int) -> jax.Array:
    """Whether `start <= j < stop`: bool `[..., length]` of int `[...]`."""
    j = jnp.arange(length)
    return (j >= start[..., None]) & (j < stop[..., None])
