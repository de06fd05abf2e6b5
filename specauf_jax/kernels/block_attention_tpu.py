"""Block attention as Pallas kernels for TPU, one forward and one backward.

A step of the grid is one tile of anchors in one group of heads. A row's context of that group lies in VMEM,
fetched once for all tiles of anchors; a loop goes over the tiles of it that any slot sees, whose bounds wait
in scalar memory. The query heads of a group are folded into the tile. Scores are held transposed, keys along
sublanes and queries along lanes, so that ranges, maxima and sums are rows `[1, n]` of whole registers.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
CONTEXT_TILE = 256  # positions
_QUERIES = 1024  # of a tile, all heads of a group; more if fewer anchors do not fill the lanes
_MOST_QUERIES = 4096
_VMEM = 64 * 2**20  # of which the context may take half
_FLOOR = -1e30  # of the running maximum: finite, so that a query that sees nothing divides no infinities


def holds(q, k, v, context_k, context_v) -> bool:
    """Whether the kernels can hold arrays of these shapes: heads of whole lanes, and a row that fits in VMEM."""
    K, H, E = q.shape[2:]
    S, G = context_k.shape[1:3]
    context = S * E * (8 * context_k.dtype.itemsize + 8)  # keys, values, gradients, each twice; float32 sums
    return E % LANES == 0 and math.lcm(K, LANES) * H // G <= _MOST_QUERIES and context <= _VMEM // 2


def forward(q, k, v, context_k, context_v, ranges, *, interpret=False):
    """Mixed values and log-sum-exp, as `block_attention.with_gradient` wants them."""
    B, A, K, H, E = q.shape
    shapes = _Shapes(q, context_k)
    mixed, lse = pl.pallas_call(
        functools.partial(_forward_kernel, heads=shapes.r),
        out_shape=[
            jax.ShapeDtypeStruct((B, shapes.slots, H * E), q.dtype),
            jax.ShapeDtypeStruct((B, shapes.G, shapes.r, shapes.slots), jnp.float32),
        ],
        grid_spec=shapes.grid("ranges q own own context context", "q sums"),
        compiler_params=_PARAMS,
        interpret=interpret,
        name="block_attention_forward",
    )(*_bounds(ranges, shapes), *_flat(q, k, v, context_k, context_v, ranges, shapes))
    return mixed[:, : A * K].reshape(q.shape), _from_rows(lse, q.shape)


def backward(q, k, v, context_k, context_v, ranges, mixed, lse, cotangent, *, interpret=False):
    """Gradients of the five arrays, as `block_attention.with_gradient` wants them."""
    B, A, K, H, E = q.shape
    S, G = context_k.shape[1:3]
    shapes = _Shapes(q, context_k)
    widths = (shapes.slots, H), (shapes.slots, G), (shapes.slots, G), (shapes.S, G), (shapes.S, G)
    gradients = pl.pallas_call(
        functools.partial(_backward_kernel, heads=shapes.r),
        out_shape=[jax.ShapeDtypeStruct((B, length, heads * E), q.dtype) for length, heads in widths],
        grid_spec=shapes.grid(
            "ranges q own own context context q sums q",
            "q own own context context",
            scratch=[pltpu.VMEM((shapes.S, E), jnp.float32)] * 2,
        ),
        compiler_params=_PARAMS,
        interpret=interpret,
        name="block_attention_backward",
    )(
        *_bounds(ranges, shapes),
        *_flat(q, k, v, context_k, context_v, ranges, shapes),
        _filled(mixed.reshape(B, A * K, H * E), shapes.slots),
        _to_rows(lse, shapes),
        _filled(cotangent.reshape(B, A * K, H * E), shapes.slots),
    )
    own = [x[:, : A * K].reshape(like.shape) for x, like in zip(gradients[:3], (q, k, v), strict=True)]
    return *own, *(x[:, :S].reshape(context_k.shape) for x in gradients[3:])


# ---------------------------------------------------------------------------------------------
# Kernels. n queries of a tile: r heads times m slots, head by head


def _forward_kernel(first, last, ranges, q, k, v, context_k, context_v, mixed, lse, *, heads):
    q = _stacked(q[...], heads)
    from_context, to_context, from_own, to_own = _rows(ranges[...], heads)

    def absorb(state, keys, values, at, start, stop):
        """Running maximum and sum `[1, n]` and mixed values `[E, n]` with more keys in them."""
        peak, total, mixed = state
        scores = _scores(keys, q, at, start, stop)
        new = jnp.maximum(peak, scores.max(0, keepdims=True))
        powers, fade = jnp.exp(scores - new), jnp.exp(peak - new)
        total = fade * total + powers.sum(0, keepdims=True)
        return new, total, fade * mixed + _product(values, powers.astype(values.dtype), 0, 0)

    def context(i, state):
        tile = pl.ds(pl.multiple_of(i * CONTEXT_TILE, CONTEXT_TILE), CONTEXT_TILE)
        return absorb(state, context_k[tile], context_v[tile], i * CONTEXT_TILE, from_context, to_context)

    n, E = q.shape
    empty = jnp.full((1, n), _FLOOR, jnp.float32), jnp.zeros((1, n), jnp.float32), jnp.zeros((E, n), jnp.float32)
    state = absorb(empty, k[...], v[...], 0, from_own, to_own)
    row, tile = pl.program_id(0), pl.program_id(2)
    peak, total, sums = lax.fori_loop(first[row, tile], last[row, tile], context, state)
    total = jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
    mixed[...] = _beside((sums / total).T.astype(mixed.dtype), heads)
    lse[...] = (peak + jnp.log(total)).reshape(heads, -1)


def _backward_kernel(first, last, ranges, q, k, v, context_k, context_v, mixed, lse, cotangent, *rest, heads):
    dq, dk, dv, context_dk, context_dv, sum_k, sum_v = rest
    row, tile = pl.program_id(0), pl.program_id(2)
    q, mixed, cotangent = (_stacked(x[...], heads) for x in (q, mixed, cotangent))
    from_context, to_context, from_own, to_own = _rows(ranges[...], heads)
    lse = lse[...].reshape(1, -1)
    delta = (mixed.astype(jnp.float32) * cotangent).T.sum(0, keepdims=True)

    @pl.when(tile == 0)
    def _():
        sum_k[...] = jnp.zeros_like(sum_k)
        sum_v[...] = jnp.zeros_like(sum_v)

    def gradients(keys, values, at, start, stop):
        """Float32 gradients of q, keys and values, from probabilities computed anew."""
        probabilities = jnp.exp(_scores(keys, q, at, start, stop) - lse)
        slopes = probabilities * (_product(values, cotangent, 1, 1) - delta)
        slopes = (slopes * q.shape[1] ** -0.5).astype(q.dtype)
        dv = _product(probabilities.astype(q.dtype), cotangent, 1, 0)
        return _product(slopes, keys, 0, 0), _product(slopes, q, 1, 0), dv

    def context(i, sum_q):
        tile = pl.ds(pl.multiple_of(i * CONTEXT_TILE, CONTEXT_TILE), CONTEXT_TILE)
        more_q, more_k, more_v = gradients(context_k[tile], context_v[tile], i * CONTEXT_TILE, from_context, to_context)
        sum_k[tile] += more_k
        sum_v[tile] += more_v
        return sum_q + more_q

    sum_q, own_k, own_v = gradients(k[...], v[...], 0, from_own, to_own)
    dk[...], dv[...] = own_k.astype(dk.dtype), own_v.astype(dv.dtype)
    sum_q = lax.fori_loop(first[row, tile], last[row, tile], context, sum_q)
    dq[...] = _beside(sum_q.astype(dq.dtype), heads)

    @pl.when(tile == pl.num_programs(2) - 1)
    def _():
        context_dk[...], context_dv[...] = sum_k[...].astype(context_dk.dtype), sum_v[...].astype(context_dv.dtype)


def _scores(keys, q, at, start, stop):
    """Float32 `[keys, n]`, -inf out of sight; the first key has index `at`."""
    scores = _product(keys, q, 1, 1) * q.shape[1] ** -0.5
    j = at + lax.broadcasted_iota(jnp.int32, scores.shape, 0)
    return jnp.where((j >= start) & (j < stop), scores, -jnp.inf)


def _product(a, b, axis_a, axis_b):
    return lax.dot_general(a, b, (((axis_a,), (axis_b,)), ((), ())), preferred_element_type=jnp.float32)


def _stacked(x, heads):
    """`[m, heads·E]` → `[heads·m, E]`."""
    return jnp.concatenate(jnp.split(x, heads, axis=1), axis=0)


def _beside(x, heads):
    """`[heads·m, E]` → `[m, heads·E]`."""
    return jnp.concatenate(jnp.split(x, heads, axis=0), axis=1)


def _rows(x, heads):
    """Every row `[1, m]` of x for all heads, `[1, heads·m]`."""
    return [jnp.concatenate([row] * heads, axis=1) for row in jnp.split(x, x.shape[0], axis=0)]


# ---------------------------------------------------------------------------------------------
# Blocks and shapes in HBM


class _Shapes:
    """Sizes of a call, and the block of every kind of array that a step of the grid sees."""

    def __init__(self, q, context_k):
        self.B, A, self.K, H, self.E = q.shape
        S, self.G = context_k.shape[1:3]
        self.r = H // self.G
        least = math.lcm(self.K, LANES)
        self.m = least * max(1, _QUERIES // (self.r * least))  # slots of a tile: whole blocks in whole lanes
        self.slots, self.S = _up(A * self.K, self.m), _up(S, CONTEXT_TILE)
        self.tiles = self.slots // self.m

    def grid(self, inputs: str, outputs: str, scratch=()):
        """Grid over rows, groups and tiles of anchors, with the tiles' bounds in scalar memory."""
        blocks = {
            "ranges": pl.BlockSpec((None, 4, self.m), lambda b, g, i, *_: (b, 0, i)),
            "q": pl.BlockSpec((None, self.m, self.r * self.E), lambda b, g, i, *_: (b, i, g)),
            "own": pl.BlockSpec((None, self.m, self.E), lambda b, g, i, *_: (b, i, g)),
            "context": pl.BlockSpec((None, self.S, self.E), lambda b, g, i, *_: (b, 0, g)),
            "sums": pl.BlockSpec((None, None, self.r, self.m), lambda b, g, i, *_: (b, g, 0, i)),
        }
        return pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(self.B, self.G, self.tiles),
            in_specs=[blocks[name] for name in inputs.split()],
            out_specs=[blocks[name] for name in outputs.split()],
            scratch_shapes=list(scratch),
        )


_PARAMS = pltpu.CompilerParams(
    dimension_semantics=("parallel", "parallel", "arbitrary"),  # gradients of the context add up over the last
    vmem_limit_bytes=_VMEM,
)


def _bounds(ranges, shapes):
    """First tile of context that any slot of a tile sees, and the one behind the last, int32 `[B, tiles]` each."""
    start, stop = (_filled(ranges[:, :, i].reshape(shapes.B, -1), shapes.slots) for i in (0, 1))
    start, stop = (x.reshape(shapes.B, shapes.tiles, shapes.m) for x in (start, stop))
    seen = stop > start
    first = jnp.where(seen, start, shapes.S).min(-1) // CONTEXT_TILE
    return first, pl.cdiv(jnp.where(seen, stop, 0).max(-1), CONTEXT_TILE)


def _flat(q, k, v, context_k, context_v, ranges, shapes):
    """Arrays as the kernels take them: heads side by side, and filled up to whole tiles."""
    own_first = jnp.arange(shapes.slots, dtype=jnp.int32) // shapes.K * shapes.K % shapes.m  # in the tile
    ranges = _filled(ranges.swapaxes(1, 2).reshape(shapes.B, 4, -1), shapes.slots, axis=2)
    ranges = ranges + own_first * jnp.array([[0], [0], [1], [1]], jnp.int32)
    q, k, v, context_k, context_v = (x.reshape(shapes.B, -1, math.prod(x.shape[-2:])) for x in
                                     (q, k, v, context_k, context_v))  # fmt: skip
    own = [_filled(x, shapes.slots) for x in (q, k, v)]
    return ranges, *own, *(_filled(x, shapes.S) for x in (context_k, context_v))


def _to_rows(x, shapes):
    """`[B, A, K, H]` → `[B, G, r, slots]`."""
    x = x.reshape(shapes.B, -1, shapes.G, shapes.r)
    return _filled(x.transpose(0, 2, 3, 1), shapes.slots, axis=3)


def _from_rows(x, shape):
    """`[B, G, r, slots]` → `[B, A, K, H]`."""
    B, A, K, H, _ = shape
    return x[..., : A * K].transpose(0, 3, 1, 2).reshape(B, A, K, H)


def _filled(x, length: int, axis: int = 1):
    """Zeros behind x up to a length; slots of zeros see nothing."""
    return jnp.pad(x, [(0, length - n if at == axis else 0) for at, n in enumerate(x.shape)])


def _up(n: int, step: int) -> int:
    return -(-n // step) * step
