"""Losses that compare with the target's distribution, and the supports beside AUF: plain loops, limits, the LM head."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from specauf_jax.config import Mesh, Objective, Sampling
from specauf_jax.decoding.generate import generate
from specauf_jax.decoding.state import Decoding
from specauf_jax.errors import SpecaufError
from specauf_jax.kernels.lm_head import frozen_head_scores
from specauf_jax.models.target import TargetStep, target_features, target_head, target_hidden, target_states
from specauf_jax.objectives import (
    SoftScores,
    accept_until_fail_mask,
    label_scores,
    objective_sums,
    scores_and_slope,
    slot_weights,
)
from specauf_jax.sharding import batch_sharding, make_mesh, replicated
from specauf_jax.training.blocks import eligible_anchors, make_blocks, predicting_states, sample_anchors
from specauf_jax.training.loss import LossConfig, block_hidden, loss_fn
from specauf_jax.training.step import init_state, make_train_step

LOSSES = ("ce", "kl", "tv", "lk", "nla", "ce=0.1,tv=0.9", "ce=0.5,kl=2,lk=0.3,nla=0.2")
SUPPORTS = {
    "full": {},
    "decay": {"gamma": 2.5},
    "auf": {},
    "auf, second failure": {"failures": 2},
    "auf, floor": {"floor": 0.1},
    "auf, tree": {"tree_nodes": 9},
    "auf_decay": {},
    "auf_decay, tree, floor": {"tree_nodes": 4, "floor": 0.3},
    "auf_decay, floor": {"floor": 0.2, "failures": 3},
    "griffin": {"griffin_top_n": 2},
    "griffin, second failure": {"griffin_top_n": 2, "failures": 2},
    "dpace": {"dpace_alpha": 0.3},
    "survival": {},
    "first_error": {"focal": 2.0, "chain": 0.3},
}
OBJECTIVES = [
    Objective(support.partition(",")[0], loss, **settings)
    for (support, settings), loss in itertools.product(SUPPORTS.items(), LOSSES)
]
B, A, N, D, V, K = 2, 4, 5, 7, 9, 6


# ---------------------------------------------------------------------------------------------
# The oracle, one slot at a time, in float64


def softmax(logits):
    powers = [math.exp(x) for x in logits]
    return [x / sum(powers) for x in powers]


def slot_losses(z, y, label, temperature):
    """Every loss of a slot, and the probability of acceptance."""
    q, p = softmax(z), softmax([x / temperature for x in y])
    acceptance = sum(min(a, b) for a, b in zip(p, q, strict=True))
    kl = sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))
    return {"ce": -math.log(q[label]), "kl": kl, "tv": 1 - acceptance, "nla": -math.log(acceptance)}, acceptance


def mixed(objective, losses, share):
    losses = losses | {"lk": share * losses["kl"] + (1 - share) * losses["tv"]}
    return sum(weight * losses[name] for name, weight in objective.losses.items())


def block_weights(objective, ranks, ces, acceptances, valid):
    """The weights of a block's slots, and what each adds to the denominator."""
    gamma, weights, parts = objective.gamma or K / 2, [], []
    for k in range(N):
        failures, reach, cut = 0, 1.0, False
        for j in range(k):
            failures += ranks[j] >= (objective.griffin_top_n if objective.name == "griffin" else 1)
            cut = cut or not valid[j]
            reach *= acceptances[j] if valid[j] else 0.0
        stopped = failures >= objective.failures
        if objective.tree_nodes:
            better = sum(math.prod(rank + 1 for rank in ranks[: m + 1]) for m in range(k))
            stopped = better > objective.tree_nodes
        live = objective.floor if stopped or cut else 1.0
        decay = math.exp(-k / gamma)
        chain = {}
        for alpha in (objective.dpace_alpha, 0.0):
            confidences = [(1 - alpha) * math.exp(-ces[i]) + alpha if valid[i] else 1.0 for i in range(N)]
            chain[alpha] = sum(math.prod(confidences[: j + 1]) for j in range(k, N) if valid[j])
        first = not cut and failures == 0 and ranks[k] > 0
        position = decay * (1 + objective.focal * first)
        weight = {
            "full": 1.0,
            "decay": decay,
            "auf": live,
            "griffin": live,
            "auf_decay": live * decay,
            "dpace": chain[objective.dpace_alpha],
            "survival": reach,
            "first_error": position + objective.chain * chain[0.0],
        }[objective.name]
        part = {"dpace": 1.0, "first_error": position}.get(objective.name, weight)
        weights.append(weight * valid[k])
        parts.append(part * valid[k])
    return weights, parts


def oracle(objective, z, y, labels, valid):
    """Weights, numerator, denominator, and the numerator's gradient in z by differences, weights held."""
    weights, denominator, gradient, numerator = np.zeros(labels.shape), 0.0, np.zeros(z.shape), 0.0
    for b, a in np.ndindex(labels.shape[:2]):
        seen = [slot_losses(z[b, a, k], y[b, a, k], labels[b, a, k], objective.temperature) for k in range(N)]
        order = [sorted(range(V), key=lambda v, row=row: (-row[v], v)) for row in z[b, a]]
        ranks = [order[k].index(labels[b, a, k]) for k in range(N)]
        acceptances = [acceptance for _, acceptance in seen]
        found, parts = block_weights(objective, ranks, [x["ce"] for x, _ in seen], acceptances, valid[b, a])
        weights[b, a], denominator = found, denominator + sum(parts)
        for k in range(N):
            share = math.exp(-3 * acceptances[k])
            numerator += found[k] * mixed(objective, seen[k][0], share)
            for v in range(V):
                moved = []
                for step in (1e-5, -1e-5):
                    row = z[b, a, k].copy()
                    row[v] += step
                    losses, _ = slot_losses(row, y[b, a, k], labels[b, a, k], objective.temperature)
                    moved.append(mixed(objective, losses, share))
                gradient[b, a, k, v] = found[k] * (moved[0] - moved[1]) / 2e-5
    return weights, numerator, denominator, gradient


def random_blocks(seed: int = 0):
    """Logits of drafter and target that agree more or less, labels (mostly right ones) and valid slots."""
    rng = np.random.default_rng(seed)
    y = 2 * rng.normal(size=(B, A, N, V))
    z = y + rng.normal(size=y.shape) * rng.choice([0.1, 1.0], size=(B, A, N, 1))
    labels = np.where(rng.random((B, A, N)) < 0.7, z.argmax(-1), rng.integers(0, V, (B, A, N)))
    valid = rng.random((B, A, N)) < 0.9
    valid[:, 0] = True
    return z.astype(np.float32), y.astype(np.float32), labels.astype(np.int32), valid


@functools.partial(jax.jit, static_argnames="objective")
def sums_and_gradient(z, y, labels, valid, objective):
    def numerator(z):
        scores = label_scores(z, labels, y if objective.soft else None, objective)
        sums = objective_sums(objective, scores, valid, block_size=K)
        return sums.numerator, sums

    return jax.grad(numerator, has_aux=True)(z)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: f"{objective.name} {objective.loss}")
def test_every_loss_and_support_equals_plain_loops(objective):
    if objective.soft:
        objective = Objective(**{**vars(objective), "temperature": 0.7})
    z, y, labels, valid = random_blocks()
    gradient, sums = sums_and_gradient(z, y, labels, valid, objective)
    weights, numerator, denominator, by_differences = oracle(
        objective, *(x.astype(float) for x in (z, y)), labels, valid
    )
    np.testing.assert_allclose(sums.weights, weights, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose([sums.numerator, sums.denominator], [numerator, denominator], rtol=1e-5)
    np.testing.assert_allclose(gradient, by_differences, atol=2e-5)
    assert 0 < (weights > 0).sum() < weights.size
    slope = scores_and_slope(z, labels, y if objective.soft else None, objective)[1]
    np.testing.assert_allclose(slope * np.asarray(sums.weights)[..., None], gradient, atol=1e-5)


# ---------------------------------------------------------------------------------------------
# Limits


def test_a_target_that_is_sure_of_the_label_gives_the_hard_losses():
    z, _, labels, _ = random_blocks(1)
    sure = 40.0 * np.eye(V, dtype=np.float32)[labels]
    ce, _ = label_scores(z, labels)
    q = np.exp(-np.asarray(ce))
    for loss, expected in (
        ("kl", ce),
        ("tv", 1 - q),
        ("nla", ce),
        ("lk", np.exp(-3 * q) * ce + (1 - np.exp(-3 * q)) * (1 - q)),
    ):
        scores = label_scores(z, labels, sure, Objective("full", loss))
        np.testing.assert_allclose(scores.loss, expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(scores.acceptance, q, rtol=1e-5)
    hard, soft = (jax.grad(lambda z, loss=loss, t=t: label_scores(z, labels, t, Objective("full", loss)).loss.sum())(z)
                  for loss, t in (("ce", None), ("kl", sure)))  # fmt: skip
    np.testing.assert_allclose(soft, hard, atol=1e-6)


def test_a_drafter_that_is_the_target_has_no_soft_loss():
    z, _, labels, _ = random_blocks(2)
    scores = label_scores(z, labels, z, Objective("full", "kl=1,tv=1,lk=1,nla=1"))
    np.testing.assert_allclose(scores.loss, 0, atol=1e-5)
    np.testing.assert_allclose(scores.acceptance, 1, atol=1e-6)


def test_survival_of_sure_distributions_is_accept_until_fail():
    z, _, labels, valid = random_blocks(3)
    own = 200.0 * np.eye(V, dtype=np.float32)[z.argmax(-1)]
    scores = label_scores(own, labels, 200.0 * np.eye(V, dtype=np.float32)[labels], Objective("survival"))
    weights, _ = slot_weights(Objective("survival"), scores, valid, K)
    expected = accept_until_fail_mask(z.argmax(-1) == labels, valid)
    np.testing.assert_allclose(weights, expected, atol=1e-6)
    assert 0 < np.asarray(expected).sum() < expected.size


def test_the_nth_failure():
    correct = jnp.array([1, 0, 1, 0, 1, 0, 1], bool)
    valid = jnp.ones(7, bool)
    for failures, count in ((1, 2), (2, 4), (3, 6), (4, 7)):
        mask = accept_until_fail_mask(correct, valid, failures)
        assert mask.tolist() == [True] * count + [False] * (7 - count)
    assert accept_until_fail_mask(correct, valid.at[2].set(False), 3).tolist() == [True] * 2 + [False] * 5


def test_weights_have_no_gradient():
    z, y, labels, valid = random_blocks(4)
    for objective in (Objective("survival"), Objective("first_error"), Objective("auf", "lk")):
        grads = jax.grad(lambda z, o=objective: slot_weights(o, label_scores(z, labels, y, o), valid, K)[0].sum())(z)
        assert not np.asarray(grads).any()


# ---------------------------------------------------------------------------------------------
# Through the LM head


def hidden_blocks(seed: int = 0, rows: int = 8):
    """Hidden states of drafter and target that often agree on the best token, an LM head, labels and valid slots."""
    rng = np.random.default_rng(seed)
    target = rng.normal(size=(rows, A, N, D)).astype(np.float32)
    hidden = target + 0.3 * rng.normal(size=target.shape).astype(np.float32)
    lm_head = rng.normal(size=(D, 16)).astype(np.float32)
    return hidden, target, lm_head, (target @ lm_head).argmax(-1).astype(np.int32), rng.random((rows, A, N)) < 0.95


@functools.partial(jax.jit, static_argnames=("objective", "chunk", "skip"))
def through_head(hidden, target, lm_head, labels, valid, *, objective, chunk=None, skip=True):
    def loss(hidden):
        if chunk is None:
            scores = label_scores(hidden @ lm_head, labels, target @ lm_head, objective)
        else:
            scores = frozen_head_scores(
                hidden, lm_head, labels, valid, chunk=chunk, objective=objective, target_hidden=target, skip=skip
            )
        sums = objective_sums(objective, scores, valid, block_size=K)
        return 0.3 * sums.numerator, (sums, scores)

    return jax.value_and_grad(loss, has_aux=True)(hidden)


IN_HEAD = [Objective("auf", "kl"), Objective("auf", "ce=0.1,tv=0.9"), Objective("auf", "lk", failures=2),
           Objective("griffin", "ce", failures=2, griffin_top_n=2), Objective("auf_decay", "nla", temperature=0.5),
           Objective("auf", "tv", floor=0.1), Objective("survival", "tv"), Objective("decay", "kl"),
           Objective("survival")]  # fmt: skip


@pytest.mark.parametrize("objective", IN_HEAD, ids=lambda o: f"{o.name} {o.loss} {o.failures} {o.floor}")
@pytest.mark.parametrize("chunk,skip", [(1, True), (7, True), (1000, True), (7, False)])
def test_the_frozen_head_gives_the_dense_loss_and_gradient(objective, chunk, skip):
    arrays = hidden_blocks()
    (loss, (sums, scores)), grads = through_head(*arrays, objective=objective, chunk=chunk, skip=skip)
    (dense, (its_sums, its_scores)), its_grads = through_head(*arrays, objective=objective)
    assert tiny.largest_difference((loss, sums, grads), (dense, its_sums, its_grads)) < 1e-5
    weighed = np.asarray(sums.weights) > 0
    np.testing.assert_array_equal(np.asarray(scores.rank)[weighed], np.asarray(its_scores.rank)[weighed])
    assert not np.asarray(grads)[~weighed].any() and np.asarray(grads)[weighed].any(-1).mean() > 0.99
    assert 10 < weighed.sum() <= arrays[-1].sum()


def test_nothing_behind_a_stop_is_looked_at():
    hidden, target, lm_head, labels, valid = hidden_blocks()
    objective = Objective("auf", "kl", failures=2)
    dense = label_scores(hidden @ lm_head, labels)
    live = np.asarray(accept_until_fail_mask(dense.rank == 0, valid, 2))
    cut = np.cumsum(~valid, -1) - ~valid > 0
    behind = ~live & (valid | cut)
    poisoned = [np.where(behind[..., None], np.nan, x) for x in (hidden, target)]
    scores = frozen_head_scores(
        poisoned[0], lm_head, labels, valid, chunk=5, objective=objective, target_hidden=poisoned[1]
    )
    assert np.isfinite(scores.loss).all() and behind.sum() > 20
    np.testing.assert_array_equal((np.asarray(scores.cross_entropy) > 0) & valid, live)
    assert live.sum() > np.asarray(accept_until_fail_mask(dense.rank == 0, valid)).sum() + 10


def print_differences():
    """Of a process with 8 devices: by how much each mesh differs from one device."""
    for objective in (
        Objective("auf", "ce=0.1,tv=0.9"),
        Objective("survival", "kl"),
        Objective("auf", "lk", failures=2),
    ):
        run = functools.partial(through_head, objective=objective, chunk=4)
        expected = run(*hidden_blocks())
        for axes in ((2, 4, 1), (1, 2, 4), (2, 2, 2)):
            mesh = make_mesh(Mesh(*axes))
            hidden, target, lm_head, labels, valid = hidden_blocks()
            hidden, target, labels, valid = (
                jax.device_put(x, batch_sharding(mesh)) for x in (hidden, target, labels, valid)
            )
            found = jax.jit(run)(hidden, target, jax.device_put(lm_head, replicated(mesh)), labels, valid)
            print(tiny.largest_difference(found, expected))


def test_a_mesh_gives_what_one_device_gives():
    said = tiny.on_eight_devices("import test_soft_losses; test_soft_losses.print_differences()")
    differences = [float(line) for line in said.split()]
    assert len(differences) == 9 and max(differences) < 1e-5


# ---------------------------------------------------------------------------------------------
# Settings


@pytest.mark.parametrize(
    "loss", ["", "mse", "ce=", "ce=0", "ce=-1", "ce=inf", "ce=1", "ce,ce", "ce=0.1,,tv=1", "tv=x,ce=1"]
)
def test_a_mix_that_is_none_is_refused(loss):
    for support in ("full", "survival"):
        with pytest.raises(SpecaufError, match="objective.loss is"):
            Objective(support, loss)


@pytest.mark.parametrize(
    "settings",
    [{"name": "decay", "floor": 0.1}, {"name": "griffin", "tree_nodes": 8}, {"tree_nodes": 8, "failures": 2},
     {"tree_nodes": 0}, {"name": "full", "failures": 2}, {"temperature": 0.5}, {"focal": 2.0},
     {"floor": 1.5}, {"failures": 0}, {"loss": "kl", "temperature": 0.0}, {"name": "survival", "gamma": 2.0}],
)  # fmt: skip
def test_settings_that_do_nothing_or_cannot_be_are_refused(settings):
    with pytest.raises(
        SpecaufError, match="objective|failures is 0|temperature is 0.0|with tree_nodes|tree_nodes is 0"
    ):
        Objective(**settings)


def test_soft_losses_need_the_target():
    z, y, labels, valid = random_blocks()
    hard, soft = label_scores(z, labels), label_scores(z, labels, y, Objective("auf", "kl"))
    for objective, scores, witness in (
        (Objective("auf", "kl"), hard, None), (Objective("survival"), hard, None),
        (Objective("survival", "kl", witness="base"), soft, hard),
    ):  # fmt: skip
        with pytest.raises(SpecaufError, match="scores of labels alone"):
            objective_sums(objective, scores, valid, block_size=K, witness=witness)
    sums = objective_sums(Objective("auf", "kl", witness="base"), soft, valid, block_size=K, witness=hard)
    np.testing.assert_array_equal(sums.weights, objective_sums(Objective("auf"), hard, valid, block_size=K).weights)
    assert isinstance(label_scores(z, labels, y, Objective("survival")), SoftScores)


# ---------------------------------------------------------------------------------------------
# Training and decoding

TARGET, DRAFTER = tiny.target_config(), tiny.drafter_config()
TARGET_PARAMS, PARAMS = tiny.target_params(), tiny.drafter_params()
SOFT = LossConfig(drafter=DRAFTER, objective=Objective("auf", "ce=0.1,tv=0.9"), num_anchors=5, slot_chunk=7)
ROWS = [[24], [8, 11], [], [3, 2], [20], [5, 5, 5], [1, 1, 1], [24]]


@functools.partial(jax.jit, static_argnames="layer_ids")
def states(batch, layer_ids=DRAFTER.target_layer_ids):
    rows = (batch.tokens, batch.positions, batch.document_ids)
    return target_states(TARGET_PARAMS, *rows, config=TARGET, layer_ids=layer_ids)


@pytest.mark.parametrize("layer_ids", [(0, 1), (1,), (0, TARGET.num_hidden_layers - 1)])
def test_one_pass_gives_features_and_last_states(layer_ids):
    batch = tiny.random_batch(ROWS)
    rows = (batch.tokens, batch.positions, batch.document_ids)
    features = target_features(TARGET_PARAMS, *rows, config=TARGET, layer_ids=layer_ids)
    hidden = target_hidden(TARGET_PARAMS, *rows, config=TARGET)
    assert tiny.largest_difference(states(batch, layer_ids), (features, hidden)) < 1e-6


def test_the_teacher_of_a_slot_is_the_target_before_its_label():
    """The loss of a step, from the target's logits of every place, one slot at a time."""
    batch = tiny.random_batch(ROWS)
    features, hidden = states(batch)
    batch = batch.replace(features=features, target_hidden=hidden)
    config = dataclasses.replace(SOFT, objective=Objective("full", "kl"))
    head, rng = target_head(TARGET_PARAMS), jax.random.key(3)
    anchors, keep = sample_anchors(rng, eligible_anchors(batch.loss_mask, batch.document_ids), batch.document_ids, 5)
    blocks = make_blocks(batch, anchors, keep, config=DRAFTER)
    z = np.asarray(block_hidden(PARAMS, head, batch, blocks, config=config)[:, :, 1:] @ head.lm_head, np.float64)
    y = np.asarray(hidden @ head.lm_head, np.float64)
    total = count = 0
    for b, a, n in np.argwhere(np.asarray(blocks.valid)):
        total += slot_losses(z[b, a, n], y[b, anchors[b, a] + n], 0, 1.0)[0]["kl"]
        count += 1
    loss, _ = jax.jit(loss_fn, static_argnames="config")(PARAMS, head, batch, rng, config=config)
    np.testing.assert_allclose(loss, total / count, rtol=1e-5)
    with pytest.raises(SpecaufError, match="without target_hidden"):
        loss_fn(PARAMS, head, batch.replace(target_hidden=None), rng, config=config)


@pytest.mark.parametrize("objective", [SOFT.objective, Objective("survival", "tv")], ids=lambda o: o.name)
def test_accumulation_and_stored_states_change_nothing(objective):
    config, batch = dataclasses.replace(SOFT, objective=objective), tiny.random_batch(ROWS)
    optimizer = optax.sgd(1.0)

    def after(batch, parts):
        step = jax.jit(make_train_step(config, TARGET, optimizer, accumulation=parts, seed=7))
        state, metrics = step(init_state(PARAMS, optimizer), TARGET_PARAMS, batch)
        return state.params, metrics["loss"]

    features, hidden = states(batch)
    whole = after(batch, 1)
    assert tiny.largest_difference(after(batch, 4), whole) < 1e-5
    assert tiny.largest_difference(after(batch.replace(features=features, target_hidden=hidden), 1), whole) < 1e-6
    assert tiny.largest_difference(whole[0], PARAMS) > 1e-3


@pytest.mark.parametrize("shift_label", [True, False])
def test_the_teacher_of_dominos_slots(shift_label):
    """The base branch's loss, whose logits are the body's own, from plain loops."""
    drafter = tiny.domino_config(shift_label=shift_label)
    params = tiny.drafter_params(drafter)
    config = LossConfig(
        drafter=drafter, objective=Objective("decay"), base_objective=Objective("full", "kl"), num_anchors=5
    )
    batch = tiny.random_batch(ROWS)
    features, hidden = states(batch, drafter.target_layer_ids)
    batch, head, rng = (
        batch.replace(features=features, target_hidden=hidden),
        target_head(TARGET_PARAMS),
        jax.random.key(3),
    )
    anchors, keep = sample_anchors(rng, eligible_anchors(batch.loss_mask, batch.document_ids), batch.document_ids, 5)
    blocks = make_blocks(batch, anchors, keep, config=drafter)
    z = block_hidden(params, head, batch, blocks, config=config)[:, :, drafter.first_slot :] @ head.lm_head
    z, y = np.asarray(z, np.float64), np.asarray(hidden @ head.lm_head, np.float64)
    valid = np.argwhere(np.asarray(blocks.valid))
    total = sum(slot_losses(z[b, a, n], y[b, anchors[b, a] + n], 0, 1.0)[0]["kl"] for b, a, n in valid)
    _, aux = jax.jit(loss_fn, static_argnames="config")(params, head, batch, rng, config=config)
    np.testing.assert_allclose(aux.base.numerator, total, rtol=1e-5)
    assert z.shape[2] == drafter.block_size - (not shift_label) and len(valid) > 50


def test_domino_learns_from_distributions_too():
    """Of both branches, the base one hard: as from all logits at once."""
    drafter = tiny.domino_config()
    params = tiny.drafter_params(drafter)
    config = LossConfig(
        drafter=drafter, objective=Objective("decay", "lk"), base_objective=Objective("auf_decay"), num_anchors=5
    )
    batch = tiny.random_batch(ROWS)
    features, hidden = states(batch, drafter.target_layer_ids)
    batch, head = batch.replace(features=features, target_hidden=hidden), target_head(TARGET_PARAMS)

    def run(chunk):
        changed = dataclasses.replace(config, slot_chunk=chunk)
        return jax.jit(jax.value_and_grad(loss_fn, has_aux=True), static_argnames="config")(
            params, head, batch, jax.random.key(0), config=changed, lambda_base=0.3
        )

    assert tiny.largest_difference(run(3), run(10**6)) < 1e-5
    soft = run(3)[0][1].final.numerator
    hard = loss_fn(
        params, head, batch, jax.random.key(0), config=dataclasses.replace(config, objective=Objective("decay"))
    )
    assert abs(float(soft) - float(hard[1].final.numerator)) > 1e-2


def test_one_minus_tv_is_the_rate_at_which_sampling_accepts():
    """Of a round's first draft, for several contexts at temperature 1: within four standard errors."""
    count, length, checked = 4000, 9, 0
    decoding = Decoding(target_step=TargetStep(TARGET, DRAFTER.target_layer_ids), drafter=DRAFTER)
    for seed in range(4):
        batch = tiny.random_batch([[length + DRAFTER.block_size]], length=length + DRAFTER.block_size, seed=seed)
        features, hidden = states(batch)
        batch, head = batch.replace(features=features, target_hidden=hidden), target_head(TARGET_PARAMS)
        anchors = jnp.array([[length - 1]])
        blocks = make_blocks(batch, anchors, anchors > 0, config=DRAFTER)
        z = block_hidden(PARAMS, head, batch, blocks, config=SOFT)[:, :, 1:] @ head.lm_head
        y = predicting_states(hidden, blocks) @ head.lm_head
        expected = 1 - float(label_scores(z, blocks.labels, y, Objective("full", "tv")).loss[0, 0, 0])
        prompt = np.asarray(batch.tokens)[0, :length].tolist()
        done = generate(PARAMS, TARGET_PARAMS, [prompt] * count, config=decoding, max_new_tokens=2,
                        batch_size=500, sampling=Sampling(1.0), seed=seed)  # fmt: skip
        rate = np.mean([generation.accepted[0] > 0 for generation in done])
        assert abs(rate - expected) < 4 * np.sqrt(expected * (1 - expected) / count)
        checked += 0.02 < expected < 0.98
    assert checked >= 3
