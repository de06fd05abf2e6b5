"""The heart: which slots of a block train and how much, on plain arrays.

An objective is a support (which slots live) with weights, times a loss per slot. What happened in a block (which slots
were right, how sure the drafter was) gives the weights; the loss is the weighted cross-entropy. Nothing here knows of
language models: any sequence of which only a right prefix is used can train this way. A robot that executes a planned
sequence of moves until the first wrong one:

    >>> import jax, jax.numpy as jnp
    >>> from specauf_jax.config import Objective
    >>> from specauf_jax.objectives import label_scores, objective_sums
    >>> logits = jnp.zeros((1, 4, 3)).at[0, :, 1].set(1.0)   # one plan of 4 moves, 3 possible moves
    >>> moves = jnp.array([[1, 1, 2, 1]])                    # the third move is planned wrongly
    >>> def loss(logits):
    ...     sums = objective_sums(Objective("auf"), label_scores(logits, moves), moves >= 0, block_size=5)
    ...     return sums.numerator / sums.denominator
    >>> jnp.abs(jax.grad(loss)(logits)).sum(-1)[0] > 0       # trained up to and including the miss
    Array([ True,  True,  True, False], dtype=bool)

Shapes: `[..., N]` are the slots of a block that have a label, in order, behind any leading axes (blocks, rows): N is
K-1, or K where labels are shifted. `valid` is v_k: the slot's label may be trained.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from specauf_jax.config import Objective, decay_gamma
from specauf_jax.pytrees import pytree


class LabelScores(NamedTuple):
    """What the logits of a branch say of the labels: all that an objective asks of a drafter."""

    cross_entropy: jax.Array  # float32 [..., N], in nats; differentiable
    rank: jax.Array  # int32 [..., N]: tokens that the drafter prefers to the label; 0 is exactly "argmax == label"


def accept_until_fail_mask(correct: jax.Array, valid: jax.Array) -> jax.Array:
    """Slots up to and including the first failure (Spec-AUF, arXiv 2607.01893).

    m_k = v_k · prod_{1 <= j < k} (v_j · c_j). Detached: no gradient passes through the mask.

    Args:
      correct: bool `[..., N]`, c_k: the drafter's own token is the label.
      valid: bool `[..., N]`, v_k.

    Returns:
      bool `[..., N]`.
    """
    survives = (correct & valid).astype(jnp.int32)
    accepted = lax.cumprod(survives, axis=survives.ndim - 1)
    reached = jnp.concatenate([jnp.ones_like(accepted[..., :1]), accepted[..., :-1]], axis=-1)
    return lax.stop_gradient((reached > 0) & valid)


def prefix_acceptance(draft: jax.Array, target: jax.Array) -> jax.Array:
    """Number of leading drafts that equal the target's tokens.

    Args:
      draft: int `[..., N]` token ids.
      target: int `[..., N]` token ids.

    Returns:
      int32 `[...]`, from 0 to N.
    """
    equal = (draft == target).astype(jnp.int32)
    return lax.cumprod(equal, axis=equal.ndim - 1).sum(-1)


def decay_weights(valid: jax.Array, gamma: float) -> jax.Array:
    """v_k · exp(-(k-1)/gamma) (DFlash, arXiv 2602.06036): earlier slots count more. float32 `[..., N]`."""
    return valid * jnp.exp(-jnp.arange(valid.shape[-1], dtype=jnp.float32) / gamma)


def dpace_weights(probability: jax.Array, valid: jax.Array, alpha: float) -> jax.Array:
    """Weights by the expected accepted length (D-PACE, arXiv 2605.18810).

    s_k = (1 - alpha) q_k + alpha, or 1 where v_k = 0; p_k = prod_{j <= k} s_j;
    w_k = v_k · sum_{j >= k} p_j v_j.

    Args:
      probability: float `[..., N]`, q_k: the drafter's probability of the label.
      valid: bool `[..., N]`.
      alpha: smoothing in [0, 1].

    Returns:
      float32 `[..., N]`.
    """
    axis = valid.ndim - 1
    confidence = jnp.where(valid, (1 - alpha) * probability + alpha, 1.0)
    reach = lax.cumprod(confidence, axis=axis) * valid
    return lax.cumsum(reach, axis=axis, reverse=True) * valid


def slot_weights(objective: Objective, scores: LabelScores, valid: jax.Array, block_size: int) -> jax.Array:
    """The weight of every slot's loss under `objective`; see `objective_sums` for the arguments.

    Returns:
      float32 `[..., N]`, without gradient.
    """
    stop, live = objective.stop, valid
    if stop is not None:  # GRIFFIN, arXiv 2502.11018, stops at the first label outside the top n; auf is n = 1
        live = accept_until_fail_mask(scores.rank < stop, valid)
    match objective.name:
        case "decay" | "auf_decay":
            live = decay_weights(live, decay_gamma(objective, block_size))
        case "dpace":
            live = dpace_weights(jnp.exp(-scores.cross_entropy), live, objective.dpace_alpha)
    return lax.stop_gradient(live.astype(jnp.float32))


def label_scores(logits: jax.Array, labels: jax.Array) -> LabelScores:
    """Cross-entropy of each label, and how many tokens the drafter prefers to it.

    Of equal logits the lower token id is preferred. Counting compares in one pass where argmax would need a second,
    and tells of the top n too.

    Args:
      logits: `[..., V]`; taken to float32, since bfloat16 ties would change the support.
      labels: int `[...]`.
    """
    return scores_and_probabilities(logits, labels)[0]


def scores_and_probabilities(logits, labels, vocabulary_axis: str | None = None):
    """`label_scores`, and what their gradient is made of.

    Args:
      logits: `[..., V]`, or this device's part of the vocabulary.
      labels: int `[...]`.
      vocabulary_axis: mesh axis over which V is spread, in a manual region; None where it is whole.

    Returns:
      LabelScores; float32 `[..., V]` probabilities and bool `[..., V]` "is the label", of this part: the gradient of
      the cross-entropy in the logits is their difference.
    """

    def total(x):
        return x if vocabulary_axis is None else lax.psum(x, vocabulary_axis)

    logits = logits.astype(jnp.float32)
    V = logits.shape[-1]
    token = jnp.arange(V, dtype=labels.dtype)
    peak = lax.stop_gradient(logits.max(-1))
    if vocabulary_axis is not None:
        token += lax.axis_index(vocabulary_axis) * V
        peak = lax.pmax(peak, vocabulary_axis)
    is_label = token == labels[..., None]
    chosen = total(jnp.sum(jnp.where(is_label, logits, 0.0), axis=-1))
    preferred = (logits > chosen[..., None]) | ((logits == chosen[..., None]) & (token < labels[..., None]))
    powers = jnp.exp(logits - peak[..., None])
    mass = total(powers.sum(-1))
    scores = LabelScores(peak + jnp.log(mass) - chosen, total(preferred.sum(-1, dtype=jnp.int32)))
    return scores, powers / mass[..., None], is_label


@pytree
class ObjectiveSums:
    """The two halves of a loss, to be summed over everything (mesh, accumulation) and divided once."""

    numerator: jax.Array  # sum of weight · cross-entropy, float32 []
    denominator: jax.Array  # float32 []
    weights: jax.Array  # float32 [..., N], detached


def objective_sums(
    objective: Objective,
    scores: LabelScores,
    valid: jax.Array,
    *,
    block_size: int,
    witness: LabelScores | None = None,
) -> ObjectiveSums:
    """Weighted cross-entropy of blocks, as sums.

    Args:
      objective: which slots train.
      scores: of every slot's label.
      valid: bool `[..., N]`.
      block_size: K, for the default time constant of decay.
      witness: scores of another branch, whose hits and misses count in place of the own.

    Returns:
      ObjectiveSums. The denominator is the sum of weights; for dpace the number of valid slots, or
      of rows (the leading axis).
    """
    weights = slot_weights(objective, witness or scores, valid, block_size)
    # A slot without weight must not pass on a non-finite cross-entropy: 0 · inf is nan.
    numerator = jnp.sum(jnp.where(weights > 0, weights * scores.cross_entropy, 0.0))
    if objective.name != "dpace":
        denominator = weights.sum()
    elif objective.dpace_denominator == "slots":
        denominator = valid.sum(dtype=jnp.float32)
    else:
        denominator = jnp.float32(valid.shape[0])
    return ObjectiveSums(numerator=numerator, denominator=denominator, weights=weights)
