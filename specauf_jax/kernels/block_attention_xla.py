"""Block attention as loops over tiles of anchors and of context, for every platform that XLA knows.

Passes over a row: an outer scan over tiles of anchors, an inner loop over the tiles of context that any of
their slots sees. The inner loop's bounds are data, so that it does no work for the rest of the row.
"""

import jax
import jax.numpy as jnp
from jax import lax

TILE_SLOTS = 256  # of a tile of anchors, at most
CONTEXT_TILE = 128  # positions, at most
FLOOR = -1e30  # of the running maximum: finite, so that a query that sees nothing divides no infinities


def forward(q, k, v, context_k, context_v, ranges):
    """Mixed values and log-sum-exp, as `block_attention.with_gradient` wants them."""
    A, S = q.shape[1], context_k.shape[1]

    def row(arrays):
        q, k, v, context_k, context_v, ranges = arrays
        keys, values = _context(context_k), _context(context_v)

        def tile(_, arrays):
            q, k, v, ranges = arrays
            return None, _forward_tile(q, k, v, keys, values, ranges, S)

        _, results = lax.scan(tile, None, tuple(_tiles(x, q.shape[1]) for x in (q, k, v, ranges)))
        return jax.tree.map(lambda x: _untiled(x, A), results)

    return lax.map(row, (q, k, v, context_k, context_v, ranges))


def backward(q, k, v, context_k, context_v, ranges, mixed, lse, cotangent):
    """Gradients of the five arrays, as `block_attention.with_gradient` wants them."""
    A, S = q.shape[1], context_k.shape[1]

    def row(arrays):
        q, k, v, context_k, context_v, ranges, *others = arrays
        keys, values = _context(context_k), _context(context_v)

        def tile(sums, arrays):
            return _backward_tile(*arrays, keys, values, sums, S)

        zeros = jnp.zeros(keys.shape, jnp.float32), jnp.zeros(keys.shape, jnp.float32)
        sums, results = lax.scan(tile, zeros, tuple(_tiles(x, q.shape[1]) for x in (q, k, v, ranges, *others)))
        context = [jnp.moveaxis(x[:, :S], 0, 1).astype(context_k.dtype) for x in sums]
        return *(_untiled(x, A) for x in results), *context

    return lax.map(row, (q, k, v, context_k, context_v, ranges, mixed, lse, cotangent))


def _forward_tile(q, k, v, keys, values, ranges, S):
    """A tile of anchors over all that it sees.

    Args:
      q: `[a, K, H, E]`; k, v: `[a, K, G, E]`; ranges: `[a, 4, K]`.
      keys, values: `[G, S', E]`, S' whole tiles.
      S: positions of the row, before filling up.
    """
    G, shape = k.shape[2], q.shape
    start, stop, first, last = _of_queries(ranges, shape[2] // G)
    q = _queries(q, G)
    empty = jnp.full(q.shape[:-1], FLOOR), jnp.zeros(q.shape[:-1]), jnp.zeros(q.shape, jnp.float32)
    visible = _in_range(jnp.arange(k.shape[1]), first, last)
    state = absorb(empty, q, _own(k), _own(v), visible)
    state, q = jax.tree.map(_flat, (state, q))

    def context(i, state):
        j, keys_i, values_i = _context_tile(i, keys, values)
        return absorb(state, q, keys_i, values_i, _in_range(j, start.reshape(-1), stop.reshape(-1)))

    peak, total, mixed = lax.fori_loop(*_bounds(ranges, S), context, state)
    total = jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
    mixed, lse = (mixed / total[..., None]).astype(v.dtype), peak + jnp.log(total)
    return _ungrouped(mixed, shape), _ungrouped(lse, shape[:-1])


def _backward_tile(q, k, v, ranges, mixed, lse, cotangent, keys, values, sums, S):
    """Adds a tile's gradients of context keys and values to `sums`; returns those of q, k and v."""
    G, shape, dtype = k.shape[2], q.shape, q.dtype
    start, stop, first, last = _of_queries(ranges, shape[2] // G)
    q, mixed, cotangent = (_queries(x, G) for x in (q, mixed, cotangent))
    delta = _product("...e,...e->...", mixed, cotangent)
    queries = q, cotangent, _queries(lse[..., None], G)[..., 0], delta
    visible = _in_range(jnp.arange(k.shape[1]), first, last)
    dq, dk, dv = _gradients(*queries, _own(k), _own(v), visible)
    queries = tuple(map(_flat, queries))

    def context(i, carry):
        dq, sum_k, sum_v = carry
        j, keys_i, values_i = _context_tile(i, keys, values)
        visible = _in_range(j, start.reshape(-1), stop.reshape(-1))
        more, dk, dv = _gradients(*queries, keys_i, values_i, visible)
        return dq + more, _add(sum_k, dk, i), _add(sum_v, dv, i)

    dq, *sums = lax.fori_loop(*_bounds(ranges, S), context, (_flat(dq), *sums))
    dk, dv = (jnp.moveaxis(x, 0, 2).astype(dtype) for x in (dk, dv))
    return tuple(sums), (_ungrouped(dq, shape).astype(dtype), dk, dv)


# ---------------------------------------------------------------------------------------------
# Softmax, a tile at a time. Queries `[..., m, E]`, keys and values `[..., n, E]`, visible `[..., m, n]`


def absorb(state, q, keys, values, visible):
    """Running maximum, sum `[..., m]` and mixed values `[..., m, E]`, all float32, with more keys in them."""
    peak, total, mixed = state
    scores = _scores(q, keys, visible)
    new = jnp.maximum(peak, scores.max(-1))
    powers, fade = jnp.exp(scores - new[..., None]), jnp.exp(peak - new)
    more = _product("...mn,...ne->...me", powers.astype(values.dtype), values)
    return new, fade * total + powers.sum(-1), fade[..., None] * mixed + more


def _gradients(q, cotangent, lse, delta, keys, values, visible):
    """Float32 gradients of q, keys and values, from probabilities computed anew.

    Args: lse, delta: float32 `[..., m]`, log-sum-exp of a query's scores, and mixed values · cotangent.
    """
    probabilities = jnp.exp(_scores(q, keys, visible) - lse[..., None])
    slopes = _product("...me,...ne->...mn", cotangent, values) - delta[..., None]
    slopes = (probabilities * slopes * q.shape[-1] ** -0.5).astype(q.dtype)
    return (
        _product("...mn,...ne->...me", slopes, keys),
        _product("...mn,...me->...ne", slopes, q),
        _product("...mn,...me->...ne", probabilities.astype(q.dtype), cotangent),
    )


def _scores(q, keys, visible):
    scores = _product("...me,...ne->...mn", q, keys) * q.shape[-1] ** -0.5
    return jnp.where(visible, scores, -jnp.inf)


def _product(equation, a, b):
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


# ---------------------------------------------------------------------------------------------
# Tiles and shapes


def _even(length: int, most: int) -> int:
    """Size of the fewest tiles of at most `most` that hold `length`, with little to fill up."""
    return -(-length // -(-length // most))


def _tiles(x, slots: int):
    """`[A, ...]` → `[tiles, a, ...]`; anchors that fill the last tile up see nothing."""
    a = _even(x.shape[0], max(1, TILE_SLOTS // slots))
    x = jnp.pad(x, [(0, -x.shape[0] % a)] + [(0, 0)] * (x.ndim - 1))
    return x.reshape(-1, a, *x.shape[1:])


def _untiled(x, A):
    return x.reshape(-1, *x.shape[2:])[:A]


def _context(x):
    """`[S, G, E]` → `[G, S', E]`, filled up to whole tiles."""
    return jnp.moveaxis(jnp.pad(x, ((0, -x.shape[0] % _even(x.shape[0], CONTEXT_TILE)), (0, 0), (0, 0))), 1, 0)


def _bounds(ranges, S):
    """First tile of context that any slot sees, and the one behind the last; an empty loop if there is none."""
    size = _even(S, CONTEXT_TILE)
    start, stop = ranges[:, 0], ranges[:, 1]
    seen = stop > start
    return jnp.where(seen, start, S).min() // size, -(-jnp.where(seen, stop, 0).max() // size)


def _context_tile(i, keys, values):
    """Indices, keys and values of tile i."""
    size = _even(keys.shape[1], CONTEXT_TILE)
    cut = [lax.dynamic_slice_in_dim(x, i * size, size, axis=1) for x in (keys, values)]
    return i * size + jnp.arange(size), *cut


def _add(sums, more, i):
    at, size = i * more.shape[1], more.shape[1]
    more += lax.dynamic_slice_in_dim(sums, at, size, axis=1)
    return lax.dynamic_update_slice_in_dim(sums, more, at, axis=1)


def _of_queries(ranges, r):
    """`[a, 4, K]` → four of `[a, K·r]`, in the order of `_queries`."""
    return jnp.moveaxis(jnp.repeat(ranges, r, axis=2), 1, 0)


def _in_range(j, start, stop):
    return (j >= start[..., None]) & (j < stop[..., None])


def _queries(x, G):
    """`[a, K, G·r, E]` → `[G, a, K·r, E]`: the queries of a group share its keys."""
    a, K, H, E = x.shape
    return x.reshape(a, K, G, H // G, E).transpose(2, 0, 1, 3, 4).reshape(G, a, K * H // G, E)


def _own(x):
    """`[a, K, G, E]` → `[G, a, K, E]`."""
    return jnp.moveaxis(x, 2, 0)


def _flat(x):
    """`[G, a, n, ...]` → `[G, a·n, ...]`."""
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _ungrouped(x, shape):
    """`[G, a·K·r, ...]` → `shape`, `[a, K, G·r, ...]`."""
    a, K, H, *rest = shape
    G = x.shape[0]
    return jnp.moveaxis(x.reshape(G, a, K, H // G, *rest), 0, 2).reshape(shape)
