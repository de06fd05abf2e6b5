"""Drafters: specforge and speculators compute the same numbers from the same files, and draft the same words."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import peers
import pytest
import tiny
import torch
from peers import relative_error
from specforge.modeling.draft.dflash import extract_context_feature
from speculators.losses.eager import tv_loss
from speculators.models.dflash import core

from specauf_jax.config import Objective, TrainOptimisation
from specauf_jax.decoding.generate import generate
from specauf_jax.decoding.state import Decoding
from specauf_jax.models.target import TargetStep, target_head, target_states
from specauf_jax.models.tensors import flatten
from specauf_jax.models.weights import load_drafter, load_target, save_drafter, save_target
from specauf_jax.training.blocks import Batch, make_blocks
from specauf_jax.training.loss import LossConfig, block_hidden, branch_factors, loss_sums, weighted
from specauf_jax.training.step import init_state, lambda_base_schedule, make_optimizer, make_train_step

TOLERANCE = 2e-5  # of max(1, largest value); of a gradient's own largest value
K, V, S = 8, 61, 40
TARGET = tiny.target_config(vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=6, head_dim=16,
                            rope_theta=1e6, rms_norm_eps=1e-5)  # fmt: skip
COMMON = {"block_size": K, "mask_token_id": V - 1, "target_layer_ids": (1, 2, 4), "num_key_value_heads": 1}
HEAD = {"emb_dim": 12, "gru_hidden_dim": 20}
MIXED = {"num_hidden_layers": 3, "layer_types": ("sliding_attention", "full_attention", "sliding_attention")}
DRAFTERS = {
    "dflash": {},
    "dflash, windows": {**MIXED, "sliding_window": 11},
    "domino, shifted": {**HEAD, "shift_label": True},
    "domino, shifted, first three as they are": {**HEAD, "pure_draft_prefix_len": 3},
    "domino, not shifted": {**HEAD, "shift_label": False, "pure_draft_prefix_len": 0},
    "domino, not shifted, windows": {**HEAD, "shift_label": False, **MIXED, "sliding_window": 9},
    "dspark": {},
    "dspark, gated": {"markov_head_type": "gated", "confidence_head_with_markov": False},
    "dspark, rnn": {"markov_head_type": "rnn", "confidence_head_alpha": 0.5},
    "dspark, not shifted, mha": {"shift_label": False, "enable_confidence_head": False, "num_key_value_heads": 4},
    "dspark, rnn, not shifted": {"shift_label": False, "markov_head_type": "rnn"},
}
drafters = pytest.mark.parametrize("name", DRAFTERS)
dominos = pytest.mark.parametrize("name", [name for name in DRAFTERS if "domino" in name])
dsparks = pytest.mark.parametrize("name", [name for name in DRAFTERS if "dspark" in name])
ANCHORS = np.array([[0, 3, 9, 17, 30, 38], [1, 2, 11, 12, 36, 0], [0, 5, 6, 20, 0, 0]], np.int32)
KEEP = np.array([[True] * 6, [True] * 5 + [False], [True] * 4 + [False] * 2])


def drafter_config(name):
    makers = {"dflash": tiny.drafter_config, "domino": tiny.domino_config, "dspark": tiny.dspark_config}
    make = makers[name.partition(",")[0]]
    return make(TARGET, **COMMON | DRAFTERS[name])


def both_branches(config, objective):
    """The same objective for all branches of a head, which train if λ lets them."""
    trains = config.head.base_ratio(None)
    return LossConfig(drafter=config, objective=objective, base_objective=objective if trains else None)


def is_domino(name):
    return "domino" in name


@functools.cache
def target_parameters():
    """Random, but never writing the mask token, which specforge's generation would cut from the text."""
    params = tiny.target_params(TARGET)
    return params | {"lm_head": {"kernel": params["lm_head"]["kernel"].at[:, V - 1].set(0.0)}}


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """A target's folder."""
    folder = tmp_path_factory.mktemp("models") / "target"
    save_target(target_parameters(), TARGET, folder)
    return folder


@functools.cache
def rows():
    """Random text without the mask token; holes in the loss mask; the last row ends early. Blocks overrun both ends."""
    rng = np.random.default_rng(0)
    tokens = np.where(rng.random((3, S)) < 0.7, rng.integers(1, 5, (3, S)), rng.integers(1, V - 1, (3, S)))
    mask = rng.random((3, S)) < 0.9
    ids = np.ones((3, S), np.int32)
    tokens[2, 26:], mask[2, 26:], ids[2, 26:] = 0, False, 0
    return tokens.astype(np.int32), mask, ids


def our_batch(target_params, config, tokens, mask, ids, positions=None):
    positions = (
        np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape) if positions is None else positions
    )
    features, hidden = target_states(
        target_params, tokens, positions, ids, config=TARGET, layer_ids=config.target_layer_ids
    )
    arrays = dict(tokens=tokens, loss_mask=mask, document_ids=ids, positions=positions, features=features,
                  target_hidden=hidden)  # fmt: skip
    return Batch(**jax.tree.map(jnp.asarray, arrays))


def their_features(model, tokens, layer_ids):
    with torch.no_grad():
        states = model(torch.as_tensor(tokens).long(), output_hidden_states=True).hidden_states
    return extract_context_feature(states, list(layer_ids))


@pytest.fixture
def pair(name, target, tmp_path):
    """A random drafter, by this project and by specforge from the file that this project wrote."""
    config = drafter_config(name)
    params = tiny.drafter_params(config)
    save_drafter(params, config, tmp_path / "drafter")
    backend = "eager" if "windows" in name else "sdpa"
    theirs = peers.read_drafter(tmp_path / "drafter", backend)
    return params, config, theirs, backend


@functools.partial(jax.jit, static_argnames="config")
def hidden_and_logits(params, head, batch, anchors, keep, *, config):
    blocks = make_blocks(batch, anchors, keep, config=config)
    hidden = block_hidden(params, head, batch, blocks, config=LossConfig(drafter=config, objective=Objective("full")))
    return hidden, hidden @ head.lm_head


@drafters
def test_hidden_states_and_logits_equal_those_of_specforge(name, pair, target):
    params, config, theirs, backend = pair
    model, (target_params, _) = peers.read_target(target), load_target(target)
    tokens, mask, ids = rows()
    batch = our_batch(target_params, config, tokens, mask, ids)
    features = their_features(model, tokens, config.target_layer_ids)
    real = ids > 0
    assert relative_error(batch.features[real], features[real], floor=1.0) < TOLERANCE
    hidden, logits = hidden_and_logits(params, target_head(target_params), batch, ANCHORS, KEEP, config=config)
    online = peers.training(theirs, model, ANCHORS, KEEP, backend)
    with torch.no_grad():
        *_, expected = online._forward_draft_blocks(torch.as_tensor(tokens).long(), features, torch.as_tensor(mask))
        expected = expected.reshape(hidden.shape)
        assert relative_error(hidden[KEEP], expected[KEEP], floor=1.0) < TOLERANCE
        assert relative_error(logits[KEEP], model.lm_head(expected)[KEEP], floor=1.0) < TOLERANCE


# ---------------------------------------------------------------------------------------------
# Losses and gradients

OBJECTIVES = {
    "full": (Objective("full"), {}),
    "decay": (Objective("decay", gamma=4.0), {"loss_decay_gamma": 4.0}),
    "dpace": (Objective("dpace", dpace_denominator="rows"), {"loss_type": "dpace"}),
}


@functools.partial(jax.jit, static_argnames="config")
def loss_and_gradient(params, head, batch, anchors, keep, share, *, config):
    def loss(params):
        numerators, aux = loss_sums(params, head, batch, anchors, keep, config=config)
        return weighted(numerators, jax.lax.stop_gradient(branch_factors(aux, config.drafter.head, share))), (
            numerators,
            aux,
        )

    return jax.value_and_grad(loss, has_aux=True)(params)


def their_loss(online, features, **more):
    """Loss, accuracy and measures, after a backward pass."""
    tokens, mask, _ = rows()
    online.zero_grad()
    loss, *rest = online(torch.as_tensor(tokens).long(), features, torch.as_tensor(mask).float(), **more)
    loss.backward()
    return loss.item(), *rest


def assert_gradients_equal(gradients, theirs):
    expected = {name: x.grad for name, x in theirs.named_parameters()}
    found = flatten(gradients, np.float32)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        if not gradient.any():
            assert not found[name].any(), name
        else:
            assert relative_error(found[name], gradient) < TOLERANCE, name


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", [name for name in DRAFTERS if "dflash" in name])
def test_losses_and_gradients_equal_those_of_specforge(name, objective, pair, target):
    params, config, theirs, backend = pair
    model, (target_params, _) = peers.read_target(target), load_target(target)
    objective, settings = OBJECTIVES[objective]
    loss_config = LossConfig(drafter=config, objective=objective, head_slots="all")
    arguments = target_head(target_params), our_batch(target_params, config, *rows()), ANCHORS, KEEP
    (loss, (_, aux)), gradients = loss_and_gradient(params, *arguments, 0.0, config=loss_config)
    online = peers.training(theirs, model, ANCHORS, KEEP, backend, **settings)
    expected, accuracy, measures = their_loss(online, their_features(model, rows()[0], config.target_layer_ids))
    assert relative_error(loss, expected, floor=1.0) < TOLERANCE
    numerator, denominator = measures["loss_terms"]
    assert relative_error(aux.final.numerator, numerator, floor=1.0) < TOLERANCE
    assert relative_error(aux.final.denominator, denominator, floor=1.0) < TOLERANCE
    assert relative_error(aux.measures()["common_token_accuracy"], accuracy) < 1e-6
    assert_gradients_equal(gradients, theirs)


@pytest.mark.parametrize("gamma", [None, 4.0])
@dominos
def test_both_losses_of_domino_and_their_gradients_equal_those_of_specforge(name, gamma, pair, target):
    params, config, theirs, backend = pair
    model, (target_params, _) = peers.read_target(target), load_target(target)
    objective = Objective("decay", gamma=gamma) if gamma else Objective("full")
    loss_config = both_branches(config, objective)
    arguments = target_head(target_params), our_batch(target_params, config, *rows()), ANCHORS, KEEP
    features = their_features(model, rows()[0], config.target_layer_ids)
    settings = {"shift_label": config.head.shift_label, "loss_decay_gamma": gamma}
    online = peers.training(theirs, model, ANCHORS, KEEP, backend, **settings)
    for share in (0.0, 0.3, 1.0):
        (loss, (numerators, aux)), gradients = loss_and_gradient(params, *arguments, share, config=loss_config)
        expected, accuracy, measures = their_loss(online, features, lambda_base=share)
        assert relative_error(loss, expected, floor=1.0) < TOLERANCE
        final = numerators["final"] / aux.final.denominator
        base = numerators["base"] / aux.base.denominator
        assert relative_error(final, measures["final_loss"], floor=1.0) < TOLERANCE
        assert relative_error(base, measures["base_loss"], floor=1.0) < TOLERANCE
        assert abs(final - base) > 0.01
        assert relative_error(aux.measures()["common_token_accuracy"], accuracy) < 1e-6
        assert relative_error(aux.base.measures()["common_token_accuracy"], measures["base_accuracy"]) < 1e-6
        assert_gradients_equal(gradients, theirs)


MIX = {"dspark_ce_loss_alpha": 0.1, "dspark_l1_loss_alpha": 0.9}  # L1 is twice the total variation
SHIFTED = [name for name in DRAFTERS if "dspark" in name and "not shifted" not in name]


@pytest.mark.parametrize("name", SHIFTED)  # its trainer knows no other
def test_all_losses_of_dspark_and_their_gradients_equal_those_of_specforge(name, pair, target):
    params, config, theirs, backend = pair
    model, (target_params, _) = peers.read_target(target), load_target(target)
    loss_config = LossConfig(drafter=config, objective=Objective("decay", "ce=0.1,tv=1.8", gamma=3.0))
    tokens, _, ids = rows()
    whole = ids > 0  # nothing trains behind a hole in its blocks, which is as under auf
    arguments = target_head(target_params), our_batch(target_params, config, tokens, whole, ids), ANCHORS, KEEP
    (loss, (_, aux)), gradients = loss_and_gradient(params, *arguments, 0.0, config=loss_config)
    settings = MIX | {"dspark_confidence_head_alpha": config.head.confidence_head_alpha, "loss_decay_gamma": 3.0}
    online = peers.training(theirs, model, ANCHORS, KEEP, backend, **settings)
    with torch.no_grad():
        last = model.model(torch.as_tensor(tokens).long()).last_hidden_state
    arrays = torch.as_tensor(tokens).long(), their_features(model, tokens, config.target_layer_ids)
    expected, accuracy, measures = online(*arrays, torch.as_tensor(whole).float(), target_last_hidden_states=last)
    expected.backward()
    assert relative_error(loss, expected, floor=1.0) < TOLERANCE
    assert relative_error(aux.measures()["common_token_accuracy"], accuracy) < 1e-6
    ratio = {name: pair[0] / pair[1] for name, pair in measures["ratio_metrics"].items() if name.startswith("conf")}
    alpha = config.head.confidence_head_alpha
    assert relative_error(aux.measures()["confidence_loss"], alpha * ratio["confidence_loss"], floor=1.0) < TOLERANCE
    assert relative_error(aux.measures()["confidence_error"], ratio["confidence_abs_error"], floor=1.0) < TOLERANCE
    assert_gradients_equal(gradients, theirs)


@pytest.mark.parametrize("name", ["dflash, windows", "domino, shifted"])
def test_documents_packed_in_a_row_train_as_rows_of_their_own_in_specforge(name, pair, target):
    params, config, theirs, backend = pair
    model, (target_params, _) = peers.read_target(target), load_target(target)
    tokens, mask, _ = rows()
    lengths, starts = (24, 16), (0, 24)
    packed = np.concatenate([tokens[i, :n] for i, n in enumerate(lengths)])[None]
    packed_mask = np.concatenate([mask[i, :n] for i, n in enumerate(lengths)])[None]
    ids, positions = (np.concatenate([f(i, n) for i, n in enumerate(lengths)])[None].astype(np.int32)
                      for f in (lambda i, n: np.full(n, i + 1), lambda i, n: np.arange(n)))  # fmt: skip
    apart, apart_mask = tokens[:2].copy(), mask[:2].copy()
    for i, n in enumerate(lengths):
        apart_mask[i, n:] = False
    anchors = np.array([[0, 8, 21], [0, 9, 14]], np.int32)
    batch = our_batch(target_params, config, packed, packed_mask, ids, positions)
    both = (anchors + np.array(starts, np.int32)[:, None]).reshape(1, -1)
    loss_config = both_branches(config, Objective("full"))
    (loss, _), gradients = loss_and_gradient(
        params, target_head(target_params), batch, both, both >= 0, 0.5, config=loss_config
    )
    more = {"shift_label": config.head.shift_label} if is_domino(name) else {}
    online = peers.training(theirs, model, anchors, anchors >= 0, backend, **more)
    features = their_features(model, apart, config.target_layer_ids)
    share = {"lambda_base": 0.5} if is_domino(name) else {}
    expected, *_ = online(torch.as_tensor(apart).long(), features, torch.as_tensor(apart_mask).float(), **share)
    expected.backward()
    assert relative_error(loss, expected, floor=1.0) < TOLERANCE
    assert_gradients_equal(gradients, theirs)


# ---------------------------------------------------------------------------------------------
# Drafting

# specforge decodes without its windows, and DSpark's shifted labels, which it trains, one slot late.
SERVED = [name for name in DRAFTERS if "windows" not in name and name not in SHIFTED]
PROMPT, NEW = 6, 40


@functools.cache
def texts():
    """Prompts, and how the target alone continues them."""
    prompts = np.random.default_rng(2).integers(1, V - 1, (40, PROMPT)).tolist()
    step, params = TargetStep(TARGET, (0,)), target_parameters()
    found = generate(None, params, prompts, config=Decoding(step), max_new_tokens=S - PROMPT, batch_size=40)
    return np.array([g.prompt + g.tokens for g in found], np.int32)


@functools.cache
def trained(name):
    """A drafter's parameters after a short training on half of the texts: right now and then."""
    config = drafter_config(name)
    tokens = jnp.asarray(texts()[:20])
    positions = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), tokens.shape)
    batch = Batch(tokens=tokens, loss_mask=positions >= PROMPT - 1, document_ids=jnp.ones_like(tokens),
                  positions=positions)  # fmt: skip
    settings = TrainOptimisation(steps=60, learning_rate=1e-2)
    optimizer = make_optimizer(settings)
    loss = dataclasses.replace(both_branches(config, Objective("decay")), num_anchors=16)
    step = make_train_step(loss, TARGET, optimizer, lambda_base=lambda_base_schedule(settings, config.head))

    @jax.jit
    def train(state, target_params, batch):
        return jax.lax.fori_loop(0, settings.steps, lambda _, state: step(state, target_params, batch)[0], state)

    return train(init_state(tiny.drafter_params(config), optimizer), target_parameters(), batch).params


def asked():
    """Prompts of different lengths, from texts that the drafter has seen and others."""
    return [text[: PROMPT + i].tolist() for i, text in enumerate(texts()[16:24])]


def assert_they_write_the_same(params, config, theirs, target, stop=None):
    """Tokens and accepted drafts of every round, which must be mixed."""
    model, (target_params, _) = peers.read_target(target), load_target(target)
    stops = () if stop is None else (stop,)
    decoding = Decoding(TargetStep(TARGET, config.target_layer_ids), config, stop_tokens=stops)
    lengths = []
    for prompt in asked():
        tokens, accepted = peers.speculate(theirs, model, prompt, NEW, list(stops) or None)
        if tokens[0] in stops:
            continue  # its first token comes with the prompt: no round has been run that counts
        # Its first round starts with a token of the target's that came with the prompt.
        [found] = generate(params, target_params, [prompt + tokens[:1]], config=decoding, max_new_tokens=NEW - 1,
                           batch_size=1)  # fmt: skip
        assert tokens[:1] + found.tokens == tokens
        rounds = len(found.accepted)
        assert found.accepted == accepted[:rounds]
        assert len(accepted) - rounds in (0, 1)  # when all is written it may run once more
        lengths += found.accepted
    assert {0, 1, K - 1} < set(lengths)


@pytest.mark.parametrize("name", SERVED)
def test_specforge_drafts_the_same_words_from_our_folder_and_we_from_its_own(name, target, tmp_path):
    config, params = drafter_config(name), trained(name)
    save_drafter(params, config, tmp_path / "ours", layout="specforge")
    theirs = peers.read_drafter(tmp_path / "ours")
    assert_they_write_the_same(params, config, theirs, target)
    theirs.save_pretrained(tmp_path / "theirs")
    found, its_config = load_drafter(tmp_path / "theirs")
    assert its_config == config and tiny.same_bits(found, params)
    assert_they_write_the_same(found, its_config, theirs, target)


def test_a_stop_token_ends_both_in_the_same_round(target, tmp_path):
    config, params = drafter_config("dflash"), trained("dflash")
    save_drafter(params, config, tmp_path / "drafter")
    new = np.concatenate([text[len(prompt) + 4 : 30] for text, prompt in zip(texts()[16:24], asked(), strict=True)])
    stop = int(np.bincount(new).argmax())
    assert_they_write_the_same(params, config, peers.read_drafter(tmp_path / "drafter"), target, stop)


# ---------------------------------------------------------------------------------------------
# Folders


@pytest.mark.parametrize("layout", ["zlab", "specforge"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@drafters
def test_a_second_export_has_the_same_bytes(name, dtype, layout, tmp_path):
    config = drafter_config(name)
    save_drafter(tiny.drafter_params(config), config, tmp_path / "first", layout=layout, dtype=dtype)
    params, read = load_drafter(tmp_path / "first")
    save_drafter(params, read, tmp_path / "second", layout=layout, dtype=dtype)
    first, second = ({path.name: path.read_bytes() for path in (tmp_path / x).iterdir()} for x in ("first", "second"))
    assert {"config.json", "model.safetensors"} == set(first) and first == second


def test_a_second_export_of_what_specforge_saved_has_the_same_bytes(tmp_path):
    config = drafter_config("domino, shifted")
    save_drafter(tiny.drafter_params(config), config, tmp_path / "ours", layout="specforge")
    peers.read_drafter(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    params, read = load_drafter(tmp_path / "theirs")
    save_drafter(params, read, tmp_path / "again", layout="specforge")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "ours" / name).read_bytes(), name


def speculators_blocks(monkeypatch, anchors):
    """speculators with these anchors in place of random ones; it has no blocks that overrun a row."""
    monkeypatch.setattr(core, "select_anchors", lambda *_: (
        torch.as_tensor(anchors).long(), torch.ones(len(anchors), dtype=torch.bool)))  # fmt: skip


def speculators_inputs(theirs, model, text):
    """Tapped features of a row, and its last hidden states before the target's final norm, which it has too."""
    seen = []
    handle = model.model.norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        states = model(text, output_hidden_states=True).hidden_states
    handle.remove()
    return torch.cat([states[i] for i in theirs.target_layer_ids], -1), seen[0]


@pytest.mark.parametrize("name", ["dflash", *(name for name in DRAFTERS if "dspark" in name)])
def test_speculators_reads_its_layout_and_computes_the_same_logits(name, pair, target, tmp_path, monkeypatch):
    params, config, _, _ = pair
    model, (target_params, _) = peers.read_target(target), load_target(target)
    save_drafter(params, config, tmp_path / "speculators", layout="speculators", verifier=str(target))
    theirs = peers.read_speculators(tmp_path / "speculators")
    assert theirs.mask_token_id == config.mask_token_id
    assert theirs.target_layer_ids == [i + 1 for i in config.target_layer_ids]  # as transformers numbers its outputs
    tokens, mask, ids = rows()
    _, logits = hidden_and_logits(params, target_head(target_params), our_batch(target_params, config, *rows()),
                                  ANCHORS, KEEP, config=config)  # fmt: skip
    for row in range(2):
        text = torch.as_tensor(tokens[row : row + 1]).long()
        anchors = ANCHORS[row][KEEP[row] & (ANCHORS[row] < S - K)]
        speculators_blocks(monkeypatch, anchors)
        features, last = speculators_inputs(theirs, model, text)
        with torch.no_grad():
            _, expected, *_ = theirs._backbone_forward(
                features, text, torch.as_tensor(mask[row : row + 1]), last, torch.zeros_like(text),
                max_anchors=len(anchors))  # fmt: skip
        assert len(anchors) >= 4
        found = logits[row][: len(anchors)]
        assert relative_error(found, expected.reshape(found.shape), floor=1.0) < TOLERANCE


@pytest.mark.parametrize("name", [name for name in DRAFTERS if "dspark" in name and "rnn, not" not in name])
def test_speculators_computes_the_same_loss_of_dspark_and_saves_what_we_read(name, pair, target, tmp_path, monkeypatch):
    """Of an rnn without shifted labels it reads the anchor's slot first, which none of our drafts comes from."""
    params, config, _, _ = pair
    model, (target_params, _) = peers.read_target(target), load_target(target)
    save_drafter(params, config, tmp_path / "ours", layout="speculators", verifier=str(target))
    theirs = peers.read_speculators(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    found, its_config = load_drafter(tmp_path / "theirs")
    assert (
        tiny.same_bits(found, params)
        and dataclasses.replace(its_config.head, confidence_head_alpha=1.0) == its_config.head
    )
    tokens, mask = rows()[0][:1], np.ones((1, S), bool)
    anchors = ANCHORS[:1][ANCHORS[:1] < S - K][None]
    loss_config = LossConfig(drafter=its_config, objective=Objective("decay", "tv", gamma=3.0))
    arguments = target_head(target_params), our_batch(target_params, config, tokens, mask, np.ones((1, S), np.int32))
    (_, (numerators, aux)), _ = loss_and_gradient(found, *arguments, anchors, anchors >= 0, 0.0, config=loss_config)
    text = torch.as_tensor(tokens).long()
    speculators_blocks(monkeypatch, anchors[0])
    features, last = speculators_inputs(theirs, model, text)
    with torch.no_grad():
        _, loss, _ = theirs(
            features, text, torch.as_tensor(mask), last, torch.zeros_like(text), max_anchors=anchors.size,
            loss_config={"tv": (tv_loss, 1.0)}, tv_loss_fn=tv_loss, gamma=3.0,
        )  # fmt: skip
    assert relative_error(sum(numerators.values()) / aux.final.valid, loss, floor=1.0) < TOLERANCE
