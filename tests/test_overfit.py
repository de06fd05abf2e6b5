"""The gate before any long run: one text, learnt by heart, must decode at tau = K."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specauf_jax import architecture as a
from specauf_jax import config as c
from specauf_jax.decoding.generate import generate
from specauf_jax.decoding.state import Decoding
from specauf_jax.models.drafter import init_drafter
from specauf_jax.models.resolve import resolve_drafter
from specauf_jax.models.target import TargetStep, init_target
from specauf_jax.training.blocks import Batch
from specauf_jax.training.loss import LossConfig
from specauf_jax.training.step import init_state, make_optimizer, make_train_step

K, S, PROMPT = 4, 48, 8
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
DRAFTER = resolve_drafter(a.Drafter(block_size=K, num_hidden_layers=1, mask_token_id=MASK), TARGET)
BASE: c.Objective | None = None


@pytest.mark.parametrize("objective", ["auf", "decay"])
def test_one_text_learnt_by_heart_decodes_at_tau_k(objective):
    target = jax.tree.map(lambda x: 8 * x if x.ndim > 1 else x, init_target(TARGET, jax.random.key(3)))
    step = TargetStep(TARGET, DRAFTER.target_layer_ids)
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
    settings = c.Optimisation(steps=200, learning_rate=1e-2)
    optimizer = make_optimizer(settings)
    config = LossConfig(drafter=DRAFTER, objective=c.Objective(objective), base_objective=BASE, num_anchors=32)
    train = jax.jit(functools.partial(_train, make_train_step(config, TARGET, optimizer), settings.steps))
    state = train(init_state(init_drafter(DRAFTER, jax.random.key(0)), optimizer), target, batch)
    decoding = Decoding(target_step=step, drafter=DRAFTER)
    [found] = generate(state.params, target, [prompt], config=decoding, max_new_tokens=S - PROMPT, batch_size=1)
    assert found.tokens == own.tokens
    assert found.accepted == [K - 1] * ((S - PROMPT) // K)


def _train(step, steps, state, target, batch):
    return jax.lax.fori_loop(0, steps, lambda _, state: step(state, target, batch)[0], state)
