"""From logits to the distribution that is sampled, and exact rejection sampling of drafts.

Greedy rows are the limit of the same rules (one-hot distributions), so one batch may mix them.
"""

import jax
import jax.numpy as jnp

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
    V = logits.shape[-1]
    per_row = (slice(None), None, None)
    # Below the largest, so that no temperature, however low, makes infinities of which nothing can be told.
    below = logits - logits.max(-1, keepdims=True)
    heated = below / jnp.where(temperature > 0, temperature, 1.0)[per_row]
    order = jnp.argsort(-heated, axis=-1, stable=True)  # most likely first; of equals the lower id
    ranked = jnp.take_along_axis(heated, order, axis=-1)
    k = jnp.where(top_k > 0, top_k, V)[per_row]
    ranked = jnp.where(jnp.arange(V) < k, ranked, -jnp.inf)
    probability = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    # top_p = 1 must keep everything, though rounding may bring the running sum to 1 early.
    keep = (before < top_p[per_row]) | (top_p[per_row] >= 1)
    probability = jnp.where(keep.at[..., 0].set(True), probability, 0.0)
    probability /= probability.sum(-1, keepdims=True)
    sampled = jnp.put_along_axis(jnp.zeros_like(probability), order, probability, axis=-1, inplace=False)
    greedy = jax.nn.one_hot(jnp.argmax(logits, axis=-1), V)
    return jnp.where((temperature > 0)[per_row], sampled, greedy)


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


def verify_sampled(keys, drafts, q, p) -> tuple[jax.Array, jax.Array]:
    """Speculative rejection sampling (Leviathan et al., arXiv 2211.17192): the result follows p.

    Draft d of slot k is accepted with probability min(1, p_k(d) / q_k(d)). After the first
    rejection the target's token is drawn from max(p_k - q_k, 0), normalised; after none, from p_K.

    Args:
      keys: PRNG keys `[B]`.
      drafts: int32 `[B, K-1]`, drawn from q.
      q: float32 `[B, K-1, V]`, the drafter's distributions.
      p: float32 `[B, K, V]`, the target's.

    Returns:
      Accepted drafts and the target's token after them, both int32 `[B]`.
    """
    B, K, V = p.shape
    accept_keys, residual_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
    uniform = jax.vmap(lambda key: jax.random.uniform(key, (K - 1,)))(accept_keys)
    p_draft = jnp.take_along_axis(p[:, :-1], drafts[..., None], axis=-1)[..., 0]
    q_draft = jnp.take_along_axis(q, drafts[..., None], axis=-1)[..., 0]
    # As a prefix of agreements: a rejected slot "disagrees".
    accepted = prefix_acceptance((uniform * q_draft < p_draft).astype(jnp.int32), jnp.ones((B, K - 1), jnp.int32))
    q = jnp.concatenate([q, jnp.zeros((B, 1, V))], axis=1)  # the bonus token has nothing to subtract
    p_next, q_next = (jnp.take_along_axis(x, accepted[:, None, None], axis=1) for x in (p, q))
    residual = jnp.maximum(p_next - q_next, 0.0)
    # p = q to the last bit, yet rejected by rounding: fall back to p.
    residual = jnp.where(residual.sum(-1, keepdims=True) > 0, residual, p_next)
    return accepted, draw(residual_keys, residual)[:, 0]
