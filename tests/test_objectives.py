import doctest
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specauf_jax import objectives
from specauf_jax.config import Objective, decay_gamma
from specauf_jax.objectives import (
    LabelScores,
    accept_until_fail_mask,
    label_scores,
    objective_sums,
    prefix_acceptance,
    slot_weights,
)

OBJECTIVES = {
    "full": Objective("full"),
    "decay": Objective("decay"),
    "decay, own gamma": Objective("decay", gamma=2.5),
    "auf": Objective("auf"),
    "auf_decay": Objective("auf_decay"),
    "griffin": Objective("griffin"),
    "griffin, top 2": Objective("griffin", griffin_top_n=2),
    "dpace, slots": Objective("dpace"),
    "dpace, rows": Objective("dpace", dpace_alpha=0.2, dpace_denominator="rows"),
}
ALL = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES.keys())
LN2 = math.log(2)


# ---------------------------------------------------------------------------------------------
# The oracle: the papers' equations, one slot at a time


def oracle_weight(objective, k, K, probability, correct, in_top_n, valid):
    """Weight of slot k (1..K-1); the lists are indexed by k, index 0 unused."""
    if not valid[k]:
        return 0.0
    gamma = objective.gamma or {16: 7, 10: 5, 8: 4}.get(K, K / 2)
    if objective.name == "full":
        return 1.0
    if objective.name == "decay":
        return math.exp(-(k - 1) / gamma)
    if objective.name in ("auf", "auf_decay", "griffin"):
        for j in range(1, k):
            passed = in_top_n[j] if objective.name == "griffin" else correct[j]
            if not (valid[j] and passed):
                return 0.0
        return math.exp(-(k - 1) / gamma) if objective.name == "auf_decay" else 1.0
    assert objective.name == "dpace"
    total = 0.0
    for j in range(k, K):
        product = 1.0
        for i in range(1, j + 1):
            alpha = objective.dpace_alpha
            product *= (1 - alpha) * probability[i] + alpha if valid[i] else 1.0
        total += product if valid[j] else 0.0
    return total


def oracle(objective, K, logits, labels, valid):
    """Weights, numerator and denominator of `[B, A, K-1]` slots, in float64."""
    B, A = labels.shape[:2]
    weights = np.zeros(labels.shape)
    numerator = weight_sum = slots = 0.0
    for b in range(B):
        for a in range(A):
            probability, correct, in_top_n, v = [None], [None], [None], [None]
            for k in range(1, K):
                row = [float(x) for x in logits[b, a, k - 1]]
                label = int(labels[b, a, k - 1])
                probability.append(math.exp(row[label]) / sum(math.exp(x) for x in row))
                order = sorted(range(len(row)), key=lambda token, row=row: (-row[token], token))
                correct.append(order[0] == label)
                in_top_n.append(label in order[: objective.griffin_top_n])
                v.append(bool(valid[b, a, k - 1]))
            for k in range(1, K):
                weight = oracle_weight(objective, k, K, probability, correct, in_top_n, v)
                weights[b, a, k - 1] = weight
                numerator += weight * -math.log(probability[k])
                weight_sum += weight
                slots += v[k]
    if objective.name != "dpace":
        return weights, numerator, weight_sum
    return weights, numerator, slots if objective.dpace_denominator == "slots" else float(B)


BLOCK_KINDS = ("mixed", "right", "wrong", "gaps", "cut", "empty")


def random_blocks(rng, K, B=2, A=4, V=11):
    """Logits, labels and valid slots of blocks of all kinds; one row in four has no valid slot at all."""
    logits = rng.normal(size=(B, A, K - 1, V)) * 2
    if rng.random() < 0.5:
        logits = np.round(logits)  # many ties
    logits = logits.astype(np.float32)
    labels = rng.integers(0, V, (B, A, K - 1), dtype=np.int32)
    valid = np.ones((B, A, K - 1), bool)
    for b in range(B):
        for a in range(A):
            kind = BLOCK_KINDS[rng.integers(len(BLOCK_KINDS))]
            best, worst = logits[b, a].argmax(-1), logits[b, a].argmin(-1)
            labels[b, a] = worst if kind == "wrong" else best
            if kind in ("mixed", "gaps", "cut"):
                other = rng.random(K - 1) < 0.3
                labels[b, a, other] = rng.integers(0, V, other.sum())
            if kind == "gaps":
                valid[b, a] = rng.random(K - 1) < 0.7
            elif kind == "cut":
                valid[b, a, rng.integers(1, K) :] = False
            elif kind == "empty":
                valid[b, a] = False
        if rng.random() < 0.25:
            valid[b] = False
    return logits, labels, valid


@functools.partial(jax.jit, static_argnames=("objective", "K"))
def sums_of_logits(logits, labels, valid, objective, K):
    ce, rank = label_scores(logits, labels)
    return objective_sums(objective, LabelScores(ce, rank), valid, block_size=K)


@ALL
def test_every_objective_equals_plain_loops_over_the_equations(objective):
    rng = np.random.default_rng(0)
    support = 0
    for K in (4, 16):
        for _ in range(15):
            logits, labels, valid = random_blocks(rng, K)
            sums = sums_of_logits(logits, labels, valid, objective, K)
            weights, numerator, denominator = oracle(objective, K, logits, labels, valid)
            np.testing.assert_allclose(sums.weights, weights, rtol=2e-5)
            np.testing.assert_allclose(sums.numerator, numerator, rtol=2e-5)
            np.testing.assert_allclose(sums.denominator, denominator, rtol=2e-5)
            assert sums.weights.dtype == sums.numerator.dtype == sums.denominator.dtype == jnp.float32
            support += (weights > 0).sum()
    assert support > 500


# Four slots; probabilities of the labels 1/2, 1/4, 1/2, 1/4, so cross-entropies of 1, 2, 1, 2 times ln 2.
CROSS_ENTROPY = LN2 * np.array([[1, 2, 1, 2]], np.float32)
# exp(-1/7), exp(-2/7), exp(-3/7)
E1, E2, E3 = 0.8668779, 0.7514773, 0.6514391

FAILS_AT_THE_SECOND_SLOT = {  # objective: weights, numerator, denominator
    "full": ([1, 1, 1, 1], 4.158883, 4),
    "decay": ([1, E1, E2, E3], 3.318866, 3.269794),
    "auf": ([1, 1, 0, 0], 2.079442, 2),
    "auf_decay": ([1, E1, 0, 0], 1.894895, 1.866878),
    "griffin": ([1, 1, 1, 0], 2.772589, 3),  # ranks 0, 2, 3, 0: the third slot is the first outside the top 3
    "dpace": ([1.7900390625, 1.0400390625, 0.5712890625, 0.2197265625], 3.383154, 4),
}
SECOND_SLOT_UNSUPERVISED = {  # all slots right
    "full": ([1, 0, 1, 1], 2.772589, 3),
    "decay": ([1, 0, E2, E3], 2.117118, 2.402916),
    "auf": ([1, 0, 0, 0], 0.693147, 1),
    "auf_decay": ([1, 0, 0, 0], 0.693147, 1),
    "griffin": ([1, 0, 0, 0], 0.693147, 1),
    "dpace": ([1.6640625, 0, 0.9140625, 0.3515625], 2.274389, 3),
}


@pytest.mark.parametrize("name", FAILS_AT_THE_SECOND_SLOT)
def test_by_hand_a_block_that_fails_at_its_second_slot(name):
    valid = np.array([[True, True, True, True]])
    sums = objective_sums(Objective(name), LabelScores(CROSS_ENTROPY, np.array([[0, 2, 3, 0]])), valid, block_size=16)
    weights, numerator, denominator = FAILS_AT_THE_SECOND_SLOT[name]
    np.testing.assert_allclose(sums.weights, [weights], rtol=1e-6)
    np.testing.assert_allclose([sums.numerator, sums.denominator], [numerator, denominator], rtol=1e-6)


@pytest.mark.parametrize("name", SECOND_SLOT_UNSUPERVISED)
def test_by_hand_a_block_all_right_with_an_unsupervised_second_slot(name):
    valid = np.array([[True, False, True, True]])
    sums = objective_sums(Objective(name), LabelScores(CROSS_ENTROPY, np.zeros((1, 4), int)), valid, block_size=16)
    weights, numerator, denominator = SECOND_SLOT_UNSUPERVISED[name]
    np.testing.assert_allclose(sums.weights, [weights], rtol=1e-6)
    np.testing.assert_allclose([sums.numerator, sums.denominator], [numerator, denominator], rtol=1e-6)


def test_dpace_can_divide_by_rows():
    objective = Objective("dpace", dpace_denominator="rows")
    ce, rank, valid = np.ones((3, 2, 4)), np.zeros((3, 2, 4), int), np.ones((3, 2, 4), bool)
    assert objective_sums(objective, LabelScores(ce, rank), valid, block_size=5).denominator == 3


# ---------------------------------------------------------------------------------------------
# Parts


def test_decay_has_the_time_constants_of_the_paper():
    assert [decay_gamma(Objective(), K) for K in (16, 10, 8, 4)] == [7, 5, 4, 2]
    assert decay_gamma(Objective("decay", gamma=3.0), 16) == 3


@pytest.mark.parametrize(
    ("correct", "valid", "expected"),
    [
        ("1111", "1111", "1111"),
        ("0111", "1111", "1000"),
        ("1101", "1111", "1110"),
        ("1110", "1111", "1111"),
        ("0000", "1111", "1000"),
        ("1111", "1011", "1000"),  # after an invalid slot nothing is reached
        ("1111", "0111", "0000"),
        ("1111", "1100", "1100"),  # cut by the end of the document
        ("1011", "1100", "1100"),
        ("1111", "0000", "0000"),
    ],
)
def test_accept_until_fail_mask_by_hand(correct, valid, expected):
    bits = [np.array([c == "1" for c in text]) for text in (correct, valid)]
    mask = accept_until_fail_mask(*map(jnp.asarray, bits))
    assert "".join(str(int(x)) for x in mask) == expected
    assert mask.dtype == bool


def test_accept_until_fail_mask_and_prefix_acceptance_of_random_blocks():
    rng = np.random.default_rng(1)
    draft, target = rng.integers(0, 2, (2, 5, 50, 6))
    valid = rng.random((5, 50, 6)) < 0.8
    mask = np.asarray(accept_until_fail_mask(jnp.asarray(draft == target), jnp.asarray(valid)))
    accepted = np.asarray(prefix_acceptance(jnp.asarray(draft), jnp.asarray(target)))
    assert accepted.dtype == np.int32 and accepted.shape == (5, 50)
    for b, a in np.ndindex(5, 50):
        alive, count, run = True, 0, True
        for k in range(6):
            assert mask[b, a, k] == (alive and valid[b, a, k])
            alive = alive and valid[b, a, k] and draft[b, a, k] == target[b, a, k]
            run = run and draft[b, a, k] == target[b, a, k]
            count += run
        assert accepted[b, a] == count


def test_prefix_acceptance_by_hand():
    target = jnp.array([7, 8, 9])
    drafts = jnp.array([[7, 8, 9], [7, 8, 0], [7, 0, 9], [0, 8, 9], [0, 0, 0]])
    assert prefix_acceptance(drafts, target).tolist() == [3, 2, 1, 0, 0]


def test_rank_zero_is_argmax_and_the_lower_id_wins_ties():
    logits = jnp.array([[1.0, 3.0, 3.0, 2.0]] * 4)
    ce, rank = jax.jit(label_scores)(logits, jnp.arange(4))
    assert rank.tolist() == [3, 0, 1, 2]
    np.testing.assert_allclose(jnp.exp(-ce), jax.nn.softmax(logits[0]), rtol=1e-6)
    assert label_scores(jnp.zeros((3, 3)), jnp.arange(3))[1].tolist() == [0, 1, 2]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rank_zero_equals_numpys_argmax_of_the_logits_as_given(dtype):
    rng = np.random.default_rng(2)
    logits = jnp.asarray(rng.normal(size=(1000, 60)), dtype)
    rounded = np.asarray(logits.astype(jnp.float32))
    labels = np.where(rng.random(1000) < 0.5, rounded.argmax(-1), rounded.argsort(-1)[:, -2])
    ce, rank = jax.jit(label_scores)(logits, jnp.asarray(labels))
    assert ce.dtype == jnp.float32
    np.testing.assert_array_equal(rank == 0, rounded.argmax(-1) == labels)
    ties = (rounded == rounded.max(-1, keepdims=True)).sum(-1) > 1
    assert 300 < (rank == 0).sum() < 700
    assert dtype == jnp.float32 or ties.sum() > 10


# ---------------------------------------------------------------------------------------------
# Gradients


def loss_of_logits(logits, labels, valid, objective, weights=None):
    """The mean loss; with `weights` given they stand in for the objective's own."""
    ce, rank = label_scores(logits, labels)
    sums = objective_sums(objective, LabelScores(ce, rank), valid, block_size=8)
    numerator = sums.numerator if weights is None else jnp.where(weights > 0, weights * ce, 0.0).sum()
    return numerator / sums.denominator, sums.weights


gradient_and_weights = jax.jit(jax.grad(loss_of_logits, has_aux=True), static_argnums=3)


def test_auf_trains_every_slot_up_to_the_first_failure_and_nothing_after():
    logits, labels, valid = random_blocks(np.random.default_rng(3), 8, B=3, A=12)
    grads, weights = gradient_and_weights(logits, labels, valid, Objective("auf"))
    support = np.asarray(weights) > 0
    touched = np.asarray((grads != 0).any(-1))
    np.testing.assert_array_equal(touched, support)
    after_a_failure = valid & ~support
    assert after_a_failure.any() and support.any() and not valid.all()


@ALL
def test_no_gradient_passes_through_the_weights(objective):
    logits, labels, valid = random_blocks(np.random.default_rng(4), 8)

    def total_weight(logits):
        ce, rank = label_scores(logits, labels)
        return slot_weights(objective, LabelScores(ce, rank), valid, 8)[0].sum()

    assert not jax.jit(jax.grad(total_weight))(logits).any()
    grads, weights = gradient_and_weights(logits, labels, valid, objective)
    held, _ = gradient_and_weights(logits, labels, valid, objective, weights)
    assert np.asarray(grads).any()
    np.testing.assert_array_equal(grads, held)


def test_auf_gradient_equals_finite_differences_with_its_weights_held():
    logits, labels, valid = random_blocks(np.random.default_rng(5), 4, B=1, A=4, V=5)
    grads, weights = gradient_and_weights(logits, labels, valid, Objective("auf"))
    weights = np.asarray(weights, np.float64)

    def loss(logits):
        ce = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, labels[..., None], -1)[..., 0]
        return (weights * ce).sum() / weights.sum()

    numeric = np.zeros(logits.shape)
    for index in np.ndindex(logits.shape):
        step = np.zeros(logits.shape)
        step[index] = 1e-5
        numeric[index] = (loss(logits + step) - loss(logits - step)) / 2e-5
    np.testing.assert_allclose(grads, numeric, atol=1e-6)
    assert np.abs(numeric).max() > 0.01


@ALL
def test_a_non_finite_cross_entropy_without_weight_does_not_poison_the_loss(objective):
    rank = jnp.array([[1, 0, 0]])
    valid = jnp.array([[True, False, False]])

    @jax.jit
    @jax.value_and_grad
    def numerator(ce):
        return objective_sums(objective, LabelScores(ce, rank), valid, block_size=4).numerator

    value, grad = numerator(jnp.array([[0.5, jnp.inf, jnp.nan]]))
    expected, expected_grad = numerator(jnp.array([[0.5, 1.0, 1.0]]))
    assert value == expected > 0
    np.testing.assert_array_equal(grad, expected_grad)


def test_an_impossible_label_without_weight_leaves_the_gradients_of_logits_finite():
    logits = jnp.zeros((1, 3, 4)).at[0, 1, 2].set(-jnp.inf)  # ce of slot 2 is infinite
    labels, valid = jnp.array([[0, 2, 0]]), jnp.array([[True, False, True]])
    grads, _ = gradient_and_weights(logits, labels, valid, Objective("full"))
    assert jnp.isfinite(grads).all() and not grads[0, 1].any() and grads[0, 0].any()


def test_the_modules_example_runs():
    result = doctest.testmod(objectives)
    assert result.attempted >= 7 and result.failed == 0
