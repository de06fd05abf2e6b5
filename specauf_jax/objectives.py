"""The heart: which slots of a block train and how much, on plain arrays.

An objective is a support (which slots live) with weights, times a loss per slot. What happened in a block (which slots
were right, how sure the drafter was) gives the weights; the loss compares the drafter's distribution with a label, or
with the target's own distribution. Nothing here knows of language models: any sequence of which only a right prefix is
used can train this way. A robot that executes a planned sequence of moves until the first wrong one:

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

Losses of a slot, by the drafter's logits z, q = softmax(z), and the target's distribution p = softmax(y / T), which is
data. a = Σ_v min(p_v, q_v) is the probability that sampling accepts the slot's draft. L_v below is 1 where q_v < p_v,
else 0, and Q = Σ_v q_v L_v, so that d a / d z_u = q_u (L_u - Q).

| loss | value | d loss / d z_u |
|---|---|---|
| ce | -log q_label | q_u - [u = label] |
| kl | Σ_v p_v (log p_v - log q_v) | q_u - p_u |
| tv | 1 - a | q_u (Q - L_u) |
| lk | λ · kl + (1-λ) · tv, where λ = exp(-3 a) is detached (arXiv 2602.23881) | the same mix |
| nla | -log a | q_u (Q - L_u) / a |
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from specauf_jax.config import Objective, decay_gamma
from specauf_jax.errors import SpecaufError
from specauf_jax.pytrees import pytree


class LabelScores(NamedTuple):
    """What the logits of a branch say of the labels: all that an objective asks of a drafter."""

    cross_entropy: jax.Array  # float32 [..., N], in nats; differentiable
    rank: jax.Array  # int32 [..., N]: tokens that the drafter prefers to the label; 0 is exactly "argmax == label"

    @property
    def loss(self) -> jax.Array:
        """Of a slot: float32 [..., N]; differentiable."""
        return self.cross_entropy


class SoftScores(NamedTuple):
    """What the logits say of the labels and of the target's own distribution."""

    loss: jax.Array  # float32 [..., N]: the objective's mix of losses; alone differentiable in every branch
    cross_entropy: jax.Array
    rank: jax.Array
    acceptance: jax.Array  # float32 [..., N]: a = Σ_v min(p_v, q_v)


Scores = LabelScores | SoftScores


class ConfidenceScores(NamedTuple):
    """What a confidence head says of the probability that sampling accepts a slot's draft."""

    loss: jax.Array  # float32 [..., N]: binary cross-entropy against a, in nats; differentiable
    error: jax.Array  # float32 [..., N]: |said - a|


def accept_until_fail_mask(correct: jax.Array, valid: jax.Array, failures: int = 1) -> jax.Array:
    """Slots up to and including the first failure (Spec-AUF, arXiv 2607.01893), or the n-th.

    m_k = v_k · prod_{1 <= j < k} (v_j · c_j). Detached: no gradient passes through the mask.

    Args:
      correct: bool `[..., N]`, c_k: the drafter's own token is the label.
      valid: bool `[..., N]`, v_k; behind a slot that is not valid nothing lives.
      failures: n, static.

    Returns:
      bool `[..., N]`.
    """
    live = jnp.zeros_like(valid)
    for _ in range(failures):
        live = reached(((correct | live) & valid).astype(jnp.int32)).astype(bool) & valid
    return lax.stop_gradient(live)


def tree_mask(rank: jax.Array, valid: jax.Array, nodes: int) -> jax.Array:
    """Slots up to and including the one whose label leaves the draft tree of the N best paths.

    m_k = v_k · [k = 1, or v_1 … v_{k-1} and Σ_{m < k} Π_{j ≤ m} (r_j + 1) <= N]. The sum counts paths of at most k-1
    drafts whose every token the drafter likes as much as the label at its slot, or better. Each of them scores at
    least as high as the labels' own path, which is one of them: where they are more than N it is none of the N best.
    So a block never stops before the tree does; it may go on after it. For a head whose logits depend on the drafts
    before, the ranks are those after the labels.

    Args:
      rank: int `[..., N]`, as of LabelScores.
      valid: bool `[..., N]`.
      nodes: N of the tree, static.

    Returns:
      bool `[..., N]`, without gradient.
    """
    axis = valid.ndim - 1
    paths = lax.cumsum(lax.cumprod(rank.astype(jnp.float32) + 1, axis=axis), axis=axis)  # of a float: it may be huge
    return lax.stop_gradient(reached(((paths <= nodes) & valid).astype(jnp.int32)).astype(bool) & valid)


def reached(survives: jax.Array) -> jax.Array:
    """prod_{j < k} of `[..., N]`: 1 for the first slot."""
    product = lax.cumprod(survives, axis=survives.ndim - 1)
    return jnp.concatenate([jnp.ones_like(product[..., :1]), product[..., :-1]], axis=-1)


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


def survival_weights(acceptance: jax.Array, valid: jax.Array) -> jax.Array:
    """The probability that sampling gets to a slot: w_k = v_k · prod_{j < k} v_j a_j. float32 `[..., N]`.

    At temperature 0 for both distributions this is `accept_until_fail_mask`.

    Args:
      acceptance: float `[..., N]`, a_k in [0, 1].
      valid: bool `[..., N]`.
    """
    return reached(acceptance * valid) * valid


def first_error_weights(objective: Objective, scores: Scores, valid: jax.Array, block_size: int):
    """Weights by position, more for the first failure, and those of the expected length (after arXiv 2606.11552).

    w_k = exp(-(k-1)/gamma) · (1 + focal · [k is the first failure]) + chain · sum_{j >= k} prod_{i <= j} q_i

    The last part is the gradient of the expected accepted length, sum_j prod_{i <= j} q_i, in log q_k. The paper's
    abstract names the three parts; how they are put together and weighted here is inferred.

    Returns:
      float32 `[..., N]` weights, and what they are divided by: the sum of those without the chain.
    """
    failure = accept_until_fail_mask(scores.rank == 0, valid) & (scores.rank > 0)
    own = decay_weights(valid, decay_gamma(objective, block_size)) * (1 + objective.focal * failure)
    return own + objective.chain * dpace_weights(jnp.exp(-scores.cross_entropy), valid, alpha=0.0), own.sum()


def slot_weights(objective: Objective, scores: Scores, valid: jax.Array, block_size: int):
    """The weight of every slot's loss under `objective`, and their denominator; see `objective_sums`.

    Returns:
      float32 `[..., N]` and float32 [], without gradient.
    """
    live = valid
    if objective.stop is not None:  # GRIFFIN, arXiv 2502.11018, stops at the first label outside the top n; auf: n = 1
        if objective.tree_nodes is None:
            live = accept_until_fail_mask(scores.rank < objective.stop, valid, objective.failures)
        else:
            live = tree_mask(scores.rank, valid, objective.tree_nodes)
        live = jnp.where(live, 1.0, objective.floor) * valid
    match objective.name:
        case "decay" | "auf_decay":
            live = live * decay_weights(valid, decay_gamma(objective, block_size))
        case "dpace":
            live = dpace_weights(jnp.exp(-scores.cross_entropy), valid, objective.dpace_alpha)
        case "survival":
            assert isinstance(scores, SoftScores)
            live = survival_weights(scores.acceptance, valid)
    live = live.astype(jnp.float32)
    denominator = live.sum()
    if objective.name == "first_error":
        live, denominator = first_error_weights(objective, scores, valid, block_size)
    if objective.name == "dpace":
        slots = objective.dpace_denominator == "slots"
        denominator = valid.sum(dtype=jnp.float32) if slots else jnp.float32(valid.shape[0])
    return lax.stop_gradient((live, denominator))


HARD = Objective("full")


def label_scores(logits: jax.Array, labels: jax.Array, target_logits=None, objective: Objective = HARD) -> Scores:
    """Each slot's loss, the label's cross-entropy, and how many tokens the drafter prefers to it.

    Of equal logits the lower token id is preferred. Counting compares in one pass where argmax would need a second,
    and tells of the top n too.

    Args:
      logits: `[..., V]`; taken to float32, since bfloat16 ties would change the support.
      labels: int `[...]`.
      target_logits: `[..., V]` of the target at the same places, without gradient; None for losses of labels alone.
      objective: its `losses` and `temperature` count.

    Returns:
      SoftScores where there are `target_logits`, else LabelScores.
    """
    return scores_and_slope(logits, labels, target_logits, objective)[0]


def confidence_scores(logit: jax.Array, acceptance: jax.Array) -> ConfidenceScores:
    """Scores of float `[..., N]` logits of the probability of acceptance, `SoftScores.acceptance`, which is data."""
    logit, acceptance = logit.astype(jnp.float32), lax.stop_gradient(acceptance)
    error = jnp.abs(jax.nn.sigmoid(lax.stop_gradient(logit)) - acceptance)
    return ConfidenceScores(optax.sigmoid_binary_cross_entropy(logit, acceptance), error)


def scores_and_slope(logits, labels, target_logits=None, objective: Objective = HARD, vocabulary_axis=None):
    """`label_scores`, and the gradient of their loss.

    Args:
      logits, target_logits: `[..., V]`, or this device's part of the vocabulary.
      labels: int `[...]`.
      objective: as for `label_scores`.
      vocabulary_axis: mesh axis over which V is spread, in a manual region; None where it is whole.

    Returns:
      LabelScores or SoftScores; float32 `[..., V]` d loss / d logits of this part of the vocabulary, by the formulas
      of this module.
    """

    def total(x):
        x = x.sum(-1)
        return x if vocabulary_axis is None else lax.psum(x, vocabulary_axis)

    def softmax(logits):
        peak = lax.stop_gradient(logits.max(-1))
        peak = peak if vocabulary_axis is None else lax.pmax(peak, vocabulary_axis)
        powers = jnp.exp(logits - peak[..., None])
        mass = total(powers)
        return peak, jnp.log(mass), powers / mass[..., None]

    logits = logits.astype(jnp.float32)
    V = logits.shape[-1]
    token = jnp.arange(V, dtype=labels.dtype)
    if vocabulary_axis is not None:
        token += lax.axis_index(vocabulary_axis) * V
    is_label = token == labels[..., None]
    chosen = total(jnp.where(is_label, logits, 0.0))
    preferred = (logits > chosen[..., None]) | ((logits == chosen[..., None]) & (token < labels[..., None]))
    peak, log_mass, q = softmax(logits)
    cross_entropy, rank = peak + log_mass - chosen, total(preferred.astype(jnp.int32))
    if target_logits is None:
        return LabelScores(cross_entropy, rank), q - is_label
    target_logits = lax.stop_gradient(target_logits).astype(jnp.float32) / objective.temperature
    target_peak, target_log_mass, p = softmax(target_logits)
    acceptance = total(jnp.minimum(p, q))
    # Not as a difference of shifted logits, for which XLA's CPU backend is four times as slow.
    log_ratio = target_logits - logits - (target_peak - peak)[..., None]
    divergence = total(p * log_ratio) + log_mass - target_log_mass
    below = total(jnp.where(q < p, q, 0.0))[..., None]
    reject_slope = q * jnp.where(q < p, below - 1, below)
    share = lax.stop_gradient(jnp.exp(-3 * acceptance))
    some = jnp.maximum(acceptance, jnp.finfo(jnp.float32).tiny)

    def lk(kl, tv, share=share):
        return share * kl + (1 - share) * tv

    value_and_slope = {
        "ce": (cross_entropy, q - is_label),
        "kl": (divergence, q - p),
        "tv": (1 - acceptance, reject_slope),
        "lk": (lk(divergence, 1 - acceptance), lk(q - p, reject_slope, share[..., None])),
        "nla": (-jnp.log(some), reject_slope / some[..., None]),
    }
    mixed = [(weight * value_and_slope[name][0], weight * value_and_slope[name][1])
             for name, weight in objective.losses.items()]  # fmt: skip
    loss, slope = (functools.reduce(jnp.add, parts) for parts in zip(*mixed, strict=True))
    return SoftScores(loss, cross_entropy, rank, acceptance), slope


@pytree
class ObjectiveSums:
    """The two halves of a loss, to be summed over everything (mesh, accumulation) and divided once."""

    numerator: jax.Array  # sum of weight · loss, float32 []
    denominator: jax.Array  # float32 []
    weights: jax.Array  # float32 [..., N], detached


def objective_sums(
    objective: Objective,
    scores: Scores,
    valid: jax.Array,
    *,
    block_size: int,
    witness: Scores | None = None,
) -> ObjectiveSums:
    """Weighted losses of blocks, as sums.

    Args:
      objective: which slots train.
      scores: of every slot's label; of the target's distribution too where the objective is `soft`.
      valid: bool `[..., N]`.
      block_size: K, for the default time constant of decay.
      witness: scores of another branch, whose hits and misses count in place of the own.

    Returns:
      ObjectiveSums. The denominator is the sum of weights; for dpace the number of valid slots, or
      of rows (the leading axis); for first_error that of weights without the chain.

    Raises:
      SpecaufError: the objective needs the target's distribution, of which `scores` do not tell.
    """
    witness = witness or scores
    if objective.soft_loss:
        _check_soft(scores, f"loss {objective.loss}")
    if objective.name == "survival":
        _check_soft(witness, "objective survival")
    weights, denominator = slot_weights(objective, witness, valid, block_size)
    # A slot without weight must not pass on a loss that is not finite: 0 · inf is nan.
    numerator = jnp.sum(jnp.where(weights > 0, weights * scores.loss, 0.0))
    return ObjectiveSums(numerator=numerator, denominator=denominator, weights=weights)


def _check_soft(scores: Scores, what: str) -> None:
    if not isinstance(scores, SoftScores):
        raise SpecaufError(
            f"{what}, and scores of labels alone",
            "scores of the target's distribution too, of the base branch where it is the witness",
            "give label_scores the target's logits and this objective, or the base branch survival or a soft loss",
        )
