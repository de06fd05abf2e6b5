"""DSpark: the Markov and confidence heads, their loss, and decoding with them."""

import dataclasses
import functools
import json
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import test_domino
import test_overfit
import test_soft_losses
import tiny

from specauf_jax import config as c
from specauf_jax.config import Objective
from specauf_jax.decoding.generate import generate, start
from specauf_jax.decoding.speculate import draft_and_verify
from specauf_jax.decoding.state import Decoding
from specauf_jax.errors import SpecaufError
from specauf_jax.evaluation.measure import calibration
from specauf_jax.models.heads import dspark, make_head
from specauf_jax.models.heads.dspark import DSpark
from specauf_jax.models.layers import cast
from specauf_jax.models.target import TargetStep, target_head, target_states
from specauf_jax.models.weights import load_drafter, save_drafter, save_target
from specauf_jax.objectives import label_scores
from specauf_jax.sharding import batch_sharding, make_mesh, parameter_sharding, replicated
from specauf_jax.training.blocks import make_blocks
from specauf_jax.training.loss import LossConfig, block_hidden, branch_factors, loss_fn, loss_sums, weighted
from specauf_jax.training.step import init_state, make_optimizer, make_train_step

K = 5
TARGET, TARGET_PARAMS, HEAD = test_domino.TARGET, test_domino.TARGET_PARAMS, test_domino.HEAD
FORMS = {
    "vanilla": {},
    "gated": {"markov_head_type": "gated", "confidence_head_with_markov": False},
    "rnn": {"markov_head_type": "rnn"},
    "vanilla, unshifted": {"shift_label": False, "enable_confidence_head": False},
    "gated, unshifted": {"markov_head_type": "gated", "shift_label": False},
    "rnn, unshifted": {"markov_head_type": "rnn", "shift_label": False, "confidence_head_alpha": 0.5},
}
forms = pytest.mark.parametrize("name", FORMS)


def drafter_and_params(name, target=TARGET, seed=2, **changes):
    drafter = tiny.dspark_config(target, block_size=K, **FORMS[name] | changes)
    return drafter, tiny.drafter_params(drafter, seed=seed)


@functools.partial(jax.jit, static_argnames="ids")
def with_states(batch, ids=(0, 1)):
    rows = batch.tokens, batch.positions, batch.document_ids
    features, hidden = target_states(TARGET_PARAMS, *rows, config=TARGET, layer_ids=ids)
    return batch.replace(features=features, target_hidden=hidden)


# ---------------------------------------------------------------------------------------------
# The head, by hand


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def block_by_hand(drafter, params, z, tokens):
    """Of one block: bias `[N, V]` and confidence logits `[N]`, float64; from states `[N, D]`, and the token before."""
    head, R, state = jax.tree.map(lambda x: np.asarray(x, np.float64), params), drafter.head.markov_rank, None
    markov, biases, said = head["markov_head"], [], []
    for hidden, token in zip(np.asarray(z, np.float64), tokens, strict=True):
        e = markov["markov_w1"]["embedding"][token]
        match drafter.head.markov_head_type:
            case "vanilla":
                read = e
            case "gated":
                gate = markov["gate_proj"]
                read = sigmoid(np.concatenate([hidden, e]) @ gate["kernel"] + gate["bias"]) * e
            case "rnn":
                state = np.zeros(R) if state is None else state
                joint = np.concatenate([state, e, hidden]) @ markov["joint_proj"]["kernel"]
                g, candidate, out = np.split(joint + markov["joint_proj"]["bias"], 3)
                state, read = sigmoid(g) * state + (1 - sigmoid(g)) * np.tanh(candidate), np.tanh(out)
        biases.append(read @ markov["markov_w2"]["kernel"])
        if drafter.head.enable_confidence_head:
            x = np.concatenate([hidden, e]) if drafter.head.confidence_head_with_markov else hidden
            said.append((x @ head["confidence_head"]["proj"]["kernel"] + head["confidence_head"]["proj"]["bias"])[0])
    return np.array(biases), np.array(said)


@forms
def test_the_loss_equals_plain_loops(name):
    """Both branches, a mix of losses, and the confidence."""
    drafter, params = drafter_and_params(name)
    final, base = Objective("decay", "ce=0.1,tv=0.9"), Objective("auf")
    config = LossConfig(drafter=drafter, objective=final, base_objective=base, slot_chunk=7)
    batch, anchors, keep = test_domino.drawn_blocks(1)
    batch, blocks = with_states(batch), make_blocks(batch, anchors, keep, config=drafter)
    z = np.asarray(block_hidden(params, HEAD, batch, blocks, config=config))[:, :, drafter.first_slot :]
    lm_head, valid = np.asarray(HEAD.lm_head, np.float64), np.asarray(blocks.valid)
    y = np.asarray(batch.target_hidden, np.float64) @ lm_head
    decay = np.exp(-np.arange(drafter.num_labels) / c.decay_gamma(final, K))
    want = dict.fromkeys(("final", "base", "confidence", "weights", "base weights", "base right", "error"), 0.0)
    for b, a in np.ndindex(keep.shape):
        previous, labels = np.asarray(blocks.previous[b, a]), np.asarray(blocks.labels[b, a])
        bias, said = block_by_hand(drafter, params, z[b, a], previous)
        plain = z[b, a].astype(np.float64) @ lm_head
        alive = True
        for n in range(drafter.num_labels):
            teacher = y[b, min(int(anchors[b, a]) + n, y.shape[1] - 1)]
            mixed, _ = test_soft_losses.slot_losses(plain[n] + bias[n], teacher, labels[n], 1.0)
            weight = decay[n] * valid[b, a, n]
            want["final"] += weight * (0.1 * mixed["ce"] + 0.9 * mixed["tv"])
            want["weights"] += weight
            if drafter.head.enable_confidence_head:
                p, target = sigmoid(said[n]), 1 - mixed["tv"]
                want["confidence"] -= weight * (target * np.log(p) + (1 - target) * np.log(1 - p))
                want["error"] += weight * abs(p - target)
            alive = alive and valid[b, a, n]
            if alive:
                hard, _ = test_soft_losses.slot_losses(plain[n], teacher, labels[n], 1.0)
                want["base"] += hard["ce"]
                want["base weights"] += 1
            alive = alive and plain[n].argmax() == labels[n]
            want["base right"] += alive
    numerators, aux = jax.jit(loss_sums, static_argnames="config")(params, HEAD, batch, anchors, keep, config=config)
    found = {"final": aux.final.numerator, "weights": aux.final.denominator}
    found |= {"base": aux.base.numerator, "base weights": aux.base.denominator}
    if drafter.head.enable_confidence_head:
        found |= {
            "confidence": aux.confidence.numerator / drafter.head.confidence_weight,
            "error": aux.confidence.error,
        }
        np.testing.assert_allclose(aux.confidence.denominator, want["weights"], rtol=1e-5)
    else:
        assert aux.confidence is None and numerators.keys() == {"final", "base"}
    for key, value in found.items():
        np.testing.assert_allclose(value, want[key], rtol=2e-5, err_msg=key)
    loss = weighted(numerators, branch_factors(aux, drafter.head, 0.3))
    whole = 0.7 * want["final"] / want["weights"] + 0.3 * want["base"] / want["base weights"]
    whole += drafter.head.confidence_weight * want["confidence"] / want["weights"]
    np.testing.assert_allclose(loss, whole, rtol=2e-5)
    assert want["base right"] > 3


def test_the_confidence_learns_from_the_target_alone_and_the_base_branch_only_if_asked():
    drafter, params = drafter_and_params("vanilla")
    batch, anchors, keep = test_domino.drawn_blocks(1)
    batch = with_states(batch)

    @functools.partial(jax.jit, static_argnames=("config", "part"))
    def gradient(params, batch, *, config, part):
        return jax.grad(lambda p: loss_sums(p, HEAD, batch, anchors, keep, config=config)[0][part])(params)

    config = LossConfig(drafter=drafter, objective=Objective("auf"), slot_chunk=7)
    assert config.soft and config.objectives.keys() == {"final"}
    _, aux = loss_sums(params, HEAD, batch, anchors, keep, config=config)
    assert aux.base is None and aux.measures().keys() >= {"confidence_loss", "confidence_error", "tau"}
    said = gradient(params, batch, config=config, part="confidence")
    assert all(jnp.abs(x).max() > 0 for x in jax.tree.leaves(said["confidence_head"]))
    assert not said["markov_head"]["markov_w2"]["kernel"].any()  # a is data, though it comes of these logits
    own = gradient(params, batch, config=config, part="final")
    assert not any(x.any() for x in jax.tree.leaves(own["confidence_head"]))
    assert jnp.abs(own["markov_head"]["markov_w2"]["kernel"]).max() > 0
    with pytest.raises(SpecaufError, match="without target_hidden"):
        loss_sums(params, HEAD, batch.replace(target_hidden=None), anchors, keep, config=config)
    witness = dataclasses.replace(config, objective=Objective("auf", witness="base"))
    with pytest.raises(SpecaufError, match="no base branch that trains"):
        loss_sums(params, HEAD, batch, anchors, keep, config=witness)


@forms
def test_chunks_and_accumulation_change_nothing(name):
    drafter, params = drafter_and_params(name)
    batch = tiny.random_batch([[24], [8, 11], [20], [5, 5, 5]], seed=5)
    optimizer = optax.sgd(1.0)

    def after(chunk, parts):
        config = LossConfig(
            drafter=drafter, objective=Objective("auf", "kl"), base_objective=Objective("auf"), num_anchors=6,
            slot_chunk=chunk,
        )  # fmt: skip
        step = make_train_step(config, TARGET, optimizer, accumulation=parts, seed=7, lambda_base=lambda step: 0.3)
        state, metrics = jax.jit(step)(init_state(params, optimizer), TARGET_PARAMS, batch)
        return jax.tree.map(jnp.subtract, params, state.params), metrics["loss"]  # the gradient

    whole = after(10**6, 1)
    assert tiny.largest_difference(after(3, 1), whole) < 1e-5
    assert tiny.largest_difference(after(10**6, 4), whole) < 1e-5


SPREAD, MESHES = ("vanilla", "rnn, unshifted"), ((2, 2, 2), (1, 4, 2))


def spread_differences():
    """Loss and gradient of every form over meshes of 8 devices against one; printed."""
    for name in SPREAD:
        drafter, params = drafter_and_params(name)
        config = LossConfig(drafter=drafter, objective=Objective("auf", "kl"), num_anchors=6, slot_chunk=16)
        batch = with_states(tiny.random_batch([[24], [8, 11], [20], [5, 5, 5]] * 2, seed=5))

        @functools.partial(jax.jit, static_argnames="config")
        def run(params, head, batch, config=config):
            return jax.value_and_grad(lambda p: loss_fn(p, head, batch, jax.random.key(1), config=config)[0])(params)

        one = run(params, HEAD, batch)
        for axes in MESHES:
            mesh = make_mesh(c.Mesh(*axes))
            found = run(*placed_on(mesh, params, HEAD, batch))
            print(name, axes, tiny.largest_difference(jax.device_get(found), jax.device_get(one)))


def placed_on(mesh, params, head, batch):
    return (
        jax.device_put(params, parameter_sharding(params, mesh)),
        jax.device_put(head, replicated(mesh)),
        jax.device_put(batch, batch_sharding(mesh)),
    )


def test_eight_devices_compute_what_one_does():
    said = tiny.on_eight_devices("import test_dspark; test_dspark.spread_differences()").splitlines()
    assert len(said) == len(MESHES) * len(SPREAD)
    for line in said:
        assert float(line.rsplit(maxsplit=1)[1]) < 1e-5, line


# ---------------------------------------------------------------------------------------------
# Training meets decoding


def trained_logits(params, target_params, batch, anchors, keep, *, config, target=TARGET):
    """Final logits `[B, A, N, V]` and confidence `[B, A, N]` of training."""
    logits, confidence = [], []

    def seen(x, *others):
        logits.append(x)
        return label_scores(x, *others)

    def said(x, acceptance):
        confidence.append(x)
        return real(x, acceptance)

    real, rows = dspark.confidence_scores, (batch.tokens, batch.positions, batch.document_ids)
    features, hidden = target_states(target_params, *rows, config=target, layer_ids=config.drafter.target_layer_ids)
    batch = batch.replace(features=features, target_hidden=hidden)
    with (
        mock.patch.object(dspark, "label_scores", seen),
        mock.patch.object(dspark, "confidence_scores", said),
        mock.patch.object(dspark, "chunked_scores", lambda scores, arrays, *, chunk: scores(*arrays)),
    ):
        loss_sums(params, target_head(target_params), batch, anchors, keep, config=config)
    return logits[0], confidence[0] if confidence else None


@forms
def test_training_logits_and_confidence_equal_those_of_decoding(name):
    """Documents in packed rows against the same prompts alone; the text goes on with exactly what was drafted."""
    drafter, params = drafter_and_params(name)
    batch = test_domino.random_batch([[7, 17, 8]] * 5, length=32, seed=4, supervised=1.0)
    anchors = jnp.array([0, 2, 7, 11, 12])
    proposal = test_domino.proposed(params, drafter, batch.tokens[:, 7:24], anchors)
    index = 7 + anchors[:, None]
    tokens = batch.tokens.at[jnp.arange(5)[:, None], index + 1 + jnp.arange(K - 1)].set(proposal.tokens)
    assert (tokens != batch.tokens).any(1).all()
    config = LossConfig(drafter=drafter, objective=Objective(), slot_chunk=7)
    final, said = trained_logits(params, TARGET_PARAMS, batch.replace(tokens=tokens), index, index > 0, config=config)
    np.testing.assert_allclose(final[:, 0, : K - 1], proposal.logits, atol=1e-5 * float(jnp.abs(final).max()))
    np.testing.assert_array_equal(final[:, 0, : K - 1].argmax(-1), proposal.tokens)
    if not drafter.head.enable_confidence_head:
        assert said is None and proposal.survival is None
        return
    survival = np.cumprod(sigmoid(np.asarray(said[:, 0, : K - 1], np.float64)), axis=1)
    np.testing.assert_allclose(proposal.survival, survival, atol=1e-5)
    assert survival.min() > 0 and survival.max() < 1 and np.ptp(survival[:, 0]) > 0.05


def serving_drafter(name):
    """A random drafter of blocks of 4 for test_decoding's target, whose bias matters."""
    drafter = tiny.dspark_config(test_domino.SERVING, target_layer_ids=(0, 2), **FORMS[name])
    params = tiny.drafter_params(drafter, seed=3)
    params["markov_head"]["markov_w2"]["kernel"] *= 2.0
    return drafter, params


@forms
def test_greedy_speculation_writes_the_targets_own_words(name):
    """Prompts of different lengths in batches; the predictions of all rounds are added up."""
    drafter, params = serving_drafter(name)
    prompts, texts = test_domino.own_words()
    config = test_domino.decoding(drafter)
    found = generate(params, test_domino.serving_target(), prompts, config=config, max_new_tokens=20, batch_size=4)
    assert [g.tokens for g in found] == [text[:20] for text in texts]
    assert {0, 1} <= {n for g in found for n in g.accepted}
    if not drafter.head.enable_confidence_head:
        assert all(g.survival == [] for g in found) and calibration(found) is None
        return
    alone = [survival_alone(params, drafter, prompt) for prompt in prompts]
    np.testing.assert_allclose([g.survival for g in found], alone, atol=1e-4)
    shares = calibration(found)
    assert all(0 <= x <= 1 for x in shares["predicted"] + shares["observed"])
    assert np.all(np.diff(shares["predicted"]) <= 0) and len(shares["predicted"]) == drafter.block_size - 1


def survival_alone(params, drafter, prompt):
    """The predictions of one prompt's rounds, added up."""
    config, target = test_domino.decoding(drafter), test_domino.serving_target()
    state, total = start(params, target, [prompt], config=config, max_new_tokens=20), 0.0
    step = jax.jit(draft_and_verify, static_argnames="config")
    while not state.done[0]:
        state, done = step(params, target, state, config=config)
        total = total + np.asarray(done.survival[0])
    return total


@forms
def test_sampled_speculation_follows_the_targets_law(name):
    """Chi-square of 3-token continuations, rare ones pooled, against enumeration."""
    drafter, params = serving_drafter(name)
    target, sampling, prompt, draws = test_domino.serving_target(1.0), c.Sampling(1.0, top_k=4), [3, 1, 4], 3000
    found = generate(params, target, [prompt] * draws, config=test_domino.decoding(drafter), max_new_tokens=3,
                     sampling=sampling, seed=1, batch_size=draws)  # fmt: skip
    assert {0, 1, 2} <= {n for g in found for n in g.accepted}
    test_domino.assert_law(found, target, sampling)


@forms
def test_one_text_learnt_by_heart_decodes_at_tau_k(name):
    assert test_overfit.learn_by_heart(DSpark(**{"markov_rank": 8} | FORMS[name]), "decay") == 0


def test_the_confidence_learns_the_rate_of_acceptance():
    """Of every slot of one batch, learnt by heart; it could not by saying the same everywhere."""
    drafter, params = drafter_and_params("vanilla")
    batch = with_states(tiny.random_batch([[24], [8, 11]], seed=5, supervised=1.0))
    config = LossConfig(drafter=drafter, objective=Objective("full"), num_anchors=8)
    optimizer = make_optimizer(c.TrainOptimisation(steps=300, learning_rate=1e-2))
    step = make_train_step(config, TARGET, optimizer)

    @jax.jit
    def train(state):
        return jax.lax.fori_loop(0, 300, lambda _, state: step(state, TARGET_PARAMS, batch)[0], state)

    state = train(init_state(params, optimizer))
    _, aux = loss_fn(state.params, HEAD, batch, jax.random.key(0), config=config)
    _, before = loss_fn(params, HEAD, batch, jax.random.key(0), config=config)
    assert aux.measures()["confidence_error"] < 0.05 < 0.15 < before.measures()["confidence_error"]


# ---------------------------------------------------------------------------------------------
# Files


@forms
@pytest.mark.parametrize("layout", ["zlab", "specforge", "speculators"])
def test_files_hold_the_head(name, layout, tmp_path):
    drafter, params = drafter_and_params(name)
    save_target(TARGET_PARAMS, TARGET, tmp_path / "target")
    save_drafter(params, drafter, tmp_path / "out", layout=layout, verifier=str(tmp_path / "target"))
    found, config = load_drafter(tmp_path / "out")
    alpha = 1.0 if layout == "speculators" else drafter.head.confidence_head_alpha  # which only training reads
    head = dataclasses.replace(drafter.head, confidence_head_alpha=alpha)
    layers = None if layout == "speculators" else drafter.num_target_layers
    assert config == dataclasses.replace(drafter, head=head, num_target_layers=layers)
    assert tiny.same_bits(found, params)
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    names = {"zlab": "Qwen3DSparkModel", "specforge": "DSparkDraftModel", "speculators": "DSparkSpeculator"}
    assert values["architectures"] == [names[layout]]
    assert values["markov_rank"] == 6 and values["markov_head_type"] == drafter.head.markov_head_type
    if layout != "speculators":
        assert values["dflash_config"]["projector_type"] == "dspark"
        assert values["dflash_config"]["attention_mode"] == "gqa"


def test_a_flat_file_is_read_as_the_engines_read_it(tmp_path):
    """DeepSpec's: everything at the top level, no projector_type, labels shifted."""
    drafter, params = drafter_and_params("vanilla")
    save_drafter(params, drafter, tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    values = json.loads(path.read_text())
    inner = values.pop("dflash_config")
    for key in ("projector_type", "attention_mode"):
        inner.pop(key)
    path.write_text(json.dumps(values | inner))
    found, config = load_drafter(tmp_path / "out")
    assert config == drafter and tiny.same_bits(found, params)


def test_settings_that_nothing_reads_are_refused():
    for setting in ("confidence_head_alpha=0.5", "confidence_head_with_markov=false"):
        with pytest.raises(SpecaufError, match="where it has no effect"):
            make_head("dspark", ("enable_confidence_head=false", setting))
    for alpha in (-3.0, float("inf"), float("nan")):
        for enabled in (True, False):
            with pytest.raises(SpecaufError, match="confidence_head_alpha"):
                DSpark(confidence_head_alpha=alpha, enable_confidence_head=enabled)
    DSpark(enable_confidence_head=False, confidence_head_alpha=0.0)  # as SpecForge writes it


@pytest.mark.parametrize("missing", [True, False])
def test_speculators_own_default_is_shifted(missing, tmp_path):
    drafter, params = drafter_and_params("vanilla")
    save_target(TARGET_PARAMS, TARGET, tmp_path / "target")
    save_drafter(params, drafter, tmp_path / "out", layout="speculators", verifier=str(tmp_path / "target"))
    path = tmp_path / "out" / "config.json"
    values = json.loads(path.read_text()) | {"sample_from_anchor": None}
    if missing:
        values.pop("sample_from_anchor")
    path.write_text(json.dumps(values))
    assert load_drafter(tmp_path / "out")[1].head.shift_label


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"markov_head_type": "fir"}, "markov_head_type is 'fir'"),
        ({"markov_head_type": 3}, "markov_head_type is 3"),
        ({"markov_rank": 0}, "markov_rank is 0"),
        ({"markov_rank": "256"}, "markov_rank is '256'"),
        ({"enable_confidence_head": 1}, "enable_confidence_head is 1"),
        ({"confidence_head_alpha": 0.0}, "confidence_head_alpha is 0.0"),
        ({"confidence_head_alpha": True}, "confidence_head_alpha is True"),
        ({"attention_mode": "mha"}, "attention_mode is 'mha'"),
        ({"markov_rank": 7}, "(1, 23) by config.json"),
    ],
)
def test_files_that_cannot_be_read(changes, said, tmp_path):
    drafter, params = drafter_and_params("vanilla")
    save_drafter(params, drafter, tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    values = json.loads(path.read_text())
    inner = values["dflash_config"] | changes
    path.write_text(
        json.dumps(values | {name: inner[name] for name in values.keys() & inner.keys()} | {"dflash_config": inner})
    )
    with pytest.raises(SpecaufError) as error:
        load_drafter(tmp_path / "out")
    assert said in str(error.value)


def test_bfloat16_computes_in_its_own_precision():
    drafter, params = drafter_and_params("rnn")
    batch, anchors, keep = test_domino.drawn_blocks(1)
    low, batch = cast(params, "bfloat16"), with_states(batch)
    z = jnp.zeros((2, K, TARGET.hidden_size), jnp.bfloat16)
    assert drafter.head.outputs(low, z, jnp.zeros((2, K), jnp.int32)).dtype == jnp.bfloat16
    config = LossConfig(drafter=drafter, objective=Objective("auf"), dtype="bfloat16")
    exact = dataclasses.replace(config, dtype="float32")
    one, other = (loss_sums(params, HEAD, batch, anchors, keep, config=x)[1] for x in (config, exact))
    assert abs(one.confidence.numerator / other.confidence.numerator - 1) < 0.05


def test_fewer_verified_slots_have_fewer_predictions():
    drafter, params = serving_drafter("vanilla")
    config = Decoding(TargetStep(test_domino.SERVING, (0, 2)), drafter, verify_slots=2)
    prompts, texts = test_domino.own_words()
    found = generate(params, test_domino.serving_target(), prompts, config=config, max_new_tokens=20, batch_size=4)
    assert [g.tokens for g in found] == [text[:20] for text in texts]
    assert all(len(g.survival) == 1 for g in found)
