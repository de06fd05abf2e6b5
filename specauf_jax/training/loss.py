"""The loss of a drafter on a batch: drafter, then LM head, then objective. Pure."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
from jax import lax

from specauf_jax.config import Drafter, Dtype, Objective
from specauf_jax.kernels.lm_head import lm_head_cross_entropy
from specauf_jax.models.drafter import context_keys_values, draft_blocks
from specauf_jax.models.layers import cast
from specauf_jax.models.target import Head
from specauf_jax.objectives import objective_sums
from specauf_jax.training.blocks import Batch, BlockBatch, eligible_anchors, make_blocks, sample_anchors


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Static data of `loss_fn`."""

    drafter: Drafter  # resolved
    objective: Objective
    num_anchors: int = 512
    anchor_chunk: int = 32
    dtype: Dtype = "float32"


@chex.dataclass(frozen=True)
class LossAux:
    """Sums over a batch, float32 []; every measure is a ratio of two of them."""

    numerator: jax.Array  # weighted cross-entropy
    denominator: jax.Array
    blocks: jax.Array  # kept blocks
    emitted: jax.Array  # tokens that a round would emit, summed over kept blocks
    valid: jax.Array  # slots with a label
    correct: jax.Array  # … of which the drafter's argmax is right
    support: jax.Array  # slots with weight
    support_correct: jax.Array

    def measures(self) -> dict:
        """Names of the README's table of measures; 0 where nothing was counted."""
        ratio = {
            "loss": (self.numerator, self.denominator),
            "tau": (self.emitted, self.blocks),
            "common_token_accuracy": (self.correct, self.valid),
            "support_accuracy": (self.support_correct, self.support),
            "active_ratio": (self.support, self.valid),
        }
        return {name: safe_ratio(*pair) for name, pair in ratio.items()}


def safe_ratio(numerator, denominator):
    """numerator / denominator, and 0 (with zero gradient) where the denominator is 0."""
    return jnp.where(denominator > 0, numerator / jnp.where(denominator > 0, denominator, 1), 0.0)


def loss_fn(drafter_params: dict, head: Head, batch: Batch, rng: jax.Array, *, config: LossConfig):
    """Loss of a drafter on the blocks at random anchors.

    No collectives and no global state: jit, vmap, shard and differentiate it at will.

    Args:
      drafter_params: as from `init_drafter`.
      head: the target's frozen embedding `[V, D]` and LM head `[D, V]`.
      batch: rows with `features` `[B, S, L·D]` of any target.
      rng: key for the anchors.
      config: static.

    Returns:
      float32 [] loss, and LossAux.
    """
    anchors, keep = sample_anchors(rng, eligible_anchors(batch.loss_mask, batch.document_ids), config.num_anchors)
    numerator, aux = loss_sums(drafter_params, head, batch, anchors, keep, config=config)
    return safe_ratio(numerator, aux.denominator), aux


def loss_sums(drafter_params: dict, head: Head, batch: Batch, anchors, keep, *, config: LossConfig):
    """The loss's numerator at given anchors, to be summed over parts before one division.

    Args: as for `loss_fn`, with anchors int32 `[B, A]` and keep bool `[B, A]`.

    Returns:
      float32 [] numerator (differentiable), and LossAux.
    """
    drafter = config.drafter
    blocks = make_blocks(batch, anchors, keep, block_size=drafter.block_size, mask_token_id=drafter.mask_token_id)
    hidden = block_hidden(drafter_params, head, batch, blocks, config=config)
    lm_head = lax.stop_gradient(head.lm_head).astype(config.dtype)
    ce, rank = lm_head_cross_entropy(hidden[:, :, 1:], lm_head, blocks.labels, chunk=config.anchor_chunk)
    sums = objective_sums(config.objective, ce, rank, blocks.valid, block_size=drafter.block_size)
    return sums.numerator, _count(sums, rank, blocks)


def block_hidden(drafter_params: dict, head: Head, batch: Batch, blocks: BlockBatch, *, config: LossConfig):
    """Final hidden states of all slots, `[B, A, K, D]` in compute precision."""
    params = cast(drafter_params, config.dtype)
    features = lax.stop_gradient(batch.features).astype(config.dtype)
    embeddings = lax.stop_gradient(head.embedding[blocks.inputs]).astype(config.dtype)
    context = context_keys_values(params, features, batch.positions, config=config.drafter)
    return draft_blocks(
        params,
        embeddings,
        blocks.positions,
        context,
        blocks.start,
        blocks.anchors,  # strictly before the anchor
        blocks.keep,
        config=config.drafter,
        anchor_chunk=config.anchor_chunk,
    )


def _count(sums, rank, blocks: BlockBatch) -> LossAux:
    def total(x):
        return x.sum(dtype=jnp.float32)

    correct = (rank == 0) & blocks.valid
    support = sums.weights > 0
    accepted = lax.cumprod(correct.astype(jnp.int32), axis=2).sum(-1)
    return LossAux(
        numerator=sums.numerator,
        denominator=sums.denominator,
        blocks=total(blocks.keep),
        emitted=total(jnp.where(blocks.keep, accepted + 1, 0)),
        valid=total(blocks.valid),
        correct=total(correct),
        support=total(support),
        support_correct=total(correct & support),
    )
