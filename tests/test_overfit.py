"""The gate before any long run: one text, learnt by heart, must decode at tau = K."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_families import config_of, params_of

from specauf_jax import architecture as a
from specauf_jax import config as c
from specauf_jax.decoding.generate import generate
from specauf_jax.decoding.state import Decoding
from specauf_jax.models.drafter import init_drafter
from specauf_jax.models.heads.dflash import DFlash
from specauf_jax.models.resolve import resolve_drafter
from specauf_jax.models.target import init_target, target_step
from specauf_jax.training.blocks import Batch
from specauf_jax.training.loss import LossConfig
from specauf_jax.training.step import init_state, make_optimizer, make_train_step

K, S, PROMPT, STEPS = 4, 48, 8, 200
TARGET = a.Target(
    vocab_size=32,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
)
MASK = 29  # a token that the text below happens not to hold


@pytest.mark.parametrize("objective", ["auf", "decay"])
def test_one_text_learnt_by_heart_decodes_at_tau_k(objective):
    assert learn_by_heart(DFlash(), objective) == 0


# Seeds of targets whose text does not repeat itself much.
SEEDS = {"qwen3_moe": 2, "qwen3_5": 15, "qwen3_5_moe": 17, "qwen3_next": 17, "gemma3": 4, "gpt_oss": 0}


@pytest.mark.long
@pytest.mark.parametrize("kind", SEEDS)
def test_every_kind_of_target_teaches_its_text(kind):
    """What training reads of a target is what decoding reads: experts, states, windows and sinks among it."""
    steps = 600 if kind == "gemma3" else STEPS  # it learns slowly
    config = config_of(kind, vocab_size=32, tie_word_embeddings=False)
    assert learn_by_heart(DFlash(), "auf", config, params_of(config, SEEDS[kind]), steps=steps) <= 1


def learn_by_heart(
    head, objective: str, config=TARGET, target=None, base=None, lambda_base=lambda step: 0.0, steps=STEPS
) -> int:
    """Train a drafter with this head on one text of a target; how many rounds too many it takes to draft it."""
    if target is None:
        target = jax.tree.map(lambda x: 8 * x if x.ndim > 1 else x, init_target(config, jax.random.key(3)))
    asked = a.Drafter(block_size=K, num_hidden_layers=1, mask_token_id=MASK)
    drafter = dataclasses.replace(resolve_drafter(asked, config), head=head)
    step = target_step(config, drafter.target_layer_ids)
    prompt = np.random.default_rng(0).integers(0, MASK, PROMPT).tolist()
    [own] = generate(None, target, [prompt], config=Decoding(target_step=step), max_new_tokens=S - PROMPT, batch_size=1)
    tokens = jnp.asarray([prompt + own.tokens], jnp.int32)
    assert len(set(own.tokens)) > 8 and MASK not in own.tokens  # a text, not one token over and over
    batch = Batch(
        tokens=tokens,
        loss_mask=jnp.arange(S)[None] >= PROMPT - 1,
        document_ids=jnp.ones_like(tokens),
        positions=jnp.arange(S, dtype=jnp.int32)[None],
    )
    settings = c.Optimisation(steps=steps, learning_rate=1e-2)
    optimizer = make_optimizer(settings)
    loss = LossConfig(drafter=drafter, objective=c.Objective(objective), base_objective=base, num_anchors=32)
    update = make_train_step(loss, config, optimizer, lambda_base=lambda_base)
    train = jax.jit(functools.partial(_train, update, steps))
    state = train(init_state(init_drafter(drafter, jax.random.key(0)), optimizer), target, batch)
    decoding = Decoding(target_step=step, drafter=drafter)
    [found] = generate(state.params, target, [prompt], config=decoding, max_new_tokens=S - PROMPT, batch_size=1)
    assert found.tokens == own.tokens
    return len(found.accepted) - (S - PROMPT) // K


def _train(step, steps, state, target, batch):
    return jax.lax.fori_loop(0, steps, lambda _, state: step(state, target, batch)[0], state)
