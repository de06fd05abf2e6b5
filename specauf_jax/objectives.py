"""The heart: which slots of a block train and how much, on plain arrays.

Every objective turns what happened in a block (which slots were right, how sure the drafter was)
into a weight per slot; the loss is the weighted cross-entropy. Nothing here knows of language
models: any sequence of which only a right prefix is used can train this way. A robot that executes
a planned sequence of moves until the first wrong one:

    >>> import jax, jax.numpy as jnp
    >>> from specauf_jax.config import Objective
    >>> from specauf_jax.objectives import cross_entropy_and_rank, objective_sums
    >>> logits = jnp.zeros((1, 4, 3)).at[0, :, 1].set(1.0)   # one plan of 4 moves, 3 possible moves
    >>> moves = jnp.array([[1, 1, 2, 1]])                    # the third move is planned wrongly
    >>> def loss(logits):
    ...     ce, rank = cross_entropy_and_rank(logits, moves)
    ...     sums = objective_sums(Objective("auf"), ce, rank, moves >= 0, block_size=5)
    ...     return sums.numerator / sums.denominator
    >>> jnp.abs(jax.grad(loss)(logits)).sum(-1)[0] > 0       # trained up to and including the miss
    Array([ True,  True,  True, False], dtype=bool)

Shapes: `[..., K-1]` are the slots 1..K-1 of a block, in order, behind any leading axes (blocks,
rows). `valid` is v_k: the slot has a label that may be trained.
"""

import chex
import jax
import jax.numpy as jnp
from jax import lax

from specauf_jax.config import Objective, decay_gamma


def accept_until_fail_mask(correct: jax.Array, valid: jax.Array) -> jax.Array:
    """Slots up to and including the first failure (Spec-AUF, arXiv 2607.01893).

    m_k = v_k · prod_{1 <= j < k} (v_j · c_j). Detached: no gradient passes through the mask.

    Args:
      correct: bool `[..., K-1]`, c_k: the drafter's own token is the label.
      valid: bool `[..., K-1]`, v_k.

    Returns:
      bool `[..., K-1]`.
    """
    survives = (correct & valid).astype(jnp.int32)
    accepted = lax.cumprod(survives, axis=survives.ndim - 1)
    reached = jnp.concatenate([jnp.ones_like(accepted[..., :1]), accepted[..., :-1]], axis=-1)
    return lax.stop_gradient((reached > 0) & valid)


def prefix_acceptance(draft: jax.Array, target: jax.Array) -> jax.Array:
    """Number of leading drafts that equal the target's tokens.

    Args:
      draft: int `[..., K-1]` token ids.
      target: int `[..., K-1]` token ids.

    Returns:
      int32 `[...]`, from 0 to K-1.
    """
    equal = (draft == target).astype(jnp.int32)
    return lax.cumprod(equal, axis=equal.ndim - 1).sum(-1)


def decay_weights(valid: jax.Array, gamma: float) -> jax.Array:
    """v_k · exp(-(k-1)/gamma) (DFlash, arXiv 2602.06036): earlier slots count more. float32 `[..., K-1]`."""
    return valid * jnp.exp(-jnp.arange(valid.shape[-1], dtype=jnp.float32) / gamma)


def dpace_weights(probability: jax.Array, valid: jax.Array, alpha: float) -> jax.Array:
    """Weights by the expected accepted length (D-PACE, arXiv 2605.18810).

    s_k = (1 - alpha) q_k + alpha, or 1 where v_k = 0; p_k = prod_{j <= k} s_j;
    w_k = v_k · sum_{j >= k} p_j v_j.

    Args:
      probability: float `[..., K-1]`, q_k: the drafter's probability of the label.
      valid: bool `[..., K-1]`.
      alpha: smoothing in [0, 1].

    Returns:
      float32 `[..., K-1]`.
    """
    axis = valid.ndim - 1
    confidence = jnp.where(valid, (1 - alpha) * probability + alpha, 1.0)
    reach = lax.cumprod(confidence, axis=axis) * valid
    return lax.cumsum(reach, axis=axis, reverse=True) * valid


def slot_weights(objective: Objective, ce: jax.Array, rank: jax.Array, valid: jax.Array, block_size: int) -> jax.Array:
    """The weight of every slot's cross-entropy under `objective`; see `objective_sums` for the arguments.

    Returns:
      float32 `[..., K-1]`, without gradient.
    """
    gamma = decay_gamma(objective, block_size)
    correct = rank == 0
    match objective.name:
        case "full":
            weights = valid
        case "decay":
            weights = decay_weights(valid, gamma)
        case "auf":
            weights = accept_until_fail_mask(correct, valid)
        case "auf_decay":
            weights = decay_weights(accept_until_fail_mask(correct, valid), gamma)
        case "griffin":  # GRIFFIN, arXiv 2502.11018: the witness of success is the top n
            weights = accept_until_fail_mask(rank < objective.griffin_top_n, valid)
        case "dpace":
            weights = dpace_weights(jnp.exp(-ce), valid, objective.dpace_alpha)
    return lax.stop_gradient(weights.astype(jnp.float32))


def cross_entropy_and_rank(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy of each label, and how many tokens the drafter prefers to it.

    Rank 0 is exactly "argmax == label": of equal logits the lower token id is preferred. Counting
    compares in one pass where argmax would need a second, and serves top-n witnesses too.

    Args:
      logits: `[..., V]`; taken to float32, since bfloat16 ties would change the support.
      labels: int `[...]`.

    Returns:
      float32 `[...]` cross-entropy in nats, int32 `[...]` rank.
    """
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, labels[..., None], axis=-1)
    token = jnp.arange(logits.shape[-1], dtype=labels.dtype)
    preferred = (logits > chosen) | ((logits == chosen) & (token < labels[..., None]))
    return jax.nn.logsumexp(logits, axis=-1) - chosen[..., 0], preferred.sum(-1, dtype=jnp.int32)


@chex.dataclass(frozen=True)
class ObjectiveSums:
    """The two halves of a loss, to be summed over everything (mesh, accumulation) and divided once."""

    numerator: jax.Array  # sum of weight · cross-entropy, float32 []
    denominator: jax.Array  # float32 []
    weights: jax.Array  # float32 [..., K-1], detached


def objective_sums(
    objective: Objective,
    ce: jax.Array,
    rank: jax.Array,
    valid: jax.Array,
    *,
    block_size: int,
    witness: tuple[jax.Array, jax.Array] | None = None,
) -> ObjectiveSums:
    """Weighted cross-entropy of blocks, as sums.

    Args:
      objective: which slots train.
      ce: float32 `[..., K-1]`, cross-entropy of each slot's label; differentiable.
      rank: int32 `[..., K-1]`, tokens that the drafter prefers to the label.
      valid: bool `[..., K-1]`.
      block_size: K, for the default time constant of decay.
      witness: ce and rank of another branch, whose hits and misses count in place of the own.

    Returns:
      ObjectiveSums. The denominator is the sum of weights; for dpace the number of valid slots, or
      of rows (the leading axis).
    """
    weights = slot_weights(objective, *(witness or (ce, rank)), valid, block_size)
    # A slot without weight must not pass on a non-finite cross-entropy: 0 · inf is nan.
    numerator = jnp.sum(jnp.where(weights > 0, weights * ce, 0.0))
    if objective.name != "dpace":
        denominator = weights.sum()
    elif objective.dpace_denominator == "slots":
        denominator = valid.sum(dtype=jnp.float32)
    else:
        denominator = jnp.float32(valid.shape[0])
    return ObjectiveSums(numerator=numerator, denominator=denominator, weights=weights)
