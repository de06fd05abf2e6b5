"""DFlash2: convolutions over a block's slots, the selector among likely tokens, its loss, and decoding with them."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import test_domino
import test_dspark
import test_overfit
import tiny
from flax import nnx

from specauf_jax import config as c
from specauf_jax.config import Objective
from specauf_jax.decoding.generate import generate
from specauf_jax.errors import SpecaufError
from specauf_jax.models.drafter import init_drafter
from specauf_jax.models.heads.dflash2 import DFlash2
from specauf_jax.models.layers import SlotConvolution
from specauf_jax.models.weights import load_drafter, save_drafter, save_target
from specauf_jax.objectives import objective_sums
from specauf_jax.sharding import make_mesh
from specauf_jax.training.blocks import make_blocks
from specauf_jax.training.loss import LossConfig, block_hidden, branch_factors, loss_fn, loss_sums, weighted
from specauf_jax.training.step import init_state, make_train_step

K, k = 5, 4
TARGET, TARGET_PARAMS, HEAD = test_domino.TARGET, test_domino.TARGET_PARAMS, test_domino.HEAD
FORMS = {
    "unshifted": {},
    "shifted, three taps": {"shift_label": True, "conv_kernel_size": 3, "selector_loss_alpha": 0.5},
}
forms = pytest.mark.parametrize("name", FORMS)


def drafter_and_params(name, target=TARGET, seed=2, **changes):
    drafter = tiny.dflash2_config(target, block_size=K, selector_top_k=k, **FORMS[name] | changes)
    return drafter, tiny.drafter_params(drafter, seed=seed)


# ---------------------------------------------------------------------------------------------
# The convolutions, by hand


@pytest.mark.parametrize("taps", [1, 2, 3])
def test_a_convolution_equals_plain_loops(taps):
    D, group = 6, 3
    rng = np.random.default_rng(0)
    base, projection = rng.standard_normal((2, taps, D)), rng.standard_normal((D, 2 * taps * (D // group)))
    conv = SlotConvolution(D, taps, group, rngs=nnx.Rngs(0))
    conv.base_kernel[...] = jnp.asarray(base, jnp.float32)
    conv.kernel_projection.kernel[...] = jnp.asarray(projection, jnp.float32)
    h, x = rng.standard_normal((2, 3, K, D)), rng.standard_normal((2, 3, K, D))
    kernels = conv.kernels(jnp.asarray(h, jnp.float32))
    for side in (0, 1):
        found = conv.convolve(jnp.asarray(x, jnp.float32), kernels[..., side, :, :])
        want = np.zeros_like(x)
        for *at, slot, channel in np.ndindex(x.shape):
            dynamic = (h[*at, slot] @ projection).reshape(2, taps, D // group)
            for t in range(min(taps, slot + 1)):
                weight = base[side, t, channel] + dynamic[side, t, channel // group]
                want[*at, slot, channel] += weight * x[*at, slot - t, channel]
        np.testing.assert_allclose(found, want, atol=1e-5)


def test_training_starts_from_plain_dflash():
    """The same states as of the body without convolutions."""
    drafter = tiny.dflash2_config(TARGET, block_size=K)
    plain = tiny.drafter_config(TARGET, block_size=K)
    params = init_drafter(drafter, jax.random.key(0))
    body = {name: x for name, x in params.items() if name != "candidate_selector"}
    body["layers"] = {name: x for name, x in params["layers"].items() if not name.endswith("_conv")}
    batch, anchors, keep = test_domino.drawn_blocks(1)
    batch = test_domino.with_features(batch)

    def states(config, params):
        blocks = make_blocks(batch, anchors, keep, config=config)
        base = Objective() if "base" in config.head.branches else None
        loss = LossConfig(drafter=config, objective=Objective(), base_objective=base)
        return block_hidden(params, HEAD, batch, blocks, config=loss)

    assert tiny.largest_difference(states(drafter, params), states(plain, body)) < 1e-6
    moved = jax.tree.map(lambda x: x + 0.1, params["layers"]["attention_conv"])
    params["layers"] |= {"attention_conv": moved}
    assert tiny.largest_difference(states(drafter, params), states(plain, body)) > 0.01


# ---------------------------------------------------------------------------------------------
# The selector's loss, by hand


def selected_by_hand(params, z, plain, previous):
    """Candidate → score, float64, of one slot; `plain` are the body's logits."""
    head = jax.tree.map(lambda x: np.asarray(x, np.float64), params["candidate_selector"])
    context = head["predecessor_codebook"][previous] * (z @ head["hidden_projection"]["kernel"])
    best = np.argsort(-plain, kind="stable")[:k]
    return {int(token): plain[token] + context @ head["successor_codebook"][token] for token in best}, context


@forms
@pytest.mark.parametrize("final", ["decay", "auf", "dpace"])
def test_the_loss_equals_plain_loops(name, final):
    drafter, params = drafter_and_params(name)
    objective, base = Objective(final), Objective("auf")
    config = LossConfig(drafter=drafter, objective=objective, base_objective=base, slot_chunk=7)
    batch, anchors, keep = test_domino.drawn_blocks(1)
    batch = test_domino.with_features(batch)
    blocks = make_blocks(batch, anchors, keep, config=drafter)
    z = np.asarray(block_hidden(params, HEAD, batch, blocks, config=config), np.float64)[:, :, drafter.first_slot :]
    lm_head, valid = np.asarray(HEAD.lm_head, np.float64), np.asarray(blocks.valid)
    S = np.asarray(params["candidate_selector"]["successor_codebook"], np.float64)
    branches = {"final": np.empty(keep.shape, object), "base": np.empty(keep.shape, object)}
    outside = inside = 0
    for b, a in np.ndindex(keep.shape):
        seen = {"final": [], "base": []}
        for n in range(drafter.num_labels):
            plain, label = z[b, a, n] @ lm_head, int(blocks.labels[b, a, n])
            ok = bool(valid[b, a, n])
            probability = np.exp(plain[label]) / np.exp(plain).sum()
            seen["base"].append((ok, ok and plain.argmax() == label, False, probability))
            scores, context = selected_by_hand(params, z[b, a, n], plain, int(blocks.previous[b, a, n]))
            right = ok and max(scores, key=scores.get) == label
            outside, inside = outside + (ok and label not in scores), inside + right
            if label not in scores:
                scores.popitem()  # the weakest
                scores[label] = plain[label] + context @ S[label]
            probability = np.exp(scores[label]) / sum(map(np.exp, scores.values()))
            seen["final"].append((ok, right, False, probability))
        for branch, slots in seen.items():
            branches[branch][b, a] = slots
    numerators, aux = jax.jit(loss_sums, static_argnames="config")(params, HEAD, batch, anchors, keep, config=config)
    by_hand = {
        branch: test_domino.branch_by_hand(how, drafter, np.asarray(keep), branches[branch], branches[branch])[0]
        for branch, how in (("final", objective), ("base", base))
    }
    for branch, want in by_hand.items():
        test_domino.check_aux(getattr(aux, branch), want, branch)
    loss = sum(by_hand[x]["numerator"] / by_hand[x]["denominator"] * share
               for x, share in (("final", drafter.head.selector_loss_alpha), ("base", 1.0)))  # fmt: skip
    np.testing.assert_allclose(weighted(numerators, branch_factors(aux, drafter.head, 0.3)), loss, rtol=1e-5)
    assert outside > 3 and inside > 3


@forms
def test_chunks_and_accumulation_change_nothing(name):
    drafter, params = drafter_and_params(name)
    batch = tiny.random_batch([[24], [8, 11], [20], [5, 5, 5]], seed=5)
    optimizer = optax.sgd(1.0)

    def after(chunk, parts):
        config = LossConfig(
            drafter=drafter, objective=Objective("auf"), base_objective=Objective("decay", "ce=0.1,tv=0.9"),
            num_anchors=6, slot_chunk=chunk,
        )  # fmt: skip
        step = make_train_step(config, TARGET, optimizer, accumulation=parts, seed=7)
        state, metrics = jax.jit(step)(init_state(params, optimizer), TARGET_PARAMS, batch)
        assert "lambda_base" not in metrics
        return jax.tree.map(jnp.subtract, params, state.params), metrics["loss"]  # the gradient

    whole = after(10**6, 1)
    assert tiny.largest_difference(after(3, 1), whole) < 1e-5
    assert tiny.largest_difference(after(10**6, 4), whole) < 1e-5
    assert all(jnp.abs(x).max() > 0 for x in jax.tree.leaves(whole[0]))


MESHES = ((2, 2, 2), (1, 4, 2))


def spread_differences():
    """Loss and gradient over meshes of 8 devices against one; printed."""
    for name in FORMS:
        drafter, params = drafter_and_params(name)
        config = LossConfig(drafter=drafter, objective=Objective("auf"), base_objective=Objective("auf"),
                            num_anchors=6, slot_chunk=16)  # fmt: skip
        batch = test_domino.with_features(tiny.random_batch([[24], [8, 11], [20], [5, 5, 5]] * 2, seed=5))

        @functools.partial(jax.jit, static_argnames="config")
        def run(params, head, batch, config=config):
            return jax.value_and_grad(lambda p: loss_fn(p, head, batch, jax.random.key(1), config=config)[0])(params)

        one = run(params, HEAD, batch)
        for axes in MESHES:
            found = run(*test_dspark.placed_on(make_mesh(c.Mesh(*axes)), params, HEAD, batch))
            print(name, axes, tiny.largest_difference(jax.device_get(found), jax.device_get(one)))


def test_eight_devices_compute_what_one_does():
    said = tiny.on_eight_devices("import test_dflash2; test_dflash2.spread_differences()").splitlines()
    assert len(said) == len(MESHES) * len(FORMS)
    for line in said:
        assert float(line.rsplit(maxsplit=1)[1]) < 1e-5, line


def test_the_selector_compares_with_labels_alone():
    drafter, _ = drafter_and_params("unshifted")
    for objective in (Objective("auf", "kl"), Objective("survival")):
        with pytest.raises(SpecaufError, match="final branch of DFlash2"):
            LossConfig(drafter=drafter, objective=objective, base_objective=Objective())
        LossConfig(drafter=drafter, objective=Objective(), base_objective=objective)
    with pytest.raises(SpecaufError, match="no base_objective for DFlash2"):
        LossConfig(drafter=drafter, objective=Objective())


@pytest.mark.parametrize(
    "objective", [Objective("griffin", griffin_top_n=8), Objective("auf", tree_nodes=32), Objective("auf")]
)
def test_a_label_that_is_no_candidate_is_a_miss(objective):
    """Also where the support forgives labels of a lower rank: decoding never drafts it."""
    drafter, params = drafter_and_params("unshifted")
    logits = jnp.tile(jnp.arange(drafter.vocab_size, dtype=jnp.float32)[::-1] * 9, (1, drafter.num_labels, 1))
    context = jnp.zeros((1, drafter.num_labels, drafter.head.selector_rank))
    weights = []
    for label in (k - 1, k):
        labels = jnp.full((1, drafter.num_labels), label)
        scores = drafter.head.selector_scores(params, logits, context, labels)
        weights.append(objective_sums(objective, scores, labels >= 0, block_size=K).weights[0])
    assert weights[1].tolist() == [1, 0, 0, 0]
    assert (weights[0].sum() > 1) == (objective.name == "griffin" or objective.tree_nodes is not None)


# ---------------------------------------------------------------------------------------------
# Training meets decoding


@forms
def test_training_knows_what_decoding_drafts(name):
    """Where the text goes on with exactly what was drafted, every slot is right; where with other tokens, none."""
    drafter, params = drafter_and_params(name, seed=5)
    batch = test_domino.random_batch([[7, 17, 8]] * 5, length=32, seed=4, supervised=1.0)
    anchors = jnp.array([0, 2, 7, 11, 12])
    proposal = test_domino.proposed(params, drafter, batch.tokens[:, 7:24], anchors)
    finite = np.isfinite(proposal.logits).sum(-1)
    assert (finite == k).all() and (proposal.tokens != tiny.MASK_TOKEN).all()
    index = 7 + anchors[:, None]
    config = LossConfig(drafter=drafter, objective=Objective(), base_objective=Objective())
    for change, tau in ((0, K), (1, 1)):
        drafts = (proposal.tokens + change) % tiny.MASK_TOKEN if change else proposal.tokens
        tokens = batch.tokens.at[jnp.arange(5)[:, None], index + 1 + jnp.arange(K - 1)].set(drafts)
        rows = test_domino.with_features(batch.replace(tokens=tokens))
        _, aux = loss_sums(params, HEAD, rows, index, index > 0, config=config)
        assert aux.measures()["tau"] == tau


def serving_drafter(name):
    """A random drafter of blocks of 4 for test_decoding's target, whose selector matters."""
    changes = {name: x for name, x in FORMS[name].items() if name != "conv_kernel_size"}
    drafter = tiny.dflash2_config(test_domino.SERVING, target_layer_ids=(0, 2), **changes)
    return drafter, tiny.drafter_params(drafter, seed=3)


@forms
@pytest.mark.parametrize("nodes", [None, 6])
def test_greedy_speculation_writes_the_targets_own_words(name, nodes):
    drafter, params = serving_drafter(name)
    prompts, texts = test_domino.own_words()
    config = dataclasses.replace(test_domino.decoding(drafter), tree_nodes=nodes)
    found = generate(params, test_domino.serving_target(), prompts, config=config, max_new_tokens=20, batch_size=4)
    assert [g.tokens for g in found] == [text[:20] for text in texts]
    assert {0, 1} <= {n for g in found for n in g.accepted}


@forms
@pytest.mark.parametrize("nodes", [None, 6])
def test_sampled_speculation_follows_the_targets_law(name, nodes):
    """Chi-square of 3-token continuations, rare ones pooled, against enumeration; most tokens are no candidates."""
    drafter, params = serving_drafter(name)
    target, sampling, prompt, draws = test_domino.serving_target(1.0), c.Sampling(1.0, top_k=6), [3, 1, 4], 3000
    config = dataclasses.replace(test_domino.decoding(drafter), tree_nodes=nodes)
    found = generate(params, target, [prompt] * draws, config=config, max_new_tokens=3, sampling=sampling, seed=1,
                     batch_size=draws)  # fmt: skip
    assert {0, 1, 2} <= {n for g in found for n in g.accepted}
    test_domino.assert_law(found, target, sampling)


@forms
def test_one_text_learnt_by_heart_decodes_at_tau_k(name):
    head = DFlash2(**{"conv_group_size": 8, "selector_rank": 8, "selector_top_k": k} | FORMS[name])
    assert test_overfit.learn_by_heart(head, "decay", base=Objective("decay")) == 0


# ---------------------------------------------------------------------------------------------
# Files


@forms
@pytest.mark.parametrize("layout", ["zlab", "speculators"])
def test_files_hold_the_head(name, layout, tmp_path):
    drafter, params = drafter_and_params(name)
    save_target(TARGET_PARAMS, TARGET, tmp_path / "target")
    save_drafter(params, drafter, tmp_path / "out", layout=layout, verifier=str(tmp_path / "target"))
    found, config = load_drafter(tmp_path / "out")
    alpha = 1.0 if layout == "speculators" else drafter.head.selector_loss_alpha  # which only training reads
    head = dataclasses.replace(drafter.head, selector_loss_alpha=alpha)
    layers = None if layout == "speculators" else drafter.num_target_layers
    assert config == dataclasses.replace(drafter, head=head, num_target_layers=layers)
    assert tiny.same_bits(found, params)
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert values["architectures"] == ["DFlash2DraftModel"]
    assert (values["selector_rank"], values["selector_top_k"], values["conv_group_size"]) == (6, k, 4)


def test_specforge_has_no_place_for_it(tmp_path):
    drafter, params = drafter_and_params("unshifted")
    with pytest.raises(SpecaufError, match="a DFlash2 drafter for the layout of SpecForge"):
        save_drafter(params, drafter, tmp_path / "out", layout="specforge")
    assert not (tmp_path / "out").exists()


def test_keys_that_change_nothing_are_passed_over(tmp_path):
    drafter, params = drafter_and_params("unshifted")
    save_drafter(params, drafter, tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    values = json.loads(path.read_text())
    values["dflash_config"] |= {"output_multiplier": 1.0, "final_logit_softcapping": None}
    path.write_text(json.dumps(values))
    assert load_drafter(tmp_path / "out")[1] == drafter


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"output_multiplier": 2.0}, "output_multiplier"),
        ({"conv_kernel_size": K + 1}, "conv_kernel_size is 6"),
        ({"conv_group_size": 3}, "conv_group_size is 3"),
        ({"selector_top_k": 24}, "selector_top_k is 24"),
        ({"selector_rank": 0}, "selector_rank is 0"),
        ({"selector_loss_alpha": 0.0}, "selector_loss_alpha is 0.0"),
        ({"selector_rank": 7}, "by config.json"),
    ],
)
def test_files_that_cannot_be_read(changes, said, tmp_path):
    drafter, params = drafter_and_params("unshifted")
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
