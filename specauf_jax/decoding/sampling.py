"""From logits to the distribution that is sampled, and exact rejection sampling of drafts.

Greedy rows are the limit of the same rules (one-hot distributions), so one batch may mix them.
"""

import jax
import jax.numpy as jnp
from jax import lax

from specauf_jax.objectives import prefix_acceptance


def distribution(logits, temperature, top_k, top_p) -> jax.Array:
    """Probabilities after temperature, then top-k, then top-p.

    Args:
      logits: float32 `[B, T, V]`.
      temperature: float32 `[B]`; 0 gives a one-hot at the argmax.
      top_k: int32 `[B]`; 0 keeps all.
      top_p: float32 `[B]`; keeps the smallest set of most likely tokens with at least this
        probability, always at least one.

    Returns:
      float32 `[B, T, V]`, rows summing to 1.
    """
    per_row = (slice(None), None, None)
    # Below the largest, so that no temperature, however low, makes infinities of which nothing can be told.
    below = logits - logits.max(-1, keepdims=True)
    heated = below / jnp.where(temperature > 0, temperature, 1.0)[per_row]
    drawn = temperature > 0

    def most_likely(heated):
        k = jnp.where(top_k > 0, top_k, logits.shape[-1]).astype(jnp.float32)[per_row]
        return jnp.where(_best(heated, jnp.ones_like(heated), k), heated, -jnp.inf)

    def nucleus(probability):
        keep = _best(heated, probability, top_p[per_row])
        # top_p = 1 must keep everything, though rounding may bring the running sum to 1 early.
        probability = jnp.where(keep | (top_p[per_row] >= 1), probability, 0.0)
        return probability / probability.sum(-1, keepdims=True)

    probability = jax.nn.softmax(lax.cond(jnp.any(drawn & (top_k > 0)), most_likely, lambda x: x, heated), axis=-1)
    probability = lax.cond(jnp.any(drawn & (top_p < 1)), nucleus, lambda x: x, probability)
    greedy = jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1])
    return jnp.where(drawn[per_row], probability, greedy)


def _best(values, weights, enough) -> jax.Array:
    """Whether the weights of all that come before sum to less than `enough`; the largest value is first, of equals
    the lower index. bool `[..., V]`.

    Finds the last value that counts by halving what floats there are between the first and the last: a vocabulary's
    sort takes many times longer.

    Args:
      values: float32 `[..., V]`, at most 0.
      weights: float32 `[..., V]`, at least 0, equal for equal values.
      enough: float32 `[..., 1]`, above 0.
    """
    keys = lax.bitcast_convert_type(jnp.abs(values), jnp.int32)  # in the order of the values, the largest lowest

    def weight_before(key):
        return jnp.where(keys < key, weights, 0.0).sum(-1, keepdims=True)

    def halve(_, bounds):
        low, high = bounds  # less than enough before low; not so before high, or nothing there
        middle = low + (high - low) // 2
        less = weight_before(middle) < enough
        return jnp.where(less, middle, low), jnp.where(less, high, middle)

    bounds = jnp.zeros_like(keys[..., :1]), jnp.full_like(keys[..., :1], jnp.iinfo(jnp.int32).max)
    last, _ = lax.fori_loop(0, 31, halve, bounds)
    equal = keys == last
    before = weight_before(last) + jnp.where(equal, jnp.cumsum(jnp.where(equal, weights, 0.0), -1) - weights, 0.0)
    return (keys < last) | (equal & (before < enough))


def draw(keys, probability) -> jax.Array:
    """One token per slot, int32 `[B, T]`, from probabilities `[B, T, V]` with keys `[B]`."""
    return jax.vmap(lambda key, p: jax.random.categorical(key, jnp.log(p)))(keys, probability).astype(jnp.int32)


def verify_greedy(drafts, target_logits) -> tuple[jax.Array, jax.Array]:
    """Accepted drafts and the target's token after them, both int32 `[B]`.

    Args:
      drafts: int32 `[B, K-1]`.
      target_logits: float32 `[B, K, V]`.
    """
    choice = jnp.argmax(target_logits, axis=-1).astype(jnp.int32)
    accepted = prefix_acceptance(drafts, choice[:, :-1])
    return accepted, jnp.take_along_axis(choice, accepted[:, None], axis=1)[:, 0]


def verify_sampled(keys, drafts, chances, q_of, p) -> tuple[jax.Array, jax.Array]:
    """Speculative rejection sampling (Leviathan et al., arXiv 2211.17192): the result follows p.

    Draft d of slot k is accepted with probability min(1, p_k(d) / q_k(d)). After the first
    rejection the target's token is drawn from max(p_k - q_k, 0), normalised; after none, from p_K.

    Args:
      keys: PRNG keys `[B]`.
      drafts: int32 `[B, K-1]`, drawn from q.
      chances: float32 `[B, K-1]`, q_k(d) of each.
      q_of: (int32 `[B]`, a slot of each row) → float32 `[B, V]`, the drafter's distribution there: of all slots but
        the rejected one, only its drafts' probabilities matter.
      p: float32 `[B, K, V]`, the target's.

    Returns:
      Accepted drafts and the target's token after them, both int32 `[B]`.
    """
    B, K, _ = p.shape
    accept_keys, residual_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
    if K == 1:  # no drafts; compilers would be long at folding what follows
        return jnp.zeros(B, jnp.int32), draw(residual_keys, p)[:, 0]
    uniform = jax.vmap(lambda key: jax.random.uniform(key, (K - 1,)))(accept_keys)
    p_draft = jnp.take_along_axis(p[:, :-1], drafts[..., None], axis=-1)[..., 0]
    # As a prefix of agreements: a rejected slot "disagrees".
    accepted = prefix_acceptance((uniform * chances < p_draft).astype(jnp.int32), jnp.ones((B, K - 1), jnp.int32))
    p_next = jnp.take_along_axis(p, accepted[:, None, None], axis=1)
    rejected = accepted[:, None] < K - 1  # else the token after all drafts, which has nothing to subtract
    residual = jnp.maximum(p_next - jnp.where(rejected, q_of(jnp.minimum(accepted, K - 2)), 0.0)[:, None], 0.0)
    # p = q to the last bit, yet rejected by rounding: fall back to p.
    residual = jnp.where(residual.sum(-1, keepdims=True) > 0, residual, p_next)
    return accepted, draw(residual_keys, residual)[:, 0]
