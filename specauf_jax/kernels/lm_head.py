"""Losses through the LM head without ever holding the logits of all slots.

Training's head is frozen: its gradient is asked for by nobody, and that of the hidden states is a product with the very
probabilities that the loss has just made. `frozen_head_scores` computes it there, so that a slot costs two products
with the head (recomputing the logits for the backward pass makes three), a third one where the loss compares with the
target's distribution, and none behind a block's stop where the objective has no use for it.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from specauf_jax.config import Objective
from specauf_jax.kernels.chunks import map_chunks
from specauf_jax.objectives import HARD, LabelScores, Scores, SoftScores, scores_and_slope
from specauf_jax.sharding import batch_shards, mesh_of, per_device, rows_spec, vocabulary_spec


@jax.named_scope("lm_head")
def chunked_scores(scores: Callable, arrays: tuple, *, chunk: int):
    """Scores of slots, a chunk at a time; for heads that train.

    Args:
      scores: (arrays `[B, n, ...]`) → LabelScores or SoftScores of `[B, n]`, or a dict of such (one for each branch).
      arrays: `[B, ..., D]` or `[B, ...]` each, with the same slots between; the first one without D, as labels are.
      chunk: slots whose logits exist at one time, of every device.

    Returns:
      What `scores` gives, of `[B, ...]`.
    """
    slots = arrays[0].shape
    flat = [x.reshape(len(x), -1, *x.shape[len(slots) :]) for x in arrays]
    return jax.tree.map(lambda x: x.reshape(slots), map_chunks(scores, _of_each_row(chunk, arrays[0]), *flat))


@jax.named_scope("lm_head")
def frozen_head_scores(
    hidden: jax.Array,
    lm_head: jax.Array,
    labels: jax.Array,
    valid: jax.Array,
    *,
    chunk: int,
    objective: Objective = HARD,
    target_hidden: jax.Array | None = None,
    skip: bool = True,
) -> Scores:
    """`label_scores` of blocks of slots; their loss is differentiable, in `hidden` alone.

    Under an objective that stops (`Objective.skips`), of every block only the slots up to its stop: those behind it are
    not computed (loss 0, a rank beyond V), as the objective gives them no weight.

    Args:
      hidden: `[B, A, N, D]`.
      lm_head: `[D, V]`.
      labels: int32 `[B, A, N]`.
      valid: bool `[B, A, N]`, v_k.
      chunk: slots whose logits exist at one time, of every device.
      objective: its loss, and where a block stops.
      target_hidden: `[B, A, N, D]`, of the target, final-normed, where it predicts the same tokens; for soft losses.
      skip: False computes all slots.

    Returns:
      LabelScores, or SoftScores where the objective is `soft`, of `[B, A, N]`.
    """
    hidden, lm_head, labels, valid = map(jnp.asarray, (hidden, lm_head, labels, valid))
    states = (hidden, jnp.asarray(target_hidden)) if objective.soft else (hidden,)
    if objective.skips and skip:
        found = _until_stop(chunk, objective, states, lm_head, labels, valid)
    else:
        flat = tuple(x.reshape(len(x), -1, x.shape[-1]) for x in states)
        found = _all_slots(_of_each_row(chunk, labels), objective, flat, lm_head, labels.reshape(flat[0].shape[:2]))
    return _type(objective)(*(x.reshape(labels.shape) for x in found))


def project(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """`[..., D]` by `[D, V]` → float32 `[..., V]`."""
    return jnp.einsum("...d,dv->...v", x, matrix, preferred_element_type=jnp.float32)


def _of_each_row(chunk: int, rows: jax.Array) -> int:
    """Slots of each row that together are a device's chunk."""
    mesh, count = mesh_of(rows), len(rows)
    shards = 1 if mesh is None or count % batch_shards(mesh) else batch_shards(mesh)
    return max(1, chunk * shards // count)


def _type(objective: Objective) -> type[LabelScores] | type[SoftScores]:
    return SoftScores if objective.soft else LabelScores


def _scaled(saved, cotangents):
    """The backward pass of both forms: no head, no logits. Only the loss, which stands first, is differentiated."""
    unit_gradient, others = saved
    return ((cotangents[0][..., None] * unit_gradient).astype(unit_gradient.dtype), *others)


# ---------------------------------------------------------------------------------------------
# All slots, in order


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _all_slots(size, objective, states, lm_head, labels):
    def one(labels, *states):
        return _slots(objective, states, lm_head, labels, gradient=False)

    return tuple(map_chunks(one, size, labels, *states))


def _all_slots_forward(size, objective, states, lm_head, labels):
    def one(labels, *states):
        return _slots(objective, states, lm_head, labels, gradient=True)

    *seen, unit_gradient = map_chunks(one, size, labels, *states)
    return tuple(seen), (unit_gradient, (None,) * (len(states) - 1))


def _all_slots_backward(size, objective, saved, cotangents):
    return _scaled(saved, cotangents), None, None


_all_slots.defvjp(_all_slots_forward, _all_slots_backward)


# ---------------------------------------------------------------------------------------------
# Slots up to a block's stop


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _until_stop(chunk, objective, states, lm_head, labels, valid):
    return _walk(chunk, objective, states, lm_head, labels, valid, gradient=False)


def _until_stop_forward(chunk, objective, states, *arrays):
    *seen, unit_gradient = _walk(chunk, objective, states, *arrays, gradient=True)
    return tuple(seen), (unit_gradient, (None,) * (len(states) - 1))


def _until_stop_backward(chunk, objective, saved, cotangents):
    return _scaled(saved, cotangents), None, None, None


_until_stop.defvjp(_until_stop_forward, _until_stop_backward)


def _walk(chunk: int, objective: Objective, states: tuple, lm_head, labels, valid, *, gradient: bool):
    """Every device walks the blocks of its own rows, with its own part of the vocabulary."""
    mesh = mesh_of(states[0])
    rows, columns = rows_spec(mesh, len(labels)), vocabulary_spec(mesh, lm_head.shape[1])

    def local(states, lm_head, labels, valid):
        *blocks, labels_, valid_ = (x.reshape(-1, *x.shape[2:]) for x in (*states, labels, valid))
        found = _walk_blocks(chunk, objective, tuple(blocks), labels_, valid_, lm_head, columns[1], gradient)
        return tuple(x.reshape(*labels.shape[:2], *x.shape[1:]) for x in found)

    count = len(_type(objective)._fields) + gradient
    spread = per_device(local, mesh, ((rows,) * len(states), columns, rows, rows), (rows,) * count)
    return spread(states, lm_head, labels, valid)


def _walk_blocks(chunk, objective: Objective, states: tuple, labels, valid, lm_head, vocabulary_axis, gradient: bool):
    """Scores (and the gradient) of the slots of R blocks up to their stop, the n-th failure.

    Each round gives every one of `chunk` lanes a slot: the next slot of the first `chunk` blocks that still live or,
    where fewer live, the next few slots of each. A slot that stands behind a stop of its own round is computed and
    dropped. The data decide how many rounds there are. Four blocks a to d in four lanes, x for a failure, n = 1:

        round 1   a1 b1 c1x d1     four live: one slot of each
        round 2   a2 b2 d2x        three live: width 1, one lane idle
        round 3   a3 a4 b3x b4     two live: width 2; b4 is dropped
        round 4   a5 a6 a7 a8      one lives: width 4

    Args:
      states: `[R, N, D]` each.
      labels, valid: `[R, N]`.
      lm_head: `[D, V]`, or this device's columns of it.
      Others as for `frozen_head_scores` and `_slots`.

    Returns:
      `[R, N]` of each field of the scores and, with `gradient`, `[R, N, D]`.
    """
    R, N = labels.shape
    chunk = min(chunk, R)  # so that never more is computed than all slots
    lane = jnp.arange(chunk)
    limit = objective.failures

    def one_round(state):
        failed, following, found = state
        alive = (failed < limit) & (following < N)
        width = jnp.clip(chunk // jnp.maximum(alive.sum(), 1), 1, N)  # slots of each block
        taken = jnp.nonzero(alive, size=chunk, fill_value=R)[0]
        block, offset = taken[lane // width], lane % width
        slot = following[block] + offset
        inside = (block < R) & (slot < N)
        at = (jnp.where(inside, block, R), slot)
        new = _slots(
            objective, tuple(x[at] for x in states), lm_head, labels[at],
            vocabulary_axis=vocabulary_axis, gradient=gradient,
        )  # fmt: skip
        rank = new[_type(objective)._fields.index("rank")]
        # Nothing lives behind a slot that is not valid: it counts as all failures.
        costs = jnp.where(valid[at], rank >= objective.stop, limit) * inside
        before = jnp.cumsum(costs) - costs
        reached = inside & (failed[block] + before - before[lane - offset] < limit)
        at = (jnp.where(reached, block, R), slot)
        found = tuple(x.at[at].set(value, mode="drop") for x, value in zip(found, new, strict=True))
        failed = failed.at[at[0]].add(costs, mode="drop")
        following = following.at[taken].add(width, mode="drop")
        return failed, following, found

    kinds = {"rank": jnp.full((R, N), jnp.iinfo(jnp.int32).max)}
    found = tuple(kinds.get(name, jnp.zeros((R, N), jnp.float32)) for name in _type(objective)._fields)
    found += (jnp.zeros_like(states[0]),) if gradient else ()
    start = jnp.where(valid[:, 0], 0, limit), jnp.zeros(R, jnp.int32), found

    def lives(state):
        failed, following, _ = state
        return ((failed < limit) & (following < N)).any()

    return lax.while_loop(lives, one_round, start)[-1]


def _slots(objective: Objective, states: tuple, lm_head, labels, *, gradient: bool, vocabulary_axis: str | None = None):
    """Scores `[...]` and, if asked for, d loss / d hidden `[..., D]` of single slots.

    Args:
      states: hidden `[..., D]`, and the target's where the objective is soft.
      lm_head: `[D, V]`, or this device's columns of it.
      labels: int `[...]`.
      vocabulary_axis: mesh axis over which V is spread, in a manual region; None where it is whole.
    """
    logits, *target_logits = project(jnp.stack(states), lm_head)  # which is read once
    target = target_logits[0] if objective.soft else None
    scores, slope = scores_and_slope(logits, labels, target, objective, vocabulary_axis)
    if not gradient:
        return scores
    pulled = jnp.einsum("...v,dv->...d", slope.astype(lm_head.dtype), lm_head, preferred_element_type=jnp.float32)
    pulled = pulled if vocabulary_axis is None else lax.psum(pulled, vocabulary_axis)
    return *scores, pulled.astype(states[0].dtype)
