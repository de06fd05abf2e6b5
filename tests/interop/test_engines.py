"""Engines' own drafter code computes the hidden states that this project does from a folder that this project wrote."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import peers
import pytest
import test_drafters
import tiny
import torch
from engines import TpuInference, read_zlab, zlab_generate, zlab_hidden
from peers import relative_error
from test_drafters import NEW, asked, hidden_and_logits, trained

from specauf_jax.decoding.generate import generate
from specauf_jax.decoding.state import Decoding
from specauf_jax.evaluation.doctor.engines import unserved_heads
from specauf_jax.models.target import TargetStep, target_features, target_head
from specauf_jax.models.weights import load_target, save_drafter, save_target
from specauf_jax.parts import RopeScaling
from specauf_jax.training.blocks import Batch

TOLERANCE = 1e-5  # of max(1, largest value)
K, V, S = 8, 61, 48
ANCHORS = np.array([[1, 39], [12, 25]], np.int32)
TARGET = tiny.target_config(vocab_size=V, hidden_size=256, intermediate_size=96, num_hidden_layers=6, head_dim=128,
                            num_attention_heads=2, num_key_value_heads=1, rope_theta=1e6)  # fmt: skip
DRAFTER = {"block_size": K, "mask_token_id": V - 1, "target_layer_ids": (1, 2, 4), "num_hidden_layers": 3}
RIGHT_ROPE = {"rope_theta": 1e6, "rope_scaling": None}
LLAMA_3 = RopeScaling("llama3", 8.0, 8192, low_freq_factor=1.0, high_freq_factor=4.0)


class World:
    """A target and a drafter in folders, and what this project computes of a few blocks."""

    def __init__(self, folder, target=TARGET, **changes):
        self.target, self.drafter = target, tiny.drafter_config(target, **DRAFTER | changes)
        self.params, self.target_params = tiny.drafter_params(self.drafter), tiny.target_params(target)
        # Embeddings so small that the context makes slots of the same token differ.
        self.target_params["embed_tokens"]["embedding"] *= 0.02
        self.target_params["lm_head"]["kernel"] = jax.random.normal(jax.random.key(2), (target.hidden_size, V))
        self.folders = folder / "drafter", folder / "target"
        save_drafter(self.params, self.drafter, self.folders[0])
        save_target(self.target_params, target, self.folders[1])
        tokens = np.random.default_rng(0).integers(1, V - 1, (2, S)).astype(np.int32)
        positions = np.broadcast_to(np.arange(S, dtype=np.int32), tokens.shape)
        ids = np.ones_like(tokens)
        self.features = target_features(self.target_params, tokens, positions, ids, config=target,
                                        layer_ids=self.drafter.target_layer_ids)  # fmt: skip
        self.batch = Batch(tokens=jnp.asarray(tokens), loss_mask=jnp.asarray(ids > 0), document_ids=jnp.asarray(ids),
                           positions=jnp.asarray(positions), features=self.features)  # fmt: skip
        self.blocks = [(row, anchor) for row, anchors in enumerate(ANCHORS) for anchor in anchors]
        self.contexts = [self.features[row, :anchor] for row, anchor in self.blocks]
        self.anchors = [tokens[row, anchor] for row, anchor in self.blocks]
        self.head = target_head(self.target_params)

    def hidden(self, **changes):
        """Ours, `[n, K, D]`."""
        config = dataclasses.replace(self.drafter, **changes)
        found, _ = hidden_and_logits(self.params, self.head, self.batch, ANCHORS, np.ones_like(ANCHORS, bool),
                                     config=config)  # fmt: skip
        return found.reshape(len(self.blocks), K, -1)

    def drafts(self, hidden):
        return np.asarray(jnp.asarray(hidden) @ self.head.lm_head).argmax(-1)[:, 1:]

    def assert_same(self, found, expected):
        assert relative_error(found, expected, floor=1.0) < TOLERANCE
        np.testing.assert_array_equal(self.drafts(found), self.drafts(expected))
        assert len(set(self.drafts(expected).ravel())) > 2

    def tpu_inference(self, overrides=None):
        """tpu-inference's hidden states `[n, K, D]`."""
        return TpuInference(*self.folders, overrides).hidden(self.head.embedding, self.contexts, self.anchors)


@pytest.mark.parametrize("theta", [1e6, 5e5])
def test_tpu_inference_computes_the_same_hidden_states(theta, tmp_path):
    """Where its config says the target's RoPE, which takes an override (see below)."""
    world = World(tmp_path, dataclasses.replace(TARGET, rope_theta=theta))
    world.assert_same(world.tpu_inference(RIGHT_ROPE | {"rope_theta": theta}), world.hidden())


def test_tpu_inference_as_it_is_takes_another_rope(tmp_path):
    """theta 1e6 and Llama 3's scaling, whatever the target's: what the doctor says of it."""
    world = World(tmp_path, dataclasses.replace(TARGET, rope_theta=1e4))
    found = world.tpu_inference()
    world.assert_same(found, world.hidden(rope_theta=1e6, rope_scaling=LLAMA_3))
    assert relative_error(found, world.hidden(), floor=1.0) > 0.01


@pytest.mark.parametrize(("target_size", "heads"), [
    (128, (256, 2, 2, 128)), (64, (256, 2, 1, 128)), (128, (320, 4, 2, 128)), (64, (288, 3, 1, 128)),
    (128, (256, 4, 2, 128)), (64, (256, 4, 2, 64)), (32, (256, 2, 1, 128)), (128, (256, 2, 1, 256)),
], ids=str)  # fmt: skip
def test_tpu_inference_runs_the_heads_that_the_doctor_says(target_size, heads, tmp_path):
    hidden, H, G, E = heads
    target = dataclasses.replace(TARGET, hidden_size=hidden, head_dim=target_size)
    world = World(tmp_path, target, num_attention_heads=H, num_key_value_heads=G, head_dim=E)
    if unserved_heads(world.drafter, target):
        # Its own words: of the cache's shape, of its kernel for heads of 64, of weights that do not fit a norm.
        refusal = r"Expected kv_cache\.shape|not supported on the head_dim==64|cannot reshape array of shape \(\d+,\)"
        with pytest.raises((ValueError, NotImplementedError, TypeError), match=refusal):
            world.tpu_inference(RIGHT_ROPE)
    else:
        world.assert_same(world.tpu_inference(RIGHT_ROPE), world.hidden())


@pytest.mark.parametrize("changes", [
    {}, {"layer_types": ("sliding_attention", "full_attention", "sliding_attention"), "sliding_window": 11},
], ids=["full", "windows"])  # fmt: skip
def test_zlab_computes_the_same_hidden_states(changes, tmp_path):
    world = World(tmp_path, **changes)
    model, seen = read_zlab(world.folders[0])
    peers.assert_complete(seen)
    found = torch.stack([zlab_hidden(model.eval(), world.head.embedding, context, anchor)
                         for context, anchor in zip(world.contexts, world.anchors, strict=True)])  # fmt: skip
    world.assert_same(found, world.hidden())


def test_zlab_writes_the_same_words_with_the_same_drafts(tmp_path):
    config, params = test_drafters.drafter_config("dflash"), trained("dflash")
    save_drafter(params, config, tmp_path / "drafter")
    save_target(test_drafters.target_parameters(), test_drafters.TARGET, tmp_path / "target")
    theirs, target = read_zlab(tmp_path / "drafter")[0].eval(), peers.read_target(tmp_path / "target")
    target_params, _ = load_target(tmp_path / "target")
    decoding = Decoding(TargetStep(test_drafters.TARGET, config.target_layer_ids), config)
    ours = functools.partial(generate, params, target_params, config=decoding, max_new_tokens=NEW - 1, batch_size=1)
    lengths = []
    for prompt in asked():
        their = zlab_generate(theirs, target, torch.tensor([prompt]), NEW, None)
        tokens = their.output_ids[0, len(prompt) :].tolist()
        [found] = ours([prompt + tokens[:1]])  # its first token comes with the prompt
        assert tokens[:1] + found.tokens == tokens
        *accepted, last = (n - 1 for n in their.acceptance_lengths)  # it cuts its last round at the length asked for
        assert found.accepted[:-1] == accepted and found.accepted[-1] >= last
        lengths += found.accepted
    assert {0, 1, K - 1} < set(lengths)
