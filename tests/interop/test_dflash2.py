"""DFlash2: speculators and z-lab's own code compute the same numbers from the same files, and draft the same words."""

import time

import jax
import numpy as np
import peers
import pytest
import test_drafters as drafters
import tiny
import torch
from dflash import model as zlab
from peers import relative_error
from speculators.losses.eager import tv_loss

from specauf_jax.config import Objective
from specauf_jax.decoding.generate import generate
from specauf_jax.decoding.state import Decoding
from specauf_jax.models.target import TargetStep, target_head
from specauf_jax.models.weights import load_drafter, load_target, save_drafter
from specauf_jax.training.loss import LossConfig

K, TARGET, TOLERANCE, PROMPT = drafters.K, drafters.TARGET, drafters.TOLERANCE, drafters.PROMPT
FORMS = {"unshifted": {}, "shifted": {"shift_label": True, "conv_kernel_size": 3}}
target = drafters.target


def random_drafter(name="unshifted", **changes):
    config = tiny.dflash2_config(TARGET, **drafters.COMMON | FORMS[name] | changes)
    return tiny.drafter_params(config), config


def blocks():
    """Texts of the target's own, so that its best token is the label everywhere; anchors behind the prompt."""
    tokens = drafters.texts()[:1]
    anchors = np.array([[PROMPT, 9, 14, 20, 30]], np.int32)
    return tokens, np.ones(tokens.shape, bool), np.ones(tokens.shape, np.int32), anchors


@pytest.mark.parametrize("name", FORMS)
def test_speculators_computes_the_same_losses_and_gradients_and_saves_what_we_read(name, target, tmp_path, monkeypatch):
    """Total variation of the body's logits, cross-entropy among candidates, both counted by position."""
    params, config = random_drafter(name)
    model, (target_params, _) = peers.read_target(target), load_target(target)
    save_drafter(params, config, tmp_path / "ours", layout="speculators", verifier=str(target))
    theirs = peers.read_speculators(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    found, its_config = load_drafter(tmp_path / "theirs")
    assert tiny.same_bits(found, params) and its_config.head == config.head
    tokens, mask, ids, anchors = blocks()
    loss_config = LossConfig(drafter=its_config, objective=Objective("decay", gamma=3.0),
                             base_objective=Objective("decay", "tv", gamma=3.0))  # fmt: skip
    arguments = target_head(target_params), drafters.our_batch(target_params, config, tokens, mask, ids)
    (_, (numerators, aux)), _ = drafters.loss_and_gradient(
        found, *arguments, anchors, anchors >= 0, 0.0, config=loss_config
    )

    def whole(params):
        numerators, aux = drafters.loss_sums(params, *arguments, anchors, anchors >= 0, config=loss_config)
        return sum(numerators.values()) / aux.final.valid

    gradients = jax.jit(jax.grad(whole))(found)
    text = torch.as_tensor(tokens).long()
    drafters.speculators_blocks(monkeypatch, anchors[0])
    features, last = drafters.speculators_inputs(theirs, model, text)
    _, loss, measures = theirs(
        features, text, torch.as_tensor(mask), last, torch.zeros_like(text), max_anchors=anchors.size,
        loss_config={"tv": (tv_loss, 1.0)}, tv_loss_fn=tv_loss, gamma=3.0,
    )  # fmt: skip
    loss.backward()
    count = aux.final.valid
    assert relative_error(numerators["base"] / count, measures["unary_loss_sum"], floor=1.0) < TOLERANCE
    assert relative_error(numerators["final"] / count, measures["selector_loss_sum"], floor=1.0) < TOLERANCE
    assert abs(numerators["final"] - numerators["base"]) > 1
    expected = {name: x.grad for name, x in theirs.named_parameters() if x.grad is not None}
    flat = drafters.flatten(gradients, np.float32)
    assert expected.keys() == flat.keys()
    for name, gradient in expected.items():
        assert relative_error(flat[name], gradient) < TOLERANCE, name


def test_zlab_drafts_the_same_words_from_our_folder_and_we_from_its_own(target, tmp_path, monkeypatch):
    monkeypatch.setattr(zlab, "_cuda_time", time.perf_counter)
    _, config = random_drafter()
    monkeypatch.setattr(drafters, "drafter_config", lambda name: config)
    params = drafters.trained.__wrapped__("dflash2")
    save_drafter(params, config, tmp_path / "ours")
    theirs, seen = zlab.DFlash2DraftModel.from_pretrained(
        tmp_path / "ours", dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True
    )
    peers.assert_complete(seen)
    model, (target_params, _) = peers.read_target(target), load_target(target)
    decoding, rounds = Decoding(TargetStep(TARGET, config.target_layer_ids), config), []
    for prompt in drafters.asked():
        stats = zlab.dflash_generate(
            theirs.eval(), model, torch.tensor([prompt]), drafters.NEW, None, return_stats=True
        )
        tokens = stats.output_ids[0, len(prompt) :].tolist()
        [found] = generate(params, target_params, [prompt + tokens[:1]], config=decoding,
                           max_new_tokens=drafters.NEW - 1, batch_size=1)  # fmt: skip
        assert tokens == tokens[:1] + found.tokens
        # Where fewer than K tokens are due its blocks are shorter, and ours are not.
        whole = int((np.cumsum(stats.acceptance_lengths) < drafters.NEW - K).sum())
        assert [n - 1 for n in stats.acceptance_lengths][:whole] == found.accepted[:whole]
        rounds += found.accepted
    assert {0, 1, K - 1} < set(rounds)
    theirs.save_pretrained(tmp_path / "theirs")
    values = (tmp_path / "theirs" / "config.json").read_text()
    assert "selector_top_k" in values
