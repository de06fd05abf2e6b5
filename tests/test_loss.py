import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from specauf_jax.config import Objective
from specauf_jax.errors import SpecaufError
from specauf_jax.models.drafter import context_keys_values, draft_blocks
from specauf_jax.models.target import target_features, target_head, target_hidden
from specauf_jax.training.blocks import make_blocks
from specauf_jax.training.loss import LossConfig, block_hidden, loss_fn, loss_sums, safe_ratio

TARGET, DRAFTER = tiny.target_config(), tiny.drafter_config()
TARGET_PARAMS, PARAMS = tiny.target_params(), tiny.drafter_params()
HEAD = target_head(TARGET_PARAMS)
EVERY_OTHER = jnp.arange(24) % 2 == 1  # a loss mask without an eligible anchor
AUF = LossConfig(drafter=DRAFTER, objective=Objective("auf"), num_anchors=5, slot_chunk=7)
EVERY_SLOT = dataclasses.replace(AUF, head_slots="all")


def features_of(target_params, batch):
    return target_features(
        target_params,
        batch.tokens,
        batch.positions,
        batch.document_ids,
        config=TARGET,
        layer_ids=DRAFTER.target_layer_ids,
    )


def with_features(batch):
    return batch.replace(features=jax.jit(features_of)(TARGET_PARAMS, batch))


def blocks_at(batch, anchors, keep):
    return make_blocks(batch, anchors, keep, config=DRAFTER)


@jax.jit
def slot_logits(batch, anchors, keep):
    """From tokens to the logits of every slot, `[B, A, K, V]`, as in training."""
    batch = batch.replace(features=features_of(TARGET_PARAMS, batch))
    return block_hidden(PARAMS, HEAD, batch, blocks_at(batch, anchors, keep), config=AUF) @ HEAD.lm_head


@functools.partial(jax.jit, static_argnames="config")
def sums_and_grads(params, batch, anchors, keep, config=AUF):
    def numerator(params):
        numerators, aux = loss_sums(params, HEAD, batch, anchors, keep, config=config)
        return numerators["final"], aux

    grads, aux = jax.grad(numerator, has_aux=True)(params)
    return aux, grads


@functools.partial(jax.jit, static_argnames="config")
def loss_and_grads(params, batch, rng, config=AUF):
    (loss, aux), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, HEAD, batch, rng, config=config)
    return loss, aux, grads


# ---------------------------------------------------------------------------------------------
# What a block sees


def masked_batch():
    """Two documents, padding; anchors at starts, middles and the end of documents; the last not kept.

    The second row is one document, so that what happens in the first cannot hide in its shape.
    """
    batch = tiny.random_batch([[8, 11], [24]], seed=1)
    anchors = jnp.array([[0, 3, 6, 7, 8, 11, 17, 9], [0, 1, 5, 9, 13, 20, 23, 11]])
    keep = jnp.array([[True] * 7 + [False]] * 2)
    return batch, anchors, keep


def own_document(batch, anchors):
    """bool `[B, A, S]`: the index belongs to the anchor's document."""
    ids, anchors = np.asarray(batch.document_ids), np.asarray(anchors)
    return np.take_along_axis(ids, anchors, 1)[..., None] == ids[:, None]


def test_a_block_sees_its_documents_tokens_up_to_the_anchor_and_nothing_else():
    """Every token is changed in turn: logits move exactly where they may, and elsewhere not by one bit."""
    batch, anchors, keep = masked_batch()
    before = np.asarray(slot_logits(batch, anchors, keep))
    assert np.isfinite(before).all()
    own = own_document(batch, anchors)
    for row, index in np.ndindex(batch.tokens.shape):
        other = (int(batch.tokens[row, index]) + 5) % (tiny.MASK_TOKEN - 1)
        after = slot_logits(batch.replace(tokens=batch.tokens.at[row, index].set(other)), anchors, keep)
        moved = (np.asarray(after) != before).any((2, 3))
        expected = np.zeros(moved.shape, bool)
        at = np.asarray(anchors[row])
        expected[row] = (own[row, :, index] & (index < at) & np.asarray(keep[row])) | (index == at)
        np.testing.assert_array_equal(moved, expected, err_msg=f"token {index} of row {row}")


def test_a_block_does_not_see_other_blocks():
    batch, anchors, keep = masked_batch()
    before = slot_logits(batch, anchors, keep)
    after = slot_logits(batch, anchors.at[:, 1:].set(anchors[:, 1:] // 2), keep.at[:, 1:].set(~keep[:, 1:]))
    np.testing.assert_array_equal(after[:, 0], before[:, 0])
    assert (after[:, 1:] != before[:, 1:]).any((2, 3)).all()


def test_gradients_with_respect_to_features_reach_exactly_the_context_of_each_block():
    """Exactly zero at and after the anchor, in other documents and padding; nonzero at every token before it."""
    batch, anchors, keep = masked_batch()
    batch = with_features(batch)
    blocks = blocks_at(batch, anchors, keep)
    embeddings = HEAD.embedding[blocks.inputs]

    def hidden(features):
        context = context_keys_values(PARAMS, features, batch.positions, config=DRAFTER)
        return draft_blocks(PARAMS, embeddings, blocks.positions, context, blocks.start, anchors, keep, config=DRAFTER)

    @jax.jit
    def reached(features):
        logits, pull = jax.vjp(lambda features: hidden(features) @ HEAD.lm_head, features)
        weights = jax.random.normal(jax.random.key(0), logits.shape)
        one_block = jnp.eye(anchors.shape[1])[:, None, :, None, None] * weights
        grads = jax.vmap(lambda cotangent: pull(cotangent)[0])(one_block)  # [A, B, S, L·D]
        return logits, jnp.moveaxis(grads, 0, 1)

    logits, grads = map(np.asarray, reached(batch.features))
    index = np.arange(batch.tokens.shape[1])
    expected = own_document(batch, anchors) & (index < np.asarray(anchors)[..., None]) & np.asarray(keep)[..., None]
    np.testing.assert_array_equal((grads != 0).any(-1), expected)
    assert np.isfinite(grads).all()
    assert not expected[:, 0].any() and expected.sum() > 90  # the anchors at 0 see no context
    assert tiny.largest_difference(logits, slot_logits(batch, anchors, keep)) < 1e-6  # what training runs


def test_blocks_that_are_not_kept_have_no_loss_and_gradients_of_zero():
    batch, anchors, keep = masked_batch()
    aux, grads = sums_and_grads(PARAMS, with_features(batch), anchors, jnp.zeros_like(keep))
    assert aux.final.numerator == aux.final.denominator == aux.final.blocks == aux.final.valid == aux.final.emitted == 0
    assert all(not g.any() for g in jax.tree.leaves(grads))  # nan would count as any


def test_fillers_do_not_change_the_loss_wherever_they_stand():
    batch, anchors, keep = masked_batch()
    batch, keep = with_features(batch), keep.at[:, 5:].set(False)
    here = sums_and_grads(PARAMS, batch, anchors, keep)
    there = sums_and_grads(PARAMS, batch, anchors.at[:, 5:].set(0), keep)
    assert here[0].final.numerator > 0 and tiny.same_bits(here, there)


# ---------------------------------------------------------------------------------------------
# The loss


def test_the_loss_equals_plain_loops_over_the_logits():
    """auf: slot k answers for the k-th token after the anchor, until the first that is wrong."""
    batch, anchors, keep = masked_batch()
    logits, tokens = np.asarray(slot_logits(batch, anchors, keep), np.float64), np.asarray(batch.tokens)
    mask, ids = np.asarray(batch.loss_mask), np.asarray(batch.document_ids)
    count = dict.fromkeys(
        ("numerator", "denominator", "blocks", "emitted", "valid", "correct", "support", "support_correct"), 0.0
    )
    for b, i in np.ndindex(anchors.shape):
        if not keep[b, i]:
            continue
        a, alive, accepted, prefix = int(anchors[b, i]), True, 0, True
        for k in range(1, DRAFTER.block_size):
            valid = a + k < tokens.shape[1] and ids[b, a + k] == ids[b, a] and mask[b, a + k]
            slot = logits[b, i, k]
            correct = valid and slot.argmax() == tokens[b, a + k]
            if valid and alive:
                count["numerator"] += math.log(np.exp(slot).sum()) - slot[tokens[b, a + k]]
                count["denominator"] += 1
                count["support"] += 1
                count["support_correct"] += correct
            count["valid"] += valid
            count["correct"] += correct
            alive, prefix = alive and correct, prefix and correct
            accepted += prefix
        count["blocks"] += 1
        count["emitted"] += accepted + 1
    for config in (AUF, EVERY_SLOT):
        aux, _ = sums_and_grads(PARAMS, with_features(batch), anchors, keep, config)
        for name, expected in count.items():
            if name == "correct" and config is AUF:
                assert aux.final.correct is None and "common_token_accuracy" not in aux.measures()
            else:
                np.testing.assert_allclose(aux.final[name], expected, rtol=1e-5, err_msg=name)
    assert count["support"] > count["support_correct"] > 1 and count["emitted"] > count["blocks"]  # some are right
    measures = aux.measures()
    np.testing.assert_allclose(measures["loss"], count["numerator"] / count["denominator"], rtol=1e-5)
    np.testing.assert_allclose(measures["tau"], count["emitted"] / count["blocks"], rtol=1e-6)
    np.testing.assert_allclose(measures["common_token_accuracy"], count["correct"] / count["valid"], rtol=1e-6)
    np.testing.assert_allclose(measures["support_accuracy"], count["support_correct"] / count["support"], rtol=1e-6)
    np.testing.assert_allclose(measures["active_ratio"], count["support"] / count["valid"], rtol=1e-6)


def test_rows_without_anchors_add_exactly_nothing():
    """A row of padding, and a row without two supervised tokens in succession."""
    rng = jax.random.key(0)
    batch = tiny.random_batch([[8, 11], [], [24]], seed=2)
    batch = batch.replace(loss_mask=batch.loss_mask.at[2].set(EVERY_OTHER))
    batch = with_features(batch)
    loss, aux, grads = loss_and_grads(PARAMS, batch, rng)
    assert aux.final.blocks == 5 and jnp.isfinite(loss) and loss > 0
    assert all(jnp.isfinite(g).all() and g.any() for g in jax.tree.leaves(grads))
    garbage = batch.replace(features=batch.features.at[1:].multiply(-3), tokens=batch.tokens.at[1:].set(7))
    changed, _, changed_grads = loss_and_grads(PARAMS, garbage, rng)
    assert changed == loss and tiny.same_bits(changed_grads, grads)


@pytest.mark.parametrize("name", ["auf", "dpace"])
def test_a_batch_without_any_anchor_has_a_loss_and_gradients_of_exactly_zero(name):
    config = dataclasses.replace(AUF, objective=Objective(name))
    batch = tiny.random_batch([[], [24], [1, 1]], seed=3, supervised=1.0)
    batch = with_features(batch.replace(loss_mask=batch.loss_mask.at[1].set(EVERY_OTHER)))
    loss, aux, grads = loss_and_grads(PARAMS, batch, jax.random.key(0), config)
    assert loss == 0 and all(not g.any() for g in jax.tree.leaves(grads))
    assert all(value == 0 for value in aux.measures().values())


def test_safe_ratio_is_zero_with_zero_gradient_where_the_denominator_is_zero():
    ratio, grads = jax.value_and_grad(safe_ratio, argnums=(0, 1))(3.0, 0.0)
    assert ratio == 0 and grads == (0, 0)
    assert safe_ratio(3.0, 2.0) == 1.5


def test_a_batch_without_features_is_refused():
    with pytest.raises(SpecaufError, match="without features"):
        loss_fn(PARAMS, HEAD, tiny.random_batch([[24]], seed=1), jax.random.key(0), config=AUF)


def test_no_gradient_reaches_the_target():
    batch, rng = tiny.random_batch([[8, 11], [24]], seed=1), jax.random.key(0)

    def loss(target_params):
        features = features_of(target_params, batch)
        return loss_fn(PARAMS, target_head(target_params), batch.replace(features=features), rng, config=AUF)[0]

    value, grads = jax.jit(jax.value_and_grad(loss))(TARGET_PARAMS)
    assert value > 0 and all(not g.any() for g in jax.tree.leaves(grads))


# ---------------------------------------------------------------------------------------------
# Packing


def packed_and_unpacked():
    """Documents of 10 and 12 tokens in one row, and the same in rows of their own."""
    packed = tiny.random_batch([[10, 12], []], seed=15)

    def apart(x):
        return jnp.zeros_like(x).at[0, :10].set(x[0, :10]).at[1, :12].set(x[0, 10:22])

    unpacked = jax.tree.map(apart, packed)
    return packed, unpacked.replace(document_ids=jnp.minimum(unpacked.document_ids, 1))


def test_packing_does_not_change_the_targets_hidden_states_and_features():
    packed, unpacked = packed_and_unpacked()

    @jax.jit
    def run(batch):
        hidden = target_hidden(TARGET_PARAMS, batch.tokens, batch.positions, batch.document_ids, config=TARGET)
        return features_of(TARGET_PARAMS, batch), hidden

    together = jax.tree.map(lambda x: (x[0, :10], x[0, 10:22]), run(packed))
    apart = jax.tree.map(lambda x: (x[0, :10], x[1, :12]), run(unpacked))
    assert tiny.largest_difference(together, apart) < 1e-6


def test_packing_does_not_change_the_drafters_loss_and_gradients():
    packed, unpacked = map(with_features, packed_and_unpacked())
    first, second = [0, 3, 7], [0, 1, 6]
    together = sums_and_grads(
        PARAMS,
        packed,
        jnp.array([first + [10 + a for a in second] + [0, 0], [0] * 8]),
        jnp.array([[True] * 6 + [False] * 2, [False] * 8]),
    )
    apart = sums_and_grads(
        PARAMS, unpacked, jnp.array([first + [0] * 5, second + [0] * 5]), jnp.array([[True] * 3 + [False] * 5] * 2)
    )
    assert together[0].final.blocks == 6 and together[0].final.support > 6
    assert tiny.largest_difference(together, apart) < 1e-6


# ---------------------------------------------------------------------------------------------
# Transformations


def test_vmap_over_seeds_equals_a_loop():
    batch = with_features(tiny.random_batch([[8, 11], [24], []], seed=1))
    params = [tiny.drafter_params(seed=seed) for seed in (5, 6, 7)]
    rngs = jax.random.split(jax.random.key(0), 3)

    def run(params, rng):
        (loss, aux), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, HEAD, batch, rng, config=AUF)
        return loss, aux, grads

    together = jax.jit(jax.vmap(run))(jax.tree.map(lambda *x: jnp.stack(x), *params), rngs)
    apart = [loss_and_grads(p, batch, rng) for p, rng in zip(params, rngs, strict=True)]
    apart = jax.tree.map(lambda *x: jnp.stack(x), *apart)
    assert tiny.largest_difference(together, apart) < 1e-6
    assert len(set(apart[0].tolist())) == 3


def test_bfloat16_computes_nearly_the_same_loss():
    batch = with_features(tiny.random_batch([[8, 11], [24], []], seed=1))
    rng = jax.random.key(0)
    exact, _, _ = loss_and_grads(PARAMS, batch, rng)
    loss, _, grads = loss_and_grads(PARAMS, batch, rng, dataclasses.replace(AUF, dtype="bfloat16"))
    assert loss.dtype == jnp.float32 and abs(loss / exact - 1) < 0.05 and loss != exact
    assert all(g.dtype == jnp.float32 and jnp.isfinite(g).all() for g in jax.tree.leaves(grads))
