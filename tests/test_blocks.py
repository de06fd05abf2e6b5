import itertools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import tiny

from specauf_jax.training import blocks as under_test
from specauf_jax.training.blocks import Batch

eligible_anchors = jax.jit(under_test.eligible_anchors)
sample_anchors = jax.jit(under_test.sample_anchors, static_argnums=3)
make_blocks = jax.jit(under_test.make_blocks, static_argnames="config")


def test_anchors_need_two_supervised_tokens_in_succession_by_hand():
    document_ids = jnp.array([[1, 1, 1, 1, 2, 2, 2, 0, 0, 0]])
    loss_mask = jnp.array([[0, 1, 1, 1, 1, 1, 0, 1, 1, 1]], bool)
    # 3 and 4 belong to two documents, 5 has no supervised successor, 7 to 9 are padding.
    assert eligible_anchors(loss_mask, document_ids)[0].nonzero()[0].tolist() == [1, 2, 4]


def test_eligible_anchors_of_random_rows_equal_plain_loops():
    batch = tiny.random_batch([[5, 9, 4], [24], [], [1, 1, 1, 12], [2, 20]], supervised=0.7)
    mask, ids = np.asarray(batch.loss_mask).copy(), np.asarray(batch.document_ids)
    mask[:, -3:] = True  # even where that is padding
    eligible = np.asarray(eligible_anchors(jnp.asarray(mask), batch.document_ids))
    for b, p in np.ndindex(mask.shape):
        last = p == mask.shape[1] - 1
        assert eligible[b, p] == (not last and mask[b, p] and mask[b, p + 1] and ids[b, p] == ids[b, p + 1] > 0)
    assert eligible[3].any() and not eligible[2].any()


def test_sampled_anchors_are_distinct_eligible_ascending_and_as_many_as_there_are():
    counts = [0, 1, 3, 5, 12, 24]
    rng = np.random.default_rng(0)
    eligible = np.zeros((len(counts), 24), bool)
    for row, count in enumerate(counts):
        eligible[row, rng.permutation(24)[:count]] = True
    documents = np.repeat([1, 2, 3], 8)[None] * np.ones((len(counts), 1), np.int32)
    for seed in range(20):
        anchors, keep = map(np.asarray, sample_anchors(jax.random.key(seed), eligible, documents, 5))
        assert anchors.shape == keep.shape == (6, 5) and anchors.dtype == np.int32
        for row, count in enumerate(counts):
            kept = anchors[row, keep[row]]
            assert len(kept) == min(count, 5)
            assert keep[row, : len(kept)].all() and not anchors[row, len(kept) :].any()
            assert (np.diff(kept) > 0).all() and eligible[row, kept].all()


def test_every_set_of_anchors_of_one_document_is_equally_likely():
    eligible = np.zeros((1, 14), bool)
    eligible[0, [0, 2, 3, 4, 7, 8, 11, 12]] = True
    draws = 14_000
    anchors, keep = jax.jit(jax.vmap(lambda key: under_test.sample_anchors(key, eligible, jnp.ones((1, 14), int), 3)))(
        jax.random.split(jax.random.key(0), draws)
    )
    assert keep.all()
    found = Counter(map(tuple, np.asarray(anchors[:, 0]).tolist()))
    sets = list(itertools.combinations(np.flatnonzero(eligible[0]).tolist(), 3))
    assert set(found) <= set(sets) and len(sets) == 56
    expected = draws / len(sets)
    # The 99.9th percentile of chi-square with 55 degrees of freedom is 93.2.
    assert sum((found[s] - expected) ** 2 / expected for s in sets) < 93.2


def test_documents_get_their_share_and_every_position_the_same_chance():
    """Of 6 anchors for 14 eligible positions, documents with 7, 3 and 4 of them are due 3, 9/7 and 12/7."""
    documents = np.array([[1] * 9 + [2] * 4 + [3] * 6 + [0]])
    eligible = np.array([[1, 1, 1, 0, 1, 1, 1, 1, 0, 1, 0, 1, 1, 0, 1, 1, 1, 1, 0, 0]], bool)
    draws = 7_000
    anchors, keep = jax.jit(jax.vmap(lambda key: under_test.sample_anchors(key, eligible, documents, 6)))(
        jax.random.split(jax.random.key(1), draws)
    )
    anchors = np.asarray(anchors[:, 0])
    assert keep.all() and eligible[0, anchors].all()
    shares = [(documents[0, anchors] == number).sum(1) for number in (1, 2, 3)]
    assert (shares[0] == 3).all() and set(shares[1]) == set(shares[2]) == {1, 2}
    found = np.bincount(anchors.ravel(), minlength=20)[eligible[0]]
    expected = draws * 6 / 14
    assert np.abs(found / expected - 1).max() < 0.06  # four standard deviations of a binomial count: 0.055


def test_rows_draw_their_anchors_independently():
    anchors, _ = sample_anchors(jax.random.key(0), jnp.ones((8, 24), bool), jnp.ones((8, 24), int), 5)
    assert len({tuple(row) for row in anchors.tolist()}) > 1


def hand_made_batch():
    """One row: a document of 5 tokens, one of 4 and a token of padding."""
    return Batch(
        tokens=jnp.array([[5, 6, 7, 8, 9, 10, 11, 12, 13, 0]]),
        loss_mask=jnp.array([[1, 1, 1, 0, 1, 1, 1, 1, 1, 0]], bool),
        document_ids=jnp.array([[1, 1, 1, 1, 1, 2, 2, 2, 2, 0]]),
        positions=jnp.array([[0, 1, 2, 3, 4, 0, 1, 2, 3, 0]]),
    )


def test_blocks_of_two_documents_by_hand():
    anchors = jnp.array([[0, 3, 5, 7, 0]])
    keep = jnp.array([[True, True, True, True, False]])
    blocks = make_blocks(hand_made_batch(), anchors, keep, config=tiny.drafter_config())
    assert blocks.inputs[0].tolist() == [[x, 16, 16, 16] for x in (5, 8, 10, 12, 5)]
    assert blocks.positions[0].tolist() == [[p, p + 1, p + 2, p + 3] for p in (0, 3, 0, 2, 0)]
    assert blocks.start[0].tolist() == [0, 0, 5, 5, 0]
    assert blocks.labels[0, 0].tolist() == [6, 7, 8]
    assert blocks.labels[0, 1, 0].tolist() == 9
    assert blocks.labels[0, 2].tolist() == [11, 12, 13]
    assert blocks.labels[0, 3, 0].tolist() == 13
    assert blocks.valid[0].astype(int).tolist() == [
        [1, 1, 0],  # 8 is not supervised
        [1, 0, 0],  # 10 and 11 belong to the next document
        [1, 1, 1],
        [1, 0, 0],  # padding, and the end of the row
        [0, 0, 0],  # not kept
    ]


def test_a_block_over_the_end_of_a_full_row_has_no_valid_slot_there():
    batch = tiny.random_batch([[24]], supervised=1.0)
    blocks = make_blocks(
        batch, jnp.array([[19, 21, 22]]), jnp.ones((1, 3), bool), config=tiny.drafter_config(block_size=6)
    )
    assert blocks.valid[0].sum(-1).tolist() == [4, 2, 1]
    assert blocks.labels[0, 1, :2].tolist() == batch.tokens[0, 22:].tolist()
    assert blocks.positions[0, 1].tolist() == [21, 22, 23, 24, 25, 26]


def test_the_mask_token_is_never_a_valid_label():
    batch = hand_made_batch()
    batch = batch.replace(tokens=batch.tokens.at[0, 7].set(16))
    blocks = make_blocks(batch, jnp.array([[5]]), jnp.array([[True]]), config=tiny.drafter_config())
    assert blocks.labels[0, 0].tolist() == [11, 16, 13]
    assert blocks.valid[0, 0].tolist() == [True, False, True]


def test_random_blocks_equal_plain_loops():
    K = 4
    batch = tiny.random_batch([[5, 9, 4], [24], [], [2, 20]], supervised=0.7)
    eligible = eligible_anchors(batch.loss_mask, batch.document_ids)
    anchors, keep = sample_anchors(jax.random.key(3), eligible, batch.document_ids, 6)
    blocks = make_blocks(batch, anchors, keep, config=tiny.drafter_config(block_size=K))
    batch, anchors, keep, blocks = jax.device_get((batch, anchors, keep, blocks))
    tokens, mask, ids = batch.tokens, batch.loss_mask, batch.document_ids
    for b, i in np.ndindex(keep.shape):
        a = int(anchors[b, i])
        for k in range(1, K):
            inside = a + k < tokens.shape[1]
            expected = bool(keep[b, i]) and inside and ids[b, a + k] == ids[b, a] and mask[b, a + k]
            assert blocks.valid[b, i, k - 1] == expected
            assert not expected or blocks.labels[b, i, k - 1] == tokens[b, a + k]
        if keep[b, i]:
            assert blocks.start[b, i] == np.flatnonzero(ids[b] == ids[b, a])[0]
            assert blocks.positions[b, i, 0] == a - blocks.start[b, i]
            assert blocks.valid[b, i, 0]  # an eligible anchor always has a first draft to train
