"""Cross-entropy through the LM head without ever holding the logits of all slots."""

import jax
import jax.numpy as jnp

from specauf_jax.kernels.chunks import map_chunks
from specauf_jax.objectives import cross_entropy_and_rank


def lm_head_cross_entropy(
    hidden: jax.Array, lm_head: jax.Array, labels: jax.Array, *, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """`cross_entropy_and_rank` of `hidden @ lm_head`, `chunk` entries of axis 1 at a time.

    Args:
      hidden: `[B, T, ..., D]`.
      lm_head: `[D, V]`.
      labels: int `[B, T, ...]`.
      chunk: entries of axis 1 whose logits exist at one time.

    Returns:
      float32 and int32 `[B, T, ...]`.
    """

    def one(hidden, labels):
        logits = jnp.einsum("...d,dv->...v", hidden, lm_head, preferred_element_type=jnp.float32)
        return cross_entropy_and_rank(logits, labels)

    return map_chunks(one, chunk, hidden, labels)


def corrected_cross_entropy(hidden, features, lm_head, up, labels, *, chunk: int):
    """Both branches of Domino with one product through the LM head.

    Args:
      features: `[B, T, ..., emb_dim]`, of `specauf_jax.models.domino.correction_features`.
      up: `[emb_dim, V]`.
      Others as for `lm_head_cross_entropy`.

    Returns:
      (cross-entropy, rank) of the base, `hidden @ lm_head`, and of the final logits, base + `features @ up`.
    """

    def one(hidden, features, labels):
        base = jnp.einsum("...d,dv->...v", hidden, lm_head, preferred_element_type=jnp.float32)
        final = base + jnp.einsum("...d,dv->...v", features, up, preferred_element_type=jnp.float32)
        return cross_entropy_and_rank(base, labels), cross_entropy_and_rank(final, labels)

    return map_chunks(one, chunk, hidden, features, labels)
