"""Domino: the recurrent head, the loss of its two branches, and decoding with it."""

import dataclasses
import functools
import itertools
import math
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import test_decoding
import test_objectives
import test_overfit
import tiny
from scipy.stats import chisquare

from specauf_jax import config as c
from specauf_jax.config import Objective
from specauf_jax.decoding.generate import generate
from specauf_jax.decoding.speculate import prefill, propose
from specauf_jax.decoding.state import Decoding, init_state
from specauf_jax.kernels.lm_head import frozen_head_scores
from specauf_jax.models.heads import dflash, domino
from specauf_jax.models.heads.domino import Domino, next_state, prefix_states
from specauf_jax.models.layers import init_kv_cache
from specauf_jax.models.target import TargetStep, init_target, target_features, target_head
from specauf_jax.objectives import LabelScores, ObjectiveSums, label_scores
from specauf_jax.training import loss as loss_module
from specauf_jax.training.blocks import Batch, eligible_anchors, make_blocks, sample_anchors
from specauf_jax.training.loss import LossConfig, block_hidden, loss_fn, loss_sums
from specauf_jax.training.step import init_state as init_training
from specauf_jax.training.step import lambda_base_schedule, make_optimizer, make_train_step

K = 5
COMMON = slice(1, 3)  # two tokens that texts and models both prefer: a third of the drafts is right
TARGET, TARGET_PARAMS = tiny.target_config(), tiny.target_params()
TARGET_PARAMS["lm_head"]["kernel"] = TARGET_PARAMS["lm_head"]["kernel"].at[:, COMMON].multiply(2.0)
HEAD = target_head(TARGET_PARAMS)
PARAMS = tiny.drafter_params(tiny.domino_config(), seed=2)
PARAMS["embed_proj"]["up"]["kernel"] = PARAMS["embed_proj"]["up"]["kernel"].at[:, COMMON].multiply(12.0)
OBJECTIVES = ("full", "decay", "auf", "auf_decay", "griffin", "dpace")
conventions = pytest.mark.parametrize("shift_label", [True, False], ids=["shifted", "unshifted"])


def loss_config(objective="auf", base_objective="auf", *, num_anchors=8, slot_chunk=7, **changes):
    """Of a drafter of blocks of 5; `changes` are the drafter's."""
    objective, base_objective = (Objective(x) if isinstance(x, str) else x for x in (objective, base_objective))
    return LossConfig(
        drafter=tiny.domino_config(**({"block_size": K} | changes)),
        objective=objective,
        base_objective=base_objective,
        num_anchors=num_anchors,
        slot_chunk=slot_chunk,
    )


def features_of(batch, target_params=TARGET_PARAMS, target=TARGET, layer_ids=(0, 1)):
    return target_features(
        target_params, batch.tokens, batch.positions, batch.document_ids, config=target, layer_ids=layer_ids
    )


with_features = jax.jit(lambda batch: batch.replace(features=features_of(batch)))


# ---------------------------------------------------------------------------------------------
# The recurrent unit


def gru_by_hand(params, embeddings):
    """h after every token, from 0, gate by gate as PyTorch documents nn.GRU without biases; float64 `[N, R]`."""
    w = np.asarray(params["prefix_gru"]["input"]["kernel"], np.float64).T  # weight_ih, [3R, D]
    u = np.asarray(params["prefix_gru"]["hidden"]["kernel"], np.float64).T  # weight_hh, [3R, R]
    R = u.shape[1]
    (w_r, w_z, w_n), (u_r, u_z, u_n) = ([x[i * R : (i + 1) * R] for i in range(3)] for x in (w, u))
    h, states = np.zeros(R), []
    for x in np.asarray(embeddings, np.float64):
        r = 1 / (1 + np.exp(-(w_r @ x + u_r @ h)))
        z = 1 / (1 + np.exp(-(w_z @ x + u_z @ h)))
        n = np.tanh(w_n @ x + r * (u_n @ h))
        h = (1 - z) * n + z * h
        states.append(h)
    return np.array(states)


def test_the_recurrent_unit_equals_pytorchs_formula_at_once_and_token_by_token():
    x = np.random.default_rng(0).normal(size=(2, 3, 6, TARGET.hidden_size)).astype(np.float32)
    expected = np.array([[gru_by_hand(PARAMS, block) for block in row] for row in x])
    np.testing.assert_allclose(jax.jit(prefix_states)(PARAMS, x), expected, atol=2e-6)
    step, state = jax.jit(next_state), jnp.zeros((2, 3, 10))
    for n in range(6):
        state = step(PARAMS, state, x[:, :, n])
        np.testing.assert_allclose(state, expected[:, :, n], atol=2e-6)
    assert 0.1 < np.abs(expected).mean() < 0.9  # neither idle nor saturated


# ---------------------------------------------------------------------------------------------
# The loss, by plain loops


@jax.jit
def slot_hidden(batch, anchors, keep):
    """z of all K slots, which depends neither on the convention of labels nor on the head: `[B, A, K, D]`."""
    config = loss_config()
    return block_hidden(PARAMS, HEAD, batch, make_blocks(batch, anchors, keep, config=config.drafter), config=config)


def block_by_hand(drafter, batch, z, b, anchor):
    """(label's index, label, base logits, final logits) of the slots of one block that predict something.

    Args:
      drafter: says how slots and labels belong together.
      batch: of numpy arrays.
      z: `[K, D]`, hidden states of the block.
      b, anchor: row and index.
    """
    tokens, prefix = batch.tokens[b], drafter.head.pure_draft_prefix_len
    embedding, lm_head = (np.asarray(x, np.float64) for x in (HEAD.embedding, HEAD.lm_head))
    down, up = (np.asarray(PARAMS["embed_proj"][name]["kernel"], np.float64) for name in ("down", "up"))
    for k in range(drafter.block_size):
        if drafter.head.shift_label:
            label, read, corrected = anchor + k + 1, tokens[anchor : anchor + k + 1], k >= prefix
        else:
            label, read, corrected = anchor + k, tokens[anchor : anchor + k], k >= 1 + prefix
            if k == 0:
                continue
        base = np.asarray(z[k], np.float64) @ lm_head
        s = gru_by_hand(PARAMS, embedding[read])[-1]
        inner = np.concatenate([z[k], s]) @ down
        final = base + inner / (1 + np.exp(-inner)) @ up if corrected else base
        yield label, tokens[label] if label < len(tokens) else 0, base, final


def seen_by_hand(config, batch, anchors, keep):
    """Of either branch, for every block `[B][A]`: valid, right, in the top 3, probability, of its labels in order."""
    batch = with_features(batch)
    z = np.asarray(slot_hidden(batch, anchors, keep))
    batch = jax.tree.map(np.asarray, batch)
    branches = {"final": np.empty(keep.shape, object), "base": np.empty(keep.shape, object)}
    for b, i in np.ndindex(keep.shape):
        anchor, blocks = int(anchors[b, i]), {"final": [], "base": []}
        for index, label, base, final in block_by_hand(config.drafter, batch, z[b, i], b, anchor):
            valid = bool(
                keep[b, i]
                and index < batch.tokens.shape[1]
                and batch.document_ids[b, index] == batch.document_ids[b, anchor]
                and batch.loss_mask[b, index]
                and label != tiny.MASK_TOKEN
            )
            for name, logits in (("final", final), ("base", base)):
                rank = np.sum(logits > logits[label])
                probability = math.exp(logits[label]) / np.exp(logits).sum()
                blocks[name].append((valid, valid and rank == 0, valid and rank < 3, probability))
        for name, slots in blocks.items():
            branches[name][b, i] = slots
    return branches


def weights_by_hand(objective, drafter, slots):
    """Of one block."""
    # The loops of test_objectives number labels from 1; their time constant follows the block, not the labels.
    if "decay" in objective.name:
        objective = dataclasses.replace(objective, gamma=objective.gamma or drafter.block_size / 2)
    valid, right, top, probability = ([None, *column] for column in zip(*slots, strict=True))
    count = len(slots) + 1
    return [test_objectives.oracle_weight(objective, n, count, probability, right, top, valid) for n in range(1, count)]


def branch_by_hand(objective, drafter, keep, own, witness):
    """LossAux of one branch as a dictionary, and the weights `[B, A, N]`."""
    count = dict.fromkeys(
        ("numerator", "denominator", "blocks", "emitted", "valid", "correct", "support", "support_correct"), 0.0
    )
    weights = np.zeros((*keep.shape, drafter.num_labels))
    for b, i in np.ndindex(keep.shape):
        slots, accepted, prefix = own[b, i], 0, True
        weights[b, i] = weights_by_hand(objective, drafter, witness[b, i])
        for n, (weight, (valid, right, _, probability)) in enumerate(zip(weights[b, i], slots, strict=True)):
            count["numerator"] -= weight * math.log(probability)
            count["denominator"] += valid if objective.name == "dpace" else weight
            count["valid"] += valid
            count["correct"] += right
            count["support"] += weight > 0
            count["support_correct"] += weight > 0 and right
            prefix = prefix and right
            accepted += prefix and n < drafter.block_size - 1
        count["blocks"] += bool(keep[b, i])
        count["emitted"] += accepted + 1 if keep[b, i] else 0
    return count, weights


def loss_by_hand(config, batch, anchors, keep):
    """Of the final and of the base branch: LossAux as a dictionary, and weights."""
    seen, drafter, keep = seen_by_hand(config, batch, anchors, keep), config.drafter, np.asarray(keep)
    witness = seen["base" if config.objective.witness == "base" else "final"]
    return (
        branch_by_hand(config.objective, drafter, keep, seen["final"], witness),
        branch_by_hand(config.base_objective, drafter, keep, seen["base"], seen["base"]),
    )


def check_aux(found, expected, name=""):
    for field, value in expected.items():
        np.testing.assert_allclose(found[field], value, rtol=1e-5, atol=1e-5, err_msg=f"{name} {field}")


def random_batch(*args, **kwargs):
    """`tiny.random_batch` with the two common tokens in place of four."""
    batch = tiny.random_batch(*args, **kwargs)
    return batch.replace(tokens=jnp.where((batch.tokens == 3) | (batch.tokens == 4), batch.tokens - 2, batch.tokens))


def fixed_blocks():
    """Documents, padding and holes in the loss mask; anchors at starts, ends and over the row's end; two not kept."""
    batch = random_batch([[8, 11], [24], [5, 7, 12]], seed=1, supervised=0.95)
    batch = batch.replace(tokens=batch.tokens.at[2, 15].set(tiny.MASK_TOKEN))
    anchors = jnp.array([[0, 3, 6, 7, 8, 11, 17, 9], [0, 1, 5, 9, 13, 20, 23, 11], [0, 3, 4, 6, 12, 14, 21, 22]])
    return batch, anchors, jnp.array([[True] * 7 + [False], [True] * 7 + [False], [True] * 8])


def drawn_blocks(seed, num_anchors=8):
    """A batch and the anchors that `loss_fn` draws from the key `seed`; one row has few, one has none."""
    batch = random_batch([[5, 9, 10], [24], [3, 2], []], seed=seed, supervised=0.9)
    eligible = eligible_anchors(batch.loss_mask, batch.document_ids)
    return batch, *sample_anchors(jax.random.key(seed), eligible, batch.document_ids, num_anchors)


@functools.partial(jax.jit, static_argnames="config")
def loss_and_aux(batch, rng, lambda_base, config):
    return loss_fn(PARAMS, HEAD, with_features(batch), rng, config=config, lambda_base=lambda_base)


@functools.partial(jax.jit, static_argnames="config")
def sums_at(batch, anchors, keep, config):
    return loss_sums(PARAMS, HEAD, with_features(batch), anchors, keep, config=config)


@conventions
@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_the_loss_of_two_branches_equals_plain_loops(shift_label, prefix):
    config = loss_config("auf_decay", "auf", shift_label=shift_label, pure_draft_prefix_len=prefix)
    different = right = 0
    for seed, share in ((0, 0.3), (1, 1.0), (2, 0.0)):
        batch, anchors, keep = drawn_blocks(seed)
        (final, _), (base, _) = loss_by_hand(config, batch, anchors, keep)
        value, aux = loss_and_aux(batch, jax.random.key(seed), jnp.float32(share), config)
        check_aux(aux.final, final, "final")
        check_aux(aux.base, base, "base")
        whole = (1 - share) * final["numerator"] / final["denominator"]
        whole += share * base["numerator"] / base["denominator"]
        np.testing.assert_allclose(value, whole, rtol=1e-5)
        different += final["correct"] != base["correct"]
        right += base["support_correct"]
    assert different and right > 15


@conventions
def test_blocks_over_the_end_of_documents_and_rows_and_holes_and_blocks_that_are_not_kept(shift_label):
    config = loss_config("decay", "auf", shift_label=shift_label)
    (final, _), (base, _) = loss_by_hand(config, *fixed_blocks())
    numerators, aux = sums_at(*fixed_blocks(), config)
    check_aux(aux.final, final, "final")
    check_aux(aux.base, base, "base")
    np.testing.assert_allclose(
        [numerators["final"], numerators["base"]], [final["numerator"], base["numerator"]], rtol=1e-5
    )
    assert base["valid"] < 0.8 * base["blocks"] * config.drafter.num_labels


def test_every_combination_of_objectives_and_witness_equals_plain_loops():
    batch, anchors, keep = drawn_blocks(2)
    batch = with_features(batch)
    hidden = slot_hidden(batch, anchors, keep)
    finals = [Objective(name) for name in OBJECTIVES] + [Objective(name, witness="base") for name in OBJECTIVES[2:]]
    configs = [
        loss_config(final, base, slot_chunk=9999, shift_label=False, pure_draft_prefix_len=0)
        for final, base in itertools.product(finals, OBJECTIVES)
    ]

    @jax.jit
    def every(batch, anchors, keep):
        with mock.patch.object(loss_module, "block_hidden", lambda *_, **__: hidden):  # compiled once for all
            return [loss_sums(PARAMS, HEAD, batch, anchors, keep, config=config)[1] for config in configs]

    seen, drafter, keep = seen_by_hand(configs[0], batch, anchors, keep), configs[0].drafter, np.asarray(keep)
    by_hand = {
        objective: branch_by_hand(
            objective, drafter, keep, seen["final"], seen["base" if objective.witness == "base" else "final"]
        )[0]
        for objective in finals
    }
    base_by_hand = {
        name: branch_by_hand(Objective(name), drafter, keep, seen["base"], seen["base"])[0] for name in OBJECTIVES
    }
    for config, aux in zip(configs, every(batch, anchors, jnp.asarray(keep)), strict=True):
        name = f"{config.objective} {config.base_objective.name}"
        check_aux(aux.final, by_hand[config.objective], name)
        check_aux(aux.base, base_by_hand[config.base_objective.name], name)
    for name in OBJECTIVES[2:]:
        own, base = (by_hand[Objective(name, witness=witness)] for witness in ("own", "base"))
        assert own["numerator"] != pytest.approx(base["numerator"], rel=1e-3)  # the witness matters


BY_HAND = {  # final objective, base objective, digits of the final's support, of the base's
    "baseline": (Objective("decay"), Objective("decay"), "1111", "1111"),
    "B-AUF": (Objective("full"), Objective("auf"), "1111", "1100"),
    "S-AUF": (Objective("auf", witness="base"), Objective("auf"), "1100", "1100"),
    "F-AUF": (Objective("auf"), Objective("auf"), "1110", "1100"),
    "B-AUF+D": (Objective("decay"), Objective("auf_decay"), "1111", "1100"),
}
FADING = (1, 0.6703200, 0.4493290, 0.3011942)  # exp(-n / 2.5): half of a block of 5


def one_block(config, base, final):
    """Numerators and LossAux of a single block whose cross-entropies and ranks are given."""
    batch = random_batch([[K + 1]], length=K + 1, supervised=1.0)
    with (
        mock.patch.object(loss_module, "block_hidden", lambda *_, **__: jnp.zeros((1, 1, K, TARGET.hidden_size))),
        mock.patch.object(Domino, "training_scores", lambda *_, **__: {"final": final, "base": base}),
    ):
        return loss_sums(PARAMS, HEAD, batch, jnp.array([[0]]), jnp.array([[True]]), config=config)


@pytest.mark.parametrize("name", BY_HAND)
def test_the_five_variants_by_hand(name):
    """One block of four labels: the base is wrong at the second, the corrected drafts are wrong at the third."""
    final, base, *supports = BY_HAND[name]
    ce = jnp.array([[[1.0, 10.0, 100.0, 1000.0]]])  # the numerator's digits show what was counted
    seen = LabelScores(ce, jnp.array([[[0, 1, 0, 0]]])), LabelScores(2 * ce, jnp.array([[[0, 0, 1, 0]]]))
    numerators, aux = one_block(loss_config(final, base, shift_label=False), *seen)
    for branch, objective, support, scale in zip((aux.final, aux.base), (final, base), supports, (2, 1), strict=True):
        weights = [int(digit) for digit in support]
        if "decay" in objective.name:
            weights = [w * fading for w, fading in zip(weights, FADING, strict=True)]
        numerator = scale * sum(w * 10**n for n, w in enumerate(weights))
        np.testing.assert_allclose([branch.numerator, branch.denominator], [numerator, sum(weights)], rtol=1e-6)
        assert branch.support == support.count("1")
    assert numerators == {"final": aux.final.numerator, "base": aux.base.numerator}
    assert (aux.final.emitted, aux.base.emitted) == (3, 2)


@conventions
def test_a_block_without_failure_emits_as_many_tokens_as_a_round_can(shift_label):
    """K, also where K labels are trained and all of them are right."""
    config = loss_config(shift_label=shift_label)
    N = config.drafter.num_labels
    seen = LabelScores(jnp.ones((1, 1, N)), jnp.zeros((1, 1, N), int))
    _, aux = one_block(config, seen, seen)
    assert aux.final.emitted == aux.base.emitted == K
    assert aux.final.support == aux.final.correct == aux.final.valid == N == K - (not shift_label)


# ---------------------------------------------------------------------------------------------
# Gradients


def test_supports_and_weights_are_constants_to_the_gradient():
    """The weights that plain loops find, put in the place of the objective's own; dpace has most ways for a leak."""
    config = loss_config(Objective("dpace", witness="base"), "dpace")
    batch, anchors, keep = drawn_blocks(2)
    rng, batch = jax.random.key(2), with_features(batch)
    (final, final_weights), (base, base_weights) = loss_by_hand(config, batch, anchors, keep)

    def gradient():
        loss = functools.partial(loss_fn, config=config, lambda_base=0.4)
        return jax.jit(jax.grad(lambda params: loss(params, HEAD, batch, rng)[0]))(PARAMS)

    def held(objective, scores, valid, **_):
        weights, denominator = constants.pop(0)
        return ObjectiveSums(
            numerator=(weights * scores.cross_entropy).sum(), denominator=jnp.float32(denominator), weights=weights
        )

    found = gradient()
    constants = [(jnp.float32(final_weights), final["denominator"]), (jnp.float32(base_weights), base["denominator"])]
    with mock.patch.object(loss_module, "objective_sums", held):
        expected = gradient()
    assert not constants
    assert tiny.largest_difference(found, expected) < 1e-5


def test_lambda_falls_linearly_from_one_to_zero_and_stays_there():
    def shares(steps, ratio, at):
        schedule = lambda_base_schedule(c.TrainOptimisation(steps=steps, lambda_base_decay_ratio=ratio), Domino())
        return [float(schedule(jnp.asarray(step, jnp.int32))) for step in at]

    np.testing.assert_allclose(shares(100, 1.0, [0, 1, 25, 99, 100]), [1, 0.99, 0.75, 0.01, 0], atol=1e-6)
    np.testing.assert_allclose(shares(100, 0.4, [0, 10, 39, 40, 41, 100]), [1, 0.75, 0.025, 0, 0, 0], atol=1e-6)
    assert shares(100, 0.4, [0, 40, 41, 100, 1000]) == [1, 0, 0, 0, 0]
    assert shares(100, 0.0, [0, 1, 100]) == [0, 0, 0]  # no base branch
    assert shares(100, None, [0, 25, 100]) == [1, 0.75, 0]


SETTINGS = c.TrainOptimisation(steps=10, learning_rate=1e-2, warmup_ratio=0.2, weight_decay=0.1)
OPTIMIZER = optax.chain(  # whose state begins with the gradient
    optax.GradientTransformation(lambda params: params, lambda grads, _, __: (grads, grads)), make_optimizer(SETTINGS)
)
ROWS = [[24], [8, 11], [], [3, 2], [20], [5, 5, 5], [1, 1, 1], [24]]
HEADS = ("prefix_gru", "embed_proj")


@functools.cache
def train_step(accumulation):
    config = loss_config("auf_decay", "auf", num_anchors=5)
    step = make_train_step(
        config,
        TARGET,
        OPTIMIZER,
        accumulation=accumulation,
        seed=7,
        lambda_base=lambda_base_schedule(SETTINGS, Domino()),
    )
    return jax.jit(step)


def trained(accumulation, step):
    state = init_training(PARAMS, OPTIMIZER).replace(step=jnp.asarray(step, jnp.int32))
    return train_step(accumulation)(state, TARGET_PARAMS, random_batch(ROWS))


@functools.cache
def gradient_of_loss(step):
    """loss_fn at the anchors of a training step, with λ as data."""
    config = loss_config("auf_decay", "auf", num_anchors=5)
    batch, rng = random_batch(ROWS), jax.random.fold_in(jax.random.key(7), step)
    return _loss_and_gradient(with_features(batch), rng, jnp.float32(1 - step / 10), config)


@functools.partial(jax.jit, static_argnames="config")
def _loss_and_gradient(batch, rng, share, config):
    return jax.value_and_grad(loss_fn, has_aux=True)(PARAMS, HEAD, batch, rng, config=config, lambda_base=share)


def test_a_step_is_the_gradient_of_both_branches_by_their_shares():
    new, metrics = trained(1, step=3)
    (loss, aux), grads = gradient_of_loss(step=3)
    assert tiny.largest_difference(new.opt_state[0], grads) < 1e-6
    expected = aux.measures() | {
        "final_loss": aux.final.numerator / aux.final.denominator,
        "lambda_base": 0.7,
        "loss": loss,
    }
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-6, err_msg=name)
    base = aux.base.numerator / aux.base.denominator
    np.testing.assert_allclose(metrics["base_loss"], base, rtol=1e-6)
    np.testing.assert_allclose(loss, 0.3 * expected["final_loss"] + 0.7 * base, rtol=1e-6)
    assert not any(metrics["nonfinite"].values())
    assert not any(tiny.same_bits(x, y) for x, y in zip(*map(jax.tree.leaves, (new.params, PARAMS)), strict=True))


@pytest.mark.parametrize("accumulation", [2, 4])
def test_accumulation_changes_nothing_though_the_parts_of_both_branches_have_unequal_counts(accumulation):
    new, metrics = trained(1, step=3)
    accumulated, its_metrics = trained(accumulation, step=3)
    assert tiny.largest_difference(accumulated.opt_state[0], new.opt_state[0]) < 3e-6
    # Adam divides by the size of a gradient, be it no more than rounding: compared with what it makes of this one.
    optimizer, grads = make_optimizer(SETTINGS), accumulated.opt_state[0]
    updates, _ = optimizer.update(grads, optimizer.init(PARAMS), PARAMS)
    assert tiny.largest_difference(accumulated.params, optax.apply_updates(PARAMS, updates)) < 1e-7
    assert metrics.keys() == its_metrics.keys()
    assert tiny.largest_difference(its_metrics, metrics) < 1e-6


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_head_learns_from_the_final_branch_alone(accumulation):
    """At step 0 λ is 1, at the last it is 0."""
    for step, moved in ((0, False), (10, True)):
        new, metrics = trained(accumulation, step)
        assert metrics["lambda_base"] == 1 - step / 10
        grads = new.opt_state[0]
        assert all(bool(g.any()) == moved for name in HEADS for g in jax.tree.leaves(grads[name]))
        assert all(g.any() for name in grads.keys() - set(HEADS) for g in jax.tree.leaves(grads[name]))
        which = "final_loss" if moved else "base_loss"
        np.testing.assert_allclose(metrics["loss"], metrics[which], rtol=1e-6)


# ---------------------------------------------------------------------------------------------
# What the logits depend on


@functools.partial(jax.jit, static_argnames=("config", "target"))
def trained_logits(params, target_params, batch, anchors, keep, *, config, target=TARGET):
    """Base and final logits `[B, A, N, V]` of training; of a plain drafter twice the same."""
    seen, logits_of = [], []  # of a Domino drafter the final ones, then the base ones

    def plain(hidden, lm_head, *arguments, **kwargs):
        seen.append((hidden @ lm_head, hidden @ lm_head))
        return frozen_head_scores(hidden, lm_head, *arguments, **kwargs)

    def corrected(logits, labels, *others):
        logits_of.append(logits)
        return label_scores(logits, labels, *others)

    def whole(scores, arrays, *, chunk):
        return scores(*arrays)

    batch = batch.replace(features=features_of(batch, target_params, target, config.drafter.target_layer_ids))
    with (
        mock.patch.object(dflash, "frozen_head_scores", plain),
        mock.patch.object(domino, "label_scores", corrected),
        mock.patch.object(domino, "chunked_scores", whole),
    ):
        loss_sums(params, target_head(target_params), batch, anchors, keep, config=config)
    return seen[0] if seen else logits_of[::-1]


@conventions
def test_base_logits_see_nothing_behind_the_anchor_and_final_logits_the_tokens_before_their_label(shift_label):
    """Every token is changed in turn: logits move exactly where they may, and elsewhere not by one bit."""
    config = loss_config(shift_label=shift_label, pure_draft_prefix_len=1)
    batch, anchors, _ = jax.tree.map(lambda x: x[:2], fixed_blocks())
    N = config.drafter.num_labels

    def logits(batch):
        return map(np.asarray, trained_logits(PARAMS, TARGET_PARAMS, batch, anchors, anchors >= 0, config=config))

    before, ids, at = list(logits(batch)), np.asarray(batch.document_ids), np.asarray(anchors)
    label = at[..., None] + 1 + np.arange(N)
    own = np.take_along_axis(ids, at, 1)[..., None]
    rows = np.arange(2)[:, None, None]
    labelled = (label < 24) & (ids[rows, np.minimum(label, 23)] == own)  # others have no label in their document
    for row, index in np.ndindex(batch.tokens.shape):
        other = (int(batch.tokens[row, index]) + 5) % (tiny.MASK_TOKEN - 1)
        after = logits(batch.replace(tokens=batch.tokens.at[row, index].set(other)))
        base_moved, final_moved = ((x != y).any(-1) & labelled for x, y in zip(after, before, strict=True))
        expected = np.zeros(labelled.shape, bool)
        context = (ids[row, index] == own[row, :, 0]) & (index < at[row])
        expected[row] = (context | (index == at[row]))[:, None] & labelled[row]
        np.testing.assert_array_equal(base_moved, expected, err_msg=f"base: token {index} of row {row}")
        fed = (index > at[row, :, None]) & (index < label[row]) & (np.arange(N) >= 1)
        expected[row] |= fed & labelled[row]
        np.testing.assert_array_equal(final_moved, expected, err_msg=f"final: token {index} of row {row}")


# ---------------------------------------------------------------------------------------------
# Training meets decoding


WINDOWS = {"num_hidden_layers": 3, "layer_types": ("sliding_attention", "full_attention", "sliding_attention")}
SERVED = {
    "shifted": {"shift_label": True},
    "unshifted": {"shift_label": False},
    "shifted, first three as they are": {"shift_label": True, "pure_draft_prefix_len": 3},
    "unshifted, with windows": {"shift_label": False, "pure_draft_prefix_len": 0, "sliding_window": 6, **WINDOWS},
    "plain, with windows": {"head": "dflash", "sliding_window": 5, **WINDOWS},
}


def proposed(params, drafter, texts, anchors):
    """Drafts and their logits after `texts[:, : anchor + 1]`, by the functions of decoding."""
    config = Decoding(target_step=TargetStep(TARGET, drafter.target_layer_ids), drafter=drafter)
    R, S = texts.shape

    @jax.jit
    def run(texts, anchors):
        keys, how = jax.random.split(jax.random.key(0), R), (jnp.float32(0), jnp.int32(0), jnp.float32(1))
        caches = {"target_cache": config.target_step.init_cache(R, S + K), "drafter_cache": None}
        caches["drafter_cache"] = init_kv_cache(drafter, R, S + K, jnp.float32)
        state = init_state(texts, anchors + 1, anchors + 2, keys, how, **caches)
        state = prefill(params, TARGET_PARAMS, state, config=config)
        anchor = jnp.take_along_axis(texts, anchors[:, None], axis=1)
        return propose(params, TARGET_PARAMS, state, anchor, keys, config=config)

    return run(texts, anchors)


@pytest.mark.parametrize("changes", SERVED.values(), ids=SERVED)
def test_training_logits_equal_decoding_logits(changes):
    """Documents in packed rows against the same prompts alone; the text goes on with exactly what was drafted."""
    make = tiny.drafter_config if "head" in changes else tiny.domino_config
    drafter = make(block_size=K, **{name: value for name, value in changes.items() if name != "head"})
    params = tiny.drafter_params(drafter, seed=2)
    batch = random_batch([[7, 17, 8]] * 5, length=32, seed=4, supervised=1.0)
    anchors = jnp.array([0, 2, 7, 11, 12])
    proposal = proposed(params, drafter, batch.tokens[:, 7:24], anchors)
    index = 7 + anchors[:, None]
    tokens = batch.tokens.at[jnp.arange(5)[:, None], index + 1 + jnp.arange(K - 1)].set(proposal.tokens)
    assert (tokens != batch.tokens).any(1).all()
    batch = batch.replace(tokens=tokens)

    def trained(drafter):
        config = LossConfig(drafter=drafter, objective=Objective(), slot_chunk=7)
        return trained_logits(params, TARGET_PARAMS, batch, index, index > 0, config=config)[-1][:, 0, : K - 1]

    np.testing.assert_allclose(trained(drafter), proposal.logits, atol=1e-5 * float(jnp.abs(proposal.logits).max()))
    np.testing.assert_array_equal(trained(drafter).argmax(-1), proposal.tokens)
    if "sliding_window" in changes:
        full = dataclasses.replace(drafter, layer_types=("full_attention",) * 3)
        moved = jnp.abs(trained(full) - proposal.logits).max((1, 2))
        assert (moved > 0.1).all()


# ---------------------------------------------------------------------------------------------
# Decoding

SERVING = test_decoding.TARGET


@functools.cache
def serving_target(taste=3.0):
    """Parameters of a target with `taste` for three tokens, so that random drafters are right now and then."""
    params = test_decoding.sharpened(init_target(SERVING, jax.random.key(0)), 6.0)
    return params | {"embed_tokens": {"embedding": params["embed_tokens"]["embedding"].at[1:4].multiply(taste)}}


def serving_drafter(shift_label, prefix=1, **changes):
    """A random drafter of blocks of 4 and its parameters."""
    drafter = tiny.domino_config(
        SERVING, target_layer_ids=(0, 2), shift_label=shift_label, pure_draft_prefix_len=prefix, **changes
    )
    params = tiny.drafter_params(drafter, seed=3)
    params["embed_proj"]["up"]["kernel"] *= 4.0
    return drafter, params


def decoding(drafter, **kwargs):
    return Decoding(target_step=TargetStep(SERVING, (0, 2)), drafter=drafter, **kwargs)


@functools.cache
def own_words(longest=24):
    """Prompts of different lengths, and how the target alone continues them."""
    prompts = test_decoding.prompts(6, seed=1, longest=14)
    return prompts, [test_decoding.greedy_by_hand(serving_target(), prompt, longest) for prompt in prompts]


def drafted_by_training(drafter, params, texts, anchors):
    """The best token of each label by training's final logits, one fed after the other: `[R, K-1]`."""
    config = LossConfig(drafter=drafter, objective=Objective(), slot_chunk=4)
    tokens, rows, drafts = np.array(texts), np.arange(len(texts)), []
    for n in range(drafter.block_size - 1):
        ones = jnp.ones(tokens.shape, jnp.int32)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        batch = Batch(tokens=jnp.asarray(tokens), loss_mask=ones > 0, document_ids=ones, positions=positions)
        at = jnp.asarray(anchors)[:, None]
        *_, final = trained_logits(params, serving_target(), batch, at, at >= 0, config=config, target=SERVING)
        drafts.append(np.asarray(final)[:, 0, n].argmax(-1))
        tokens[rows, anchors + 1 + n] = drafts[-1]
    return np.stack(drafts, 1)


def accepted_by_hand(drafter, params, prompts, texts, lengths):
    """Of every prompt and round the drafts that agree with the target's own text, before any stop."""
    places = [(i, len(prompts[i]) - 1 + n) for i, length in enumerate(lengths) for n in range(length)]
    rows, anchors = np.zeros((120, 40), np.int32), np.zeros(120, np.int32)  # one shape, one compilation
    for row, (i, at) in enumerate(places):
        rows[row, : at + 1], anchors[row] = (prompts[i] + texts[i])[: at + 1], at
    drafts = dict(zip(places, drafted_by_training(drafter, params, rows, anchors), strict=False))
    accepted = []
    for i, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        at, rounds = len(prompt) - 1, []
        while at + 1 < len(prompt) + length:
            right = drafts[i, at] == (prompt + texts[i])[at + 1 : at + drafter.block_size]
            rounds.append(int(np.cumprod(right).sum()))
            at += 1 + rounds[-1]
        accepted.append(rounds)
    return accepted


@conventions
@pytest.mark.parametrize("prefix", [0, 2])
def test_greedy_speculation_writes_the_targets_own_words(shift_label, prefix):
    """Prompts of different lengths in batches, with and without a stop token; accepted drafts are counted right."""
    drafter, params = serving_drafter(shift_label, prefix)
    prompts, texts = own_words()
    stop = int(np.bincount(np.concatenate([text[4:16] for text in texts]), minlength=17).argmax())
    for stops in ((), (stop,)):
        expected = [text[:20] for text in texts]
        expected = [text[: text.index(stop) + 1] if {*stops} & {*text} else text for text in expected]
        config = decoding(drafter, stop_tokens=stops)
        found = generate(params, serving_target(), prompts, config=config, max_new_tokens=20, batch_size=4)
        assert [g.tokens for g in found] == expected
        assert [g.accepted for g in found] == accepted_by_hand(
            drafter, params, prompts, texts, [len(text) for text in expected]
        )
        if not stops:
            assert {0, 1, 2} <= {n for g in found for n in g.accepted}
    assert len({len(text) for text in expected}) > 2


def assert_law(found, target, sampling, least=30):
    """Chi-square of 3-token continuations of one prompt, rare ones pooled, of which `least` kinds must be left."""
    prompt, draws = found[0].prompt, len(found)
    outcomes = np.ravel_multi_index(np.asarray([g.tokens for g in found]).T, (17,) * 3)
    observed = np.bincount(outcomes, minlength=17**3)
    law = test_decoding.enumerated_law(target, prompt, 3, sampling)
    assert not observed[law == 0].any()
    common = law * draws >= 8
    expected = np.append(law[common], law[~common].sum()) * draws
    seen = np.append(observed[common], observed[~common].sum())
    kept = expected > 0
    assert kept.sum() > least and chisquare(seen[kept], expected[kept]).pvalue > 0.01


@conventions
def test_sampled_speculation_follows_the_targets_law(shift_label):
    """Chi-square of 3-token continuations, rare ones pooled, against enumeration."""
    drafter, params = serving_drafter(shift_label)
    target, sampling, prompt, draws = serving_target(1.0), c.Sampling(1.0, top_k=4), [3, 1, 4], 3000
    found = generate(params, target, [prompt] * draws, config=decoding(drafter), max_new_tokens=3,
                     sampling=sampling, seed=1, batch_size=draws)  # fmt: skip
    assert {0, 1, 2} <= {n for g in found for n in g.accepted}
    assert_law(found, target, sampling)


@conventions
def test_one_text_learnt_by_heart_decodes_at_tau_k(shift_label):
    """With λ falling over the whole run."""
    head = Domino(shift_label=shift_label, emb_dim=8, gru_hidden_dim=16)
    share = lambda_base_schedule(c.TrainOptimisation(steps=test_overfit.STEPS), head)
    assert test_overfit.learn_by_heart(head, "auf", base=Objective(), lambda_base=share) == 0
