"""Losses: speculators' eager ones give the same numbers and gradients."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from speculators.losses import utils

from specauf_jax.config import Objective
from specauf_jax.objectives import label_scores, objective_sums

K, A, V = 5, 6, 40
THEIRS = {"ce": "ce", "kl": "kl_div", "tv": "tv", "nla": "nla", "lk": "lk_hybrid"}
MIXES = {"ce=0.1,tv=0.9": '{"ce": 0.1, "tv": 0.9}', **{ours: theirs for ours, theirs in THEIRS.items()}}


def blocks():
    """Logits of drafter and target, and valid slots: `[A, K, V]`, `[A, K]`; slot 0 is the anchor's."""
    rng = np.random.default_rng(0)
    y = 3 * rng.normal(size=(A, K, V)).astype(np.float32)
    z = y + rng.normal(size=y.shape).astype(np.float32) * rng.choice([0.2, 2.0], size=(A, K, 1)).astype(np.float32)
    valid = rng.random((A, K)) < 0.8
    valid[:, 0] = False
    return z, y, valid


@pytest.mark.parametrize("loss,support", [*itertools.product(MIXES, ("full", "decay")), ("ce", "dpace")])
def test_speculators_losses(loss, support):
    """Theirs are divided by the number of slots; their D-PACE reads its confidences from the loss, so from ce alone."""
    z, y, valid = blocks()
    decay = {
        "full": None,
        "decay": functools.partial(utils.dflash_loss_decay, gamma=3.0),
        "dpace": functools.partial(
            utils.dpace_loss_decay, loss_mask=torch.tensor(valid), block_size=K, dpace_alpha=0.5
        ),
    }[support]
    logits = torch.tensor(z.reshape(1, A * K, V), requires_grad=True)
    total, _ = utils.compound_loss(
        logits, torch.tensor(y.reshape(1, A * K, V)), torch.tensor(valid.reshape(1, A * K)),
        torch.arange(K).repeat(A)[None], utils.resolve_loss_config(MIXES[loss], "eager"), decay,
    )  # fmt: skip
    total.backward()
    objective = Objective(support, loss, **({"gamma": 3.0} if support == "decay" else {}))
    labels = jnp.argmax(y[:, 1:], axis=-1)

    def ours(z):
        scores = label_scores(z[:, 1:], labels, y[:, 1:], objective)
        return objective_sums(objective, scores, jnp.asarray(valid[:, 1:]), block_size=K).numerator / valid.sum()

    value, gradient = jax.value_and_grad(ours)(jnp.asarray(z))
    assert abs(float(value) - float(total)) < 2e-5 * max(1, abs(float(total)))
    np.testing.assert_allclose(gradient, logits.grad.numpy().reshape(A, K, V), atol=2e-5)
