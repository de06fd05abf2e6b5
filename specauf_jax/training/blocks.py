"""From rows of tokens to drafting problems: anchors, block inputs, positions, labels. Static shapes."""

import jax
import jax.numpy as jnp

from specauf_jax.architecture import ResolvedDrafter
from specauf_jax.models.target import document_starts
from specauf_jax.pytrees import pytree


@pytree
class Batch:
    """Packed rows, as the loader gives them."""

    tokens: jax.Array  # int32 [B, S]
    loss_mask: jax.Array  # bool [B, S]: the token is a label that may be trained
    document_ids: jax.Array  # int32 [B, S]: 1, 2, … within a row, 0 for padding
    positions: jax.Array  # int32 [B, S]: within the document
    features: jax.Array | None = None  # [B, S, L·D]: tapped hidden states of any target
    target_hidden: jax.Array | None = None  # [B, S, D]: its final-normed hidden states, for soft losses


@pytree
class BlockBatch:
    """A drafted blocks of every row. Blocks that are not kept fill up rows with few anchors."""

    anchors: jax.Array  # int32 [B, A]: index in the row
    keep: jax.Array  # bool [B, A]
    inputs: jax.Array  # int32 [B, A, K]: [anchor's token, MASK, …]
    positions: jax.Array  # int32 [B, A, K]: within the document
    start: jax.Array  # int32 [B, A]: first index of the anchor's document
    previous: jax.Array  # int32 [B, A, N]: the token before each label, the anchor's first
    labels: jax.Array  # int32 [B, A, N]: tokens after the anchor; N = K-1, or K where labels are shifted
    valid: jax.Array  # bool [B, A, N]: v_k, the label may be trained


def eligible_anchors(loss_mask: jax.Array, document_ids: jax.Array) -> jax.Array:
    """Positions p with p and p+1 supervised in one document; bool `[B, S]`."""
    same_document = (document_ids[:, :-1] == document_ids[:, 1:]) & (document_ids[:, :-1] > 0)
    return jnp.pad(loss_mask[:, :-1] & loss_mask[:, 1:] & same_document, ((0, 0), (0, 1)))


def sample_anchors(
    rng: jax.Array, eligible: jax.Array, document_ids: jax.Array, num_anchors: int
) -> tuple[jax.Array, jax.Array]:
    """Anchors of each row, without replacement, ascending; every document gets its share of them.

    Every eligible position is drawn with the same probability. Of A anchors a document with a share s of the row's
    eligible positions gets A·s, rounded up or down, and which of its own they are is uniform: in a row of a single
    document this is a uniform sample. A packed row thus never passes over a document that is due an anchor.

    Args:
      rng: a key.
      eligible: bool `[B, S]`.
      document_ids: int32 `[B, S]`.
      num_anchors: A, at most S.

    Returns:
      int32 `[B, A]` indices and bool `[B, A]` keep; what is not kept (fewer eligible positions than
      A) stands last, at index 0.
    """
    B, S = eligible.shape
    shuffle, offset = jax.random.split(rng)
    # Documents one after another, each in random order, what is not eligible last; of that, evenly spaced places.
    document = jnp.where(eligible, document_ids, jnp.iinfo(jnp.int32).max)
    order = jnp.lexsort((jax.random.uniform(shuffle, (B, S)), document))
    count = eligible.sum(axis=1, keepdims=True)
    drawn = jnp.clip(count, 1, num_anchors)
    first = jax.random.randint(offset, (B, 1), 0, jnp.maximum(count, 1))
    i = jnp.arange(num_anchors)
    index = jnp.take_along_axis(order, (i * count + first) // drawn, axis=1, mode="clip")
    index = jnp.sort(jnp.where(i < jnp.minimum(count, drawn), index, S), axis=-1).astype(jnp.int32)
    keep = index < S
    return jnp.where(keep, index, 0), keep


def at(array: jax.Array, index: jax.Array) -> jax.Array:
    """Each row of `[B, S, ...]` at its own indices `[B, ...]`."""
    return jax.vmap(lambda row, i: row[i])(array, index)


def make_blocks(batch: Batch, anchors, keep, *, config: ResolvedDrafter) -> BlockBatch:
    """Inputs and labels of the block at each anchor.

    A label past the row or the document, unsupervised, or equal to the mask token (the drafter can
    never be asked for it) is not valid.
    """
    S = batch.tokens.shape[1]
    index = anchors[..., None] + 1 + jnp.arange(config.num_labels)
    inside = index < S
    index = jnp.minimum(index, S - 1)
    labels = at(batch.tokens, index)
    same_document = at(batch.document_ids, index) == at(batch.document_ids, anchors)[..., None]
    valid = keep[..., None] & inside & same_document & at(batch.loss_mask, index) & (labels != config.mask_token_id)
    first = at(batch.tokens, anchors)[..., None]
    masks = jnp.full((*anchors.shape, config.block_size - 1), config.mask_token_id, first.dtype)
    return BlockBatch(
        anchors=anchors,
        keep=keep,
        inputs=jnp.concatenate([first, masks], axis=-1),
        positions=at(batch.positions, anchors)[..., None] + jnp.arange(config.block_size),
        start=at(document_starts(batch.document_ids), anchors),
        previous=jnp.concatenate([first, labels[..., :-1]], axis=-1),
        labels=labels,
        valid=valid,
    )


def predicting_states(hidden: jax.Array, blocks: BlockBatch) -> jax.Array:
    """Of `[B, S, D]` the states at the places before the labels, which predict them: `[B, A, N, D]`."""
    index = blocks.anchors[..., None] + jnp.arange(blocks.labels.shape[-1])
    return at(hidden, jnp.minimum(index, hidden.shape[1] - 1))
