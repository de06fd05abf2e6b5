"""Cross-entropy through the LM head without ever holding the logits of all slots.

Training's head is frozen: its gradient is asked for by nobody, and that of the hidden states is a product with the very
probabilities that the loss has just made. `frozen_head_cross_entropy` computes it there, so that a slot costs two
products with the head (recomputing the logits for the backward pass makes three), and does neither for slots behind
a block's first failure where the objective has no use for them.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from specauf_jax.kernels.chunks import map_chunks
from specauf_jax.objectives import cross_entropy_and_rank
from specauf_jax.sharding import mesh_of, per_device, rows_spec, vocabulary_spec


def lm_head_cross_entropy(
    hidden: jax.Array, lm_head: jax.Array, labels: jax.Array, *, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """`cross_entropy_and_rank` of `hidden @ lm_head`, `chunk` entries of axis 1 at a time; for a head that trains.

    Args:
      hidden: `[B, T, D]`.
      lm_head: `[D, V]`.
      labels: int `[B, T]`.
      chunk: entries of axis 1 whose logits exist at one time.

    Returns:
      float32 and int32 `[B, T]`.
    """

    def one(hidden, labels):
        return cross_entropy_and_rank(_logits(hidden, lm_head), labels)

    return map_chunks(one, chunk, hidden, labels)


def corrected_cross_entropy(hidden, features, lm_head, up, labels, *, chunk: int):
    """Both branches of Domino with one product through the LM head.

    Args:
      hidden: `[B, A, N, D]`.
      features: `[B, A, N, emb_dim]`, of `specauf_jax.models.domino.correction_features`.
      lm_head: `[D, V]`.
      up: `[emb_dim, V]`.
      labels: int32 `[B, A, N]`.
      chunk: slots of every row whose logits exist at one time.

    Returns:
      (cross-entropy, rank), float32 and int32 `[B, A, N]`, of the base, `hidden @ lm_head`, and of the final logits,
      base + `features @ up`.
    """

    def one(hidden, features, labels):
        base = _logits(hidden, lm_head)
        final = base + _logits(features, up)
        return cross_entropy_and_rank(base, labels), cross_entropy_and_rank(final, labels)

    flat = map_chunks(one, chunk, *(x.reshape(len(x), -1, *x.shape[3:]) for x in (hidden, features, labels)))
    return jax.tree.map(lambda x: x.reshape(labels.shape), flat)


def frozen_head_cross_entropy(
    hidden: jax.Array, lm_head: jax.Array, labels: jax.Array, valid: jax.Array, *, chunk: int, top_n: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """`cross_entropy_and_rank` of blocks of slots, differentiable in `hidden` alone.

    With `top_n`, of every block only the slots up to and including its first failure: those behind it are not computed
    (cross-entropy 0, a rank beyond V), as an accept-until-fail support gives them no weight.

    Args:
      hidden: `[B, A, N, D]`.
      lm_head: `[D, V]`.
      labels: int32 `[B, A, N]`.
      valid: bool `[B, A, N]`, v_k.
      chunk: slots whose logits exist at one time, of every device.
      top_n: a slot fails if it is not valid, or its label not among the drafter's `top_n` best tokens; None computes
        all slots.

    Returns:
      float32 and int32 `[B, A, N]`.
    """
    hidden, lm_head, labels, valid = map(jnp.asarray, (hidden, lm_head, labels, valid))
    if top_n is None:
        flat = hidden.reshape(hidden.shape[0], -1, hidden.shape[-1])
        ce, rank = _all_slots(chunk, flat, lm_head, labels.reshape(flat.shape[:2]))
        return ce.reshape(labels.shape), rank.reshape(labels.shape)
    return _until_failure(chunk, top_n, hidden, lm_head, labels, valid)


def _logits(x, matrix):
    return jnp.einsum("...d,dv->...v", x, matrix, preferred_element_type=jnp.float32)


def _scaled(unit_gradient, cotangents):
    """The backward pass of both forms: no head, no logits."""
    return (cotangents[0][..., None] * unit_gradient).astype(unit_gradient.dtype)


# ---------------------------------------------------------------------------------------------
# All slots, in order


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _all_slots(chunk, hidden, lm_head, labels):
    return lm_head_cross_entropy(hidden, lm_head, labels, chunk=chunk)


def _all_slots_forward(chunk, hidden, lm_head, labels):
    def one(hidden, labels):
        return _slots(hidden, lm_head, labels, gradient=True)

    *seen, unit_gradient = map_chunks(one, chunk, hidden, labels)
    return tuple(seen), unit_gradient


_all_slots.defvjp(_all_slots_forward, lambda chunk, unit, cotangents: (_scaled(unit, cotangents), None, None))


# ---------------------------------------------------------------------------------------------
# Slots up to the first failure


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _until_failure(chunk, top_n, hidden, lm_head, labels, valid):
    return _walk(chunk, top_n, hidden, lm_head, labels, valid, gradient=False)


def _until_failure_forward(chunk, top_n, *arrays):
    *seen, unit_gradient = _walk(chunk, top_n, *arrays, gradient=True)
    return tuple(seen), unit_gradient


_until_failure.defvjp(
    _until_failure_forward, lambda chunk, top_n, unit, cotangents: (_scaled(unit, cotangents), None, None, None)
)


def _walk(chunk: int, top_n: int, hidden, lm_head, labels, valid, *, gradient: bool):
    """Every device walks the blocks of its own rows, with its own part of the vocabulary."""
    mesh = mesh_of(hidden)
    rows, columns = rows_spec(mesh, len(labels)), vocabulary_spec(mesh, lm_head.shape[1])

    def local(hidden, lm_head, labels, valid):
        blocks = (x.reshape(-1, *x.shape[2:]) for x in (hidden, labels, valid))
        found = _walk_blocks(chunk, top_n, *blocks, lm_head, columns[1], gradient)
        return tuple(x.reshape(*hidden.shape[:2], *x.shape[1:]) for x in found)

    spread = per_device(local, mesh, (rows, columns, rows, rows), (rows,) * (3 if gradient else 2))
    return spread(hidden, lm_head, labels, valid)


def _walk_blocks(chunk: int, top_n: int, hidden, labels, valid, lm_head, vocabulary_axis, gradient: bool):
    """Cross-entropy and rank (and the gradient) of the slots of R blocks `[R, N]` up to their first failure.

    Each round takes the next slot of the first `chunk` blocks that still live; when fewer live, the next few slots of
    each, so that a round is full to the end. How many rounds there are is the data's.
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
        success = inside & valid[at] & (rank < top_n)
        failures = jnp.cumsum(~success) - ~success  # before this lane
        reached = inside & (failures == failures[lane - offset])
        at = (jnp.where(reached, block, R), slot)
        found = tuple(x.at[at].set(new, mode="drop") for x, new in zip(found, (ce, rank, *rest), strict=True))
        following = following.at[taken].add(width, mode="drop")
        alive = alive.at[block].min(success, mode="drop") & (following < N)
        return alive, following, found

    found = (jnp.zeros((R, N), jnp.float32), jnp.full((R, N), jnp.iinfo(jnp.int32).max))
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

    def total(x):
        return x if vocabulary_axis is None else lax.psum(x, vocabulary_axis)

    def largest(x):
        return x if vocabulary_axis is None else lax.pmax(x, vocabulary_axis)

    logits = _logits(hidden, lm_head)
    V = logits.shape[-1]
    token = jnp.arange(V, dtype=labels.dtype)
    if vocabulary_axis is not None:
        token += lax.axis_index(vocabulary_axis) * V
    is_label = token == labels[..., None]
    chosen = total(jnp.sum(jnp.where(is_label, logits, 0.0), axis=-1))[..., None]
    preferred = (logits > chosen) | ((logits == chosen) & (token < labels[..., None]))
    peak = largest(jnp.max(logits, axis=-1))[..., None]
    powers = jnp.exp(logits - peak)
    mass = total(powers.sum(-1))[..., None]
    ce = (peak + jnp.log(mass) - chosen)[..., 0]
    rank = total(preferred.sum(-1, dtype=jnp.int32))
    if not gradient:
        return ce, rank
    slope = (powers / mass - is_label).astype(lm_head.dtype)
    pulled = jnp.einsum("...v,dv->...d", slope, lm_head, preferred_element_type=jnp.float32)
    return ce, rank, total(pulled).astype(hidden.dtype)
