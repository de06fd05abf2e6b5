"""Cross-entropy through the LM head without ever holding the logits of all slots.

Training's head is frozen: its gradient is asked for by nobody, and that of the hidden states is a product with the very
probabilities that the loss has just made. `frozen_head_cross_entropy` computes it there, so that a slot costs two
products with the head (recomputing the logits for the backward pass makes three), and does neither for slots behind
a block's first failure where the objective has no use for them.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from specauf_jax.kernels.chunks import map_chunks
from specauf_jax.objectives import LabelScores, label_scores, scores_and_probabilities
from specauf_jax.sharding import batch_shards, mesh_of, per_device, rows_spec, vocabulary_spec


@jax.named_scope("lm_head")
def chunked_scores(logits: Callable, arrays: tuple, labels: jax.Array, *, chunk: int):
    """`label_scores` of the logits that `logits` makes, a chunk of slots at a time; for heads that train.

    Args:
      logits: (arrays `[B, n, ...]`) → float32 logits `[B, n, V]`, or a dict of such (one for each branch).
      arrays: `[B, ..., D]` each, with the slots of `labels` between.
      labels: int32 `[B, ...]`.
      chunk: slots whose logits exist at one time, of every device.

    Returns:
      LabelScores of labels' shape, or a dict of them.
    """

    def one(labels, *arrays):
        return jax.tree.map(lambda x: label_scores(x, labels), logits(*arrays))

    flat = [x.reshape(len(x), -1, *x.shape[labels.ndim :]) for x in (labels, *arrays)]
    return jax.tree.map(lambda x: x.reshape(labels.shape), map_chunks(one, _of_each_row(chunk, labels), *flat))


@jax.named_scope("lm_head")
def frozen_head_cross_entropy(
    hidden: jax.Array, lm_head: jax.Array, labels: jax.Array, valid: jax.Array, *, chunk: int, stop: int | None = None
) -> LabelScores:
    """`label_scores` of blocks of slots, differentiable in `hidden` alone.

    With `stop`, of every block only the slots up to and including its first failure: those behind it are not computed
    (cross-entropy 0, a rank beyond V), as an accept-until-fail support gives them no weight.

    Args:
      hidden: `[B, A, N, D]`.
      lm_head: `[D, V]`.
      labels: int32 `[B, A, N]`.
      valid: bool `[B, A, N]`, v_k.
      chunk: slots whose logits exist at one time, of every device.
      stop: a slot fails if it is not valid, or its label not among the drafter's `stop` best tokens; None computes
        all slots.

    Returns:
      LabelScores of `[B, A, N]`.
    """
    hidden, lm_head, labels, valid = map(jnp.asarray, (hidden, lm_head, labels, valid))
    if stop is None:
        flat = hidden.reshape(hidden.shape[0], -1, hidden.shape[-1])
        found = _all_slots(_of_each_row(chunk, labels), flat, lm_head, labels.reshape(flat.shape[:2]))
    else:
        found = _until_failure(chunk, stop, hidden, lm_head, labels, valid)
    return LabelScores(*(x.reshape(labels.shape) for x in found))


def project(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """`[..., D]` by `[D, V]` → float32 `[..., V]`."""
    return jnp.einsum("...d,dv->...v", x, matrix, preferred_element_type=jnp.float32)


def _of_each_row(chunk: int, rows: jax.Array) -> int:
    """Slots of each row that together are a device's chunk."""
    mesh, count = mesh_of(rows), len(rows)
    shards = 1 if mesh is None or count % batch_shards(mesh) else batch_shards(mesh)
    return max(1, chunk * shards // count)


def _scaled(unit_gradient, cotangents):
    """The backward pass of both forms: no head, no logits."""
    return (cotangents[0][..., None] * unit_gradient).astype(unit_gradient.dtype)


# ---------------------------------------------------------------------------------------------
# All slots, in order


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _all_slots(size, hidden, lm_head, labels):
    return tuple(map_chunks(lambda x, labels: label_scores(project(x, lm_head), labels), size, hidden, labels))


def _all_slots_forward(size, hidden, lm_head, labels):
    def one(hidden, labels):
        return _slots(hidden, lm_head, labels, gradient=True)

    *seen, unit_gradient = map_chunks(one, size, hidden, labels)
    return tuple(seen), unit_gradient


_all_slots.defvjp(_all_slots_forward, lambda size, unit, cotangents: (_scaled(unit, cotangents), None, None))


# ---------------------------------------------------------------------------------------------
# Slots up to the first failure


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _until_failure(chunk, stop, hidden, lm_head, labels, valid):
    return _walk(chunk, stop, hidden, lm_head, labels, valid, gradient=False)


def _until_failure_forward(chunk, stop, *arrays):
    *seen, unit_gradient = _walk(chunk, stop, *arrays, gradient=True)
    return tuple(seen), unit_gradient


_until_failure.defvjp(
    _until_failure_forward, lambda chunk, stop, unit, cotangents: (_scaled(unit, cotangents), None, None, None)
)


def _walk(chunk: int, stop: int, hidden, lm_head, labels, valid, *, gradient: bool):
    """Every device walks the blocks of its own rows, with its own part of the vocabulary."""
    mesh = mesh_of(hidden)
    rows, columns = rows_spec(mesh, len(labels)), vocabulary_spec(mesh, lm_head.shape[1])

    def local(hidden, lm_head, labels, valid):
        blocks = (x.reshape(-1, *x.shape[2:]) for x in (hidden, labels, valid))
        found = _walk_blocks(chunk, stop, *blocks, lm_head, columns[1], gradient)
        return tuple(x.reshape(*hidden.shape[:2], *x.shape[1:]) for x in found)

    spread = per_device(local, mesh, (rows, columns, rows, rows), (rows,) * (3 if gradient else 2))
    return spread(hidden, lm_head, labels, valid)


def _walk_blocks(chunk: int, stop: int, hidden, labels, valid, lm_head, vocabulary_axis, gradient: bool):
    """Cross-entropy and rank (and the gradient) of the slots of R blocks up to their first failure.

    Each round gives every one of `chunk` lanes a slot: the next slot of the first `chunk` blocks that still live or,
    where fewer live, the next few slots of each. A slot that stands behind a failure of its own round is computed and
    dropped. The data decide how many rounds there are. Four blocks a to d in four lanes, x for a failure:

        round 1   a1 b1 c1x d1     four live: one slot of each
        round 2   a2 b2 d2x        three live: width 1, one lane idle
        round 3   a3 a4 b3x b4     two live: width 2; b4 is dropped
        round 4   a5 a6 a7 a8      one lives: width 4

    Args:
      hidden: `[R, N, D]`.
      labels, valid: `[R, N]`.
      lm_head: `[D, V]`, or this device's columns of it.
      Others as for `frozen_head_cross_entropy` and `_slots`.

    Returns:
      float32 `[R, N]`, int32 `[R, N]` and, with `gradient`, `[R, N, D]`.
    """
    R, N = labels.shape
    chunk = min(chunk, R)  # so that never more is computed than all slots
    lane = jnp.arange(chunk)

    def one_round(state):
        alive, following, found = state
        width = jnp.clip(chunk // jnp.maximum(alive.sum(), 1), 1, N)  # slots of each block
        taken = jnp.nonzero(alive, size=chunk, fill_value=R)[0]
        block, offset = taken[lane // width], lane % width
        slot = following[block] + offset
        inside = (block < R) & (slot < N)
        at = (jnp.where(inside, block, R), slot)
        ce, rank, *rest = _slots(hidden[at], lm_head, labels[at], vocabulary_axis=vocabulary_axis, gradient=gradient)
        success = inside & valid[at] & (rank < stop)
        failures = jnp.cumsum(~success) - ~success  # before this lane
        reached = inside & (failures == failures[lane - offset])
        at = (jnp.where(reached, block, R), slot)
        found = tuple(x.at[at].set(new, mode="drop") for x, new in zip(found, (ce, rank, *rest), strict=True))
        following = following.at[taken].add(width, mode="drop")
        alive = alive.at[block].min(success, mode="drop") & (following < N)
        return alive, following, found

    found: tuple[jax.Array, ...] = (jnp.zeros((R, N), jnp.float32), jnp.full((R, N), jnp.iinfo(jnp.int32).max))
    found += (jnp.zeros_like(hidden),) if gradient else ()
    start = valid[:, 0], jnp.zeros(R, jnp.int32), found
    return lax.while_loop(lambda state: state[0].any(), one_round, start)[-1]


def _slots(hidden, lm_head, labels, *, gradient: bool, vocabulary_axis: str | None = None):
    """Cross-entropy `[...]`, rank `[...]` and, if asked for, d cross-entropy / d hidden `[..., D]` of single slots.

    Args:
      hidden: `[..., D]`.
      lm_head: `[D, V]`, or this device's columns of it.
      labels: int `[...]`.
      vocabulary_axis: mesh axis over which V is spread, in a manual region; None where it is whole.
    """
    scores, probability, is_label = scores_and_probabilities(project(hidden, lm_head), labels, vocabulary_axis)
    if not gradient:
        return scores
    slope = (probability - is_label).astype(lm_head.dtype)
    pulled = jnp.einsum("...v,dv->...d", slope, lm_head, preferred_element_type=jnp.float32)
    pulled = pulled if vocabulary_axis is None else lax.psum(pulled, vocabulary_axis)
    return *scores, pulled.astype(hidden.dtype)
