import dataclasses
import functools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from jax.sharding import NamedSharding, PartitionSpec

from specauf_jax.config import Mesh, Objective, TrainOptimisation
from specauf_jax.models.target import target_features, target_head, target_hidden
from specauf_jax.sharding import batch_sharding, make_mesh, parameter_sharding, replicated, spread_rows
from specauf_jax.training.blocks import eligible_anchors, sample_anchors
from specauf_jax.training.loss import LossConfig, loss_fn, loss_sums, safe_ratio
from specauf_jax.training.step import (
    init_state,
    learning_rate_schedule,
    make_optimizer,
    make_pretrain_step,
    make_train_step,
    with_target,
)

TARGET, DRAFTER = tiny.target_config(), tiny.drafter_config()
TARGET_PARAMS, PARAMS = tiny.target_params(), tiny.drafter_params()
AUF = LossConfig(drafter=DRAFTER, objective=Objective("auf"), num_anchors=5, slot_chunk=7)
SETTINGS = TrainOptimisation(steps=10, learning_rate=1e-2, warmup_ratio=0.2, weight_decay=0.1)
OPTIMIZER = make_optimizer(SETTINGS)
PLAIN = optax.sgd(1.0)  # moves parameters by their gradient; Adam divides by its size, be it mere rounding
SEED = 7
ROWS = [[24], [8, 11], [], [3, 2], [20], [5, 5, 5], [1, 1, 1], [24]]


@functools.cache
def train_step(accumulation=1, optimizer=OPTIMIZER):
    return jax.jit(make_train_step(AUF, TARGET, optimizer, accumulation=accumulation, seed=SEED))


def start(params=PARAMS, optimizer=OPTIMIZER):
    return init_state(params, optimizer)


@jax.jit
def with_features(batch):
    features = target_features(
        TARGET_PARAMS, batch.tokens, batch.positions, batch.document_ids, config=TARGET, layer_ids=(0, 1)
    )
    return batch.replace(features=features)


# ---------------------------------------------------------------------------------------------
# The drafter's step


def test_a_step_is_the_gradient_of_the_loss_through_the_optimizer():
    batch, state = tiny.random_batch(ROWS), start()
    new, metrics = train_step()(state, TARGET_PARAMS, batch)
    rng = jax.random.fold_in(jax.random.key(SEED), 0)

    @jax.jit
    def by_hand(params, batch):
        grad = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, aux), grads = grad(params, target_head(TARGET_PARAMS), batch, rng, config=AUF)
        return loss, aux, grads, optax.apply_updates(params, OPTIMIZER.update(grads, state.opt_state, params)[0])

    loss, aux, grads, params = by_hand(PARAMS, with_features(batch))
    assert tiny.largest_difference(new.params, params) < 1e-6 and new.step == 1
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(grads), rtol=1e-6)
    for name, value in aux.measures().items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-6, err_msg=name)
    assert not any(metrics["nonfinite"].values()) and len(metrics["nonfinite"]) == 1 + len(jax.tree.leaves(PARAMS))
    assert not any(tiny.same_bits(a, b) for a, b in zip(*map(jax.tree.leaves, (new.params, PARAMS)), strict=True))


def test_accumulation_changes_nothing_though_its_parts_have_unequal_counts():
    batch = tiny.random_batch(ROWS)
    new, metrics = train_step(1, PLAIN)(start(optimizer=PLAIN), TARGET_PARAMS, batch)
    for parts in (2, 4):
        accumulated, its_metrics = train_step(parts, PLAIN)(start(optimizer=PLAIN), TARGET_PARAMS, batch)
        assert tiny.largest_difference(accumulated.params, new.params) < 1e-6
        assert metrics.keys() == its_metrics.keys()
        assert tiny.largest_difference(its_metrics, metrics) < 1e-6


@pytest.mark.parametrize("remat", ["dots", "layers"])
def test_computing_again_in_the_backward_pass_keeps_less_and_changes_nothing(remat):
    batch, again = tiny.random_batch(ROWS), dataclasses.replace(AUF, remat=remat)
    new, metrics = train_step()(start(), TARGET_PARAMS, batch)
    its, its_metrics = jax.jit(make_train_step(again, TARGET, OPTIMIZER, seed=SEED))(start(), TARGET_PARAMS, batch)
    assert tiny.largest_difference(its.params, new.params) < 1e-6
    assert tiny.largest_difference(its_metrics, metrics) < 1e-6
    kept = [kept_floats(config, batch) for config in (AUF, dataclasses.replace(AUF, remat="dots"), again)]
    assert kept[0] > kept[1] >= kept[2] and (kept[1] > kept[2]) == (remat == "layers")


def kept_floats(config, batch):
    """Numbers that the forward pass leaves for the backward pass."""
    batch, head = with_features(batch), target_head(TARGET_PARAMS)
    _, pull = jax.eval_shape(
        lambda params: jax.vjp(lambda p: loss_fn(p, head, batch, jax.random.key(0), config=config)[0], params), PARAMS
    )
    return sum(math.prod(x.shape) for x in jax.tree.leaves(pull))


def test_the_denominator_is_one_for_all_parts():
    """The loss is a ratio of sums over the whole batch; the mean of the parts' means is another number."""
    batch = with_features(tiny.random_batch(ROWS))
    rng = jax.random.fold_in(jax.random.key(SEED), 0)
    eligible = eligible_anchors(batch.loss_mask, batch.document_ids)
    drawn = sample_anchors(rng, eligible, batch.document_ids, AUF.num_anchors)

    @jax.jit
    def sums(batch, anchors, keep):
        _, aux = loss_sums(PARAMS, target_head(TARGET_PARAMS), batch, anchors, keep, config=AUF)
        return aux.final.numerator, aux.final.denominator

    parts = [sums(*jax.tree.map(lambda x, i=i: x[i::4], (batch, *drawn))) for i in range(4)]
    numerators, denominators = np.array(parts).T
    assert len(set(denominators.tolist())) > 2 and denominators.min() == 0  # one part has no anchor at all
    _, metrics = train_step(4)(start(), TARGET_PARAMS, batch.replace(features=None))
    np.testing.assert_allclose(metrics["loss"], numerators.sum() / denominators.sum(), rtol=1e-6)
    assert abs(metrics["loss"] / np.mean(safe_ratio(numerators, denominators)) - 1) > 1e-3


def test_features_that_a_batch_brings_are_not_computed_again():
    """With the target's own the step is the same; others count as they are, so that the target's body is not asked."""
    batch = with_features(tiny.random_batch(ROWS))
    own, _ = train_step(optimizer=PLAIN)(start(optimizer=PLAIN), TARGET_PARAMS, batch.replace(features=None))
    head = {name: TARGET_PARAMS[name] for name in ("embed_tokens", "lm_head")} | {"layers": {}}
    given, _ = train_step(optimizer=PLAIN)(start(optimizer=PLAIN), head, batch)
    assert tiny.largest_difference(given.params, own.params) < 1e-6
    other, _ = train_step(optimizer=PLAIN)(start(optimizer=PLAIN), head, batch.replace(features=batch.features[::-1]))
    assert tiny.largest_difference(other.params, own.params) > 1e-3


def test_a_target_in_bfloat16_computes_in_bfloat16():
    """No product with float32 operands: neither those of its layers nor those of soft losses."""
    batch, params = tiny.random_batch(ROWS), jax.tree.map(lambda x: x.astype(jnp.bfloat16), TARGET_PARAMS)
    config = dataclasses.replace(AUF, objective=Objective("auf", "kl"), dtype="bfloat16")
    step = make_train_step(config, TARGET, OPTIMIZER)
    found = products(jax.make_jaxpr(step)(start(), params, batch).jaxpr)
    assert found == {("bfloat16", "bfloat16")}
    filled = with_target(batch, params, config=config, target=TARGET)
    assert filled.features.dtype == filled.target_hidden.dtype == jnp.bfloat16


def products(jaxpr) -> set:
    """Operand types of all products, in what a program calls too."""
    found = set()
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            found.add(tuple(str(x.aval.dtype) for x in equation.invars))
        for value in equation.params.values():
            for inner in value if isinstance(value, list | tuple) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    found |= products(inner)
    return found


def test_what_a_batch_brings_stays():
    config, batch = dataclasses.replace(AUF, objective=Objective("auf", "kl")), with_features(tiny.random_batch(ROWS))
    zeros = batch.replace(features=jnp.zeros_like(batch.features))
    filled = with_target(zeros, TARGET_PARAMS, config=config, target=TARGET)
    assert not np.asarray(filled.features).any() and np.asarray(filled.target_hidden).any()
    assert with_target(zeros, TARGET_PARAMS, config=AUF, target=TARGET).target_hidden is None


def test_only_the_drafter_is_trained():
    target_params = jax.tree.map(jnp.array, TARGET_PARAMS)
    new, _ = train_step()(start(), target_params, tiny.random_batch(ROWS))
    assert tiny.same_bits(target_params, TARGET_PARAMS)
    assert jax.tree.structure(new) == jax.tree.structure(start())
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(new.params))


def test_the_same_seed_gives_the_same_bits_twice():
    batch = tiny.random_batch(ROWS)

    def run():
        state = start()
        for _ in range(2):
            state, metrics = train_step()(state, TARGET_PARAMS, batch)
        return state, metrics

    assert tiny.same_bits(run(), run())


def test_every_step_draws_its_own_anchors_by_seed_and_step():
    """One batch and one set of parameters: the loss differs by the anchors alone, and is loss_fn's at that key."""
    batch = tiny.random_batch(ROWS)
    given = with_features(batch)

    @jax.jit
    def loss_at(rng):
        return loss_fn(PARAMS, target_head(TARGET_PARAMS), given, rng, config=AUF)[0]

    losses = []
    for step in range(3):
        state = start().replace(step=jnp.asarray(step, jnp.int32))
        _, metrics = train_step()(state, TARGET_PARAMS, batch)
        expected = loss_at(jax.random.fold_in(jax.random.key(SEED), step))
        np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-6)
        losses.append(float(metrics["loss"]))
    assert len(set(losses)) == 3


def test_a_batch_without_anchors_only_decays_weights_and_never_norms():
    batch = tiny.random_batch([[]] * 7 + [[24]], supervised=0.0)
    new, metrics = train_step()(start(), TARGET_PARAMS, batch)
    assert metrics["loss"] == metrics["tau"] == metrics["grad_norm"] == 0
    assert not any(metrics["nonfinite"].values())
    shrink = 1 - SETTINGS.weight_decay * learning_rate_schedule(SETTINGS)(0)

    def expected(path, x):
        return x if path[-1].key == "scale" else x * shrink

    expected = jax.tree_util.tree_map_with_path(expected, PARAMS)
    assert tiny.largest_difference(new.params, expected) < 1e-6 and shrink < 1
    for name in ("input_layernorm", "post_attention_layernorm"):
        assert tiny.same_bits(new.params["layers"][name], PARAMS["layers"][name])


@pytest.mark.parametrize("accumulation", [1, 2])
def test_numbers_that_are_not_finite_are_reported_with_their_place(accumulation):
    batch = tiny.random_batch(ROWS)
    embedding = TARGET_PARAMS["embed_tokens"]["embedding"]
    token = int(batch.tokens[0, 0])  # of the first part only, if there are two
    others = batch.tokens.at[1:].set(jnp.where(batch.tokens[1:] == token, token % 5 + 1, batch.tokens[1:]))
    target_params = TARGET_PARAMS | {"embed_tokens": {"embedding": embedding.at[token].set(jnp.nan)}}
    _, metrics = train_step(accumulation)(start(), target_params, batch.replace(tokens=others))
    assert metrics["nonfinite"]["features"] and not np.isfinite(metrics["loss"])

    broken = PARAMS | {"fc": {"kernel": PARAMS["fc"]["kernel"].at[0, 0].set(jnp.inf)}}
    _, metrics = train_step(accumulation)(start(broken), TARGET_PARAMS, batch)
    assert not metrics["nonfinite"]["features"] and metrics["nonfinite"]["gradient of ['fc']['kernel']"]


# ---------------------------------------------------------------------------------------------
# The optimiser


def test_learning_rate_warms_up_to_its_peak_and_ends_at_zero():
    schedule = learning_rate_schedule(TrainOptimisation(steps=100, learning_rate=1.0, warmup_ratio=0.04))
    np.testing.assert_allclose([schedule(i) for i in range(5)], [0.25, 0.4375, 0.625, 0.8125, 1.0], rtol=1e-6)
    np.testing.assert_allclose(schedule(52), 0.5, rtol=1e-6)  # half-way down the cosine
    np.testing.assert_allclose(schedule(100), 0, atol=1e-7)
    assert 0 < schedule(99) < 1e-3
    rates = [float(schedule(i)) for i in range(4, 101)]
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize("steps", [0, 1, 2, 1000])
@pytest.mark.parametrize("warmup_ratio", [0.0, 0.04, 0.99])
def test_the_first_learning_rate_is_positive_and_no_rate_exceeds_the_peak(steps, warmup_ratio):
    schedule = learning_rate_schedule(TrainOptimisation(steps=steps, learning_rate=0.5, warmup_ratio=warmup_ratio))
    rates = np.asarray(schedule(np.arange(steps + 1)))
    assert rates[0] > 0 and (rates >= 0).all() and rates.max() <= 0.5


def test_muon_orthogonalises_matrices_layer_by_layer_and_leaves_the_rest_to_adam():
    rng = np.random.default_rng(0)
    params = {"layers": {"q_proj": {"kernel": rng.normal(size=(3, 8, 6))}, "norm": {"scale": np.ones((3, 8))}},
              "fc": {"kernel": rng.normal(size=(5, 8))}, "lm_head": {"kernel": rng.normal(size=(8, 9))}}  # fmt: skip
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    grads = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), params)
    settings = dict(steps=10, learning_rate=1e-2, warmup_ratio=0.0, weight_decay=0.3, clip_norm=1e9)
    muon, adam = (make_optimizer(TrainOptimisation(**settings, optimizer=name)) for name in ("muon", "adamw"))
    (ours, theirs) = (optimizer.update(grads, optimizer.init(params), params)[0] for optimizer in (muon, adam))
    for path in (("layers", "q_proj", "kernel"), ("fc", "kernel")):  # decayed as AdamW does
        tree, before = ours, params
        for key in path[:-1]:
            tree, before = tree[key], before[key]
        tree["kernel"] = tree["kernel"] + 1e-2 * 0.3 * before["kernel"]
    for matrices in (ours["layers"]["q_proj"]["kernel"], ours["fc"]["kernel"][None]):
        for matrix in np.asarray(matrices):
            values = np.linalg.svd(matrix, compute_uv=False)
            scale = 0.2 * 1e-2 * np.sqrt(max(matrix.shape))
            assert 0.6 * scale < values.min() and values.max() < 1.4 * scale  # five Newton-Schulz steps are not exact
    for path in (("layers", "norm", "scale"), ("lm_head", "kernel")):
        one, other = (functools.reduce(lambda tree, key: tree[key], path, tree) for tree in (ours, theirs))
        np.testing.assert_array_equal(one, other)


def test_gradients_are_clipped_to_the_global_norm():
    params = {"kernel": jnp.zeros(4), "scale": jnp.zeros(1)}
    grads = {"kernel": jnp.full(4, 30.0), "scale": jnp.full(1, 80.0)}
    optimizer = make_optimizer(TrainOptimisation(clip_norm=2.0))
    _, state = optimizer.update(grads, optimizer.init(params), params)
    mean = optax.tree.get(state, "mu")  # (1 - b1) · gradient
    np.testing.assert_allclose(optax.tree.norm(mean), 0.1 * 2.0, rtol=1e-6)
    np.testing.assert_allclose(mean["scale"], 0.1 * 2.0 * 0.8, rtol=1e-6)


# ---------------------------------------------------------------------------------------------
# The target's own step


@functools.cache
def pretrain_step(accumulation=1):
    return jax.jit(make_pretrain_step(TARGET, OPTIMIZER, accumulation=accumulation, dtype="float32", chunk=5))


def test_pretraining_loss_equals_plain_loops_over_next_tokens_of_one_document():
    batch = tiny.random_batch(ROWS)

    @jax.jit
    def logits_of(batch):
        hidden = target_hidden(TARGET_PARAMS, batch.tokens, batch.positions, batch.document_ids, config=TARGET)
        return hidden @ target_head(TARGET_PARAMS).lm_head

    logits = np.asarray(logits_of(batch), np.float64)
    tokens, mask, ids = map(np.asarray, (batch.tokens, batch.loss_mask, batch.document_ids))
    total, count, correct = 0.0, 0, 0
    for b in range(len(tokens)):
        for j in range(1, tokens.shape[1]):
            if mask[b, j] and ids[b, j] == ids[b, j - 1]:
                row, label = logits[b, j - 1], tokens[b, j]
                total += math.log(np.exp(row).sum()) - row[label]
                count, correct = count + 1, correct + (row.argmax() == label)
    new, metrics = pretrain_step()(start(TARGET_PARAMS), batch)
    np.testing.assert_allclose(metrics["loss"], total / count, rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], correct / count, rtol=1e-6)
    assert correct > 0 and new.step == 1


def test_pretraining_accumulation_changes_nothing():
    batch = tiny.random_batch(ROWS)
    new, metrics = pretrain_step(1)(start(TARGET_PARAMS), batch)
    accumulated, its_metrics = pretrain_step(4)(start(TARGET_PARAMS), batch)
    assert tiny.largest_difference(accumulated.params, new.params) < 1e-6
    assert tiny.largest_difference(its_metrics, metrics) < 1e-6


def test_pretraining_learns_a_batch_by_heart():
    state, batch = start(TARGET_PARAMS), tiny.random_batch(ROWS)
    losses = []
    for _ in range(5):
        state, metrics = pretrain_step()(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.9 * losses[0]


# ---------------------------------------------------------------------------------------------
# Many devices

MESHES = {
    "replica 2, fsdp 4": (Mesh(replica=2, fsdp=4), 2),
    "replica 8": (Mesh(replica=8, fsdp=1), 1),
    "replica 2, fsdp 2, tensor 2": (Mesh(replica=2, fsdp=2, tensor=2), 1),
}


def three_steps(mesh, accumulation):
    """Losses and last parameters of three steps, set up as `specauf train` does, and shards of q_proj."""
    target = tiny.target_config(vocab_size=18)  # a vocabulary that two devices can share
    drafter = tiny.drafter_config(target, num_hidden_layers=1)
    config = LossConfig(drafter=drafter, objective=Objective("auf"), num_anchors=4, slot_chunk=7)
    target_params, state = tiny.target_params(target), start(tiny.drafter_params(drafter))
    target_sharding, sharding = parameter_sharding(target_params, mesh), parameter_sharding(state, mesh)
    rows = batch_sharding(mesh)
    step = jax.jit(
        make_train_step(config, target, OPTIMIZER, accumulation=accumulation),
        in_shardings=(sharding, target_sharding, rows),
        out_shardings=(sharding, replicated(mesh)),
        donate_argnums=0,
    )
    state, target_params = jax.device_put(state, sharding), jax.device_put(target_params, target_sharding)
    losses = []
    for seed in range(3):
        batch = jax.device_put(tiny.random_batch(ROWS * 2, seed=seed), rows)
        state, metrics = step(state, target_params, batch)
        losses.append(float(metrics["loss"]))
    kernel = state.params["layers"]["self_attn"]["q_proj"]["kernel"]
    shards = [whole // part for whole, part in zip(kernel.shape, kernel.addressable_shards[0].data.shape, strict=True)]
    return losses, jax.device_get(state.params), shards


def rows_spread(mesh):
    """Rows of 16 that a device holds of an activation that came split by its width: as `spread_rows` asks, as it is."""
    by_width = NamedSharding(mesh, PartitionSpec(None, ("replica", "fsdp", "tensor")))
    x = jax.device_put(jnp.zeros((16, 8)), by_width)
    return [jax.jit(f)(x).addressable_shards[0].data.shape[0] for f in (lambda x: spread_rows(x * 2), lambda x: x * 2)]


def compare_meshes():
    """Of a process with 8 devices: prints by how much each mesh differs from one device."""
    losses, params, _ = three_steps(make_mesh(Mesh(), jax.devices()[:1]), 1)
    found = {}
    for name, (mesh, accumulation) in MESHES.items():
        its_losses, its_params, shards = three_steps(make_mesh(mesh), accumulation)
        found[name] = {
            "loss": tiny.largest_difference(np.array(its_losses), np.array(losses)),
            "params": tiny.largest_difference(its_params, params),
            "shards": shards,
            "rows": rows_spread(make_mesh(mesh)),
        }
    print(json.dumps({"devices": len(jax.devices()), "losses": losses, "meshes": found}))


@pytest.mark.long
def test_eight_devices_compute_what_one_does():
    """On every mesh, with the parameters really spread: q_proj is [layers, D over fsdp, heads over tensor]."""
    child = subprocess.run(
        [sys.executable, "-c", "import test_step; test_step.compare_meshes()"],
        cwd=Path(__file__).parent,
        env=os.environ
        | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8",
        },
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr
    found = json.loads(child.stdout.splitlines()[-1])
    assert found["devices"] == 8 and len(set(found["losses"])) == 3
    for name, difference in found["meshes"].items():
        assert difference["loss"] < 1e-5 and difference["params"] < 1e-5, (name, difference)
    rows = [difference["rows"] for difference in found["meshes"].values()]
    assert rows == [[2, 16], [2, 16], [4, 16]]
    shards = {name: difference["shards"] for name, difference in found["meshes"].items()}
    assert shards == dict(zip(MESHES, ([1, 4, 1], [1, 1, 1], [1, 2, 2]), strict=True))
