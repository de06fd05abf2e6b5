"""The frozen LM head: every slot, or each block's slots up to its first failure, against all logits at once."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from specauf_jax.config import Mesh, Objective
from specauf_jax.kernels import lm_head as kernel
from specauf_jax.kernels.lm_head import chunked_scores, frozen_head_scores, project
from specauf_jax.objectives import accept_until_fail_mask, label_scores, objective_sums
from specauf_jax.sharding import batch_sharding, make_mesh, replicated

B, A, N, D, V = 8, 6, 5, 12, 24
TOP_2 = Objective("griffin", griffin_top_n=2)


def blocks(success: float, seed: int = 0, scale: float = 1.0):
    """Slots whose label is the best token with a given probability, else the second best; some are not valid."""
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(B, A, N, D)).astype(np.float32) * scale
    lm_head = rng.normal(size=(D, V)).astype(np.float32)
    order = (hidden @ lm_head).argsort(-1)
    labels = np.where(rng.random((B, A, N)) < success, order[..., -1], order[..., -2]).astype(np.int32)
    return hidden, lm_head, labels, rng.random((B, A, N)) < 0.9


@functools.partial(jax.jit, static_argnames=("objective", "chunk"))
def loss_and_gradient(hidden, lm_head, labels, valid, *, objective, chunk=None):
    """Of an objective; through the kernel, or without a chunk through all logits at once."""

    def loss(hidden):
        if chunk is None:
            seen = label_scores(hidden @ lm_head, labels)
        else:
            seen = frozen_head_scores(hidden, lm_head, labels, valid, chunk=chunk, objective=objective)
        sums = objective_sums(objective, seen, valid, block_size=N + 1)
        return 0.3 * sums.numerator, (sums, seen)

    return jax.value_and_grad(loss, has_aux=True)(hidden)


@pytest.mark.parametrize("name,chunk", [("auf", 1), ("auf", 7), ("auf_decay", 48), ("griffin", 1000)])
def test_slots_up_to_the_first_failure_give_the_dense_loss_and_gradient(name, chunk):
    objective = Objective(name)
    for success in (0.0, 0.7, 1.0):
        arrays = blocks(success)
        (loss, (sums, seen)), grads = loss_and_gradient(*arrays, objective=objective, chunk=chunk)
        (dense, (its_sums, its_seen)), its_grads = loss_and_gradient(*arrays, objective=objective)
        assert tiny.largest_difference((loss, sums, grads), (dense, its_sums, its_grads)) < 1e-5
        weighed = np.asarray(sums.weights) > 0
        np.testing.assert_array_equal(np.asarray(seen[1])[weighed], np.asarray(its_seen[1])[weighed])
        assert not np.asarray(grads)[~weighed].any() and np.asarray(grads)[weighed].any(-1).all()


@pytest.mark.parametrize("chunk,slots", [(8, 8), (16, 16), (3, 8), (10**6, 8 * A * N)])
def test_a_chunk_is_of_the_device_not_of_every_row(chunk, slots):
    """The largest array of logits, of all 8 rows together; a row needs one slot at least."""
    hidden, lm_head, labels, valid = blocks(0.7)
    for score in (
        lambda x: frozen_head_scores(x, lm_head, labels, valid, chunk=chunk)[0].sum(),
        lambda x: chunked_scores(
            lambda labels, x: label_scores(project(x, lm_head), labels), (labels, x), chunk=chunk
        ).cross_entropy.sum(),
    ):
        text = str(jax.make_jaxpr(jax.grad(score))(hidden))
        sizes = [math.prod(map(int, found.split(","))) for found in re.findall(r"f32\[([\d,]+),24\]", text)]
        assert max(size for size in sizes if size != D) == slots


@pytest.mark.parametrize("name,chunk", [("full", 1), ("decay", 4), ("dpace", 1000)])
def test_all_slots_give_the_dense_loss_and_gradient(name, chunk):
    arrays, objective = blocks(0.5), Objective(name)
    (loss, (sums, seen)), grads = loss_and_gradient(*arrays, objective=objective, chunk=chunk)
    (dense, (its_sums, its_seen)), its_grads = loss_and_gradient(*arrays, objective=objective)
    assert tiny.largest_difference((loss, sums, grads), (dense, its_sums, its_grads)) < 1e-5
    np.testing.assert_array_equal(seen[1], its_seen[1])


def test_slots_behind_the_first_failure_are_not_looked_at():
    hidden, lm_head, labels, valid = blocks(0.7)
    correct = (hidden @ lm_head).argmax(-1) == labels
    support = np.asarray(accept_until_fail_mask(correct, valid))
    behind = np.cumprod(np.concatenate([np.ones_like(correct[..., :1]), correct & valid], -1)[..., :-1], -1) == 0
    poisoned = np.where(behind[..., None], np.nan, hidden)
    ce, rank = frozen_head_scores(poisoned, lm_head, labels, valid, chunk=7, objective=Objective("auf"))
    assert not np.asarray(ce)[behind].any() and (np.asarray(rank)[behind] > V).all()
    np.testing.assert_array_equal((np.asarray(ce) > 0) & valid, support)
    assert behind.sum() > 20


def rounds(monkeypatch, chunk: int, blocks) -> int:
    """How often the walk goes to the LM head."""
    count = []
    slots = kernel._slots

    def counted(*arguments, **options):
        jax.debug.callback(lambda: count.append(1))
        return slots(*arguments, **options)

    monkeypatch.setattr(kernel, "_slots", counted)
    jax.block_until_ready(frozen_head_scores(*blocks, chunk=chunk, objective=Objective("auf")))
    jax.effects_barrier()
    return len(count)


def test_work_follows_the_slots_that_are_needed(monkeypatch):
    """Exactly full rounds while more blocks live than a chunk holds; then a few, each of several slots a block."""
    everything = B * A * N
    needed = {success: int(visited(blocks(success)).sum()) for success in (0.0, 0.7, 1.0)}
    assert rounds(monkeypatch, 8, blocks(0.0)) <= math.ceil(B * A / 8)  # one slot of every block with a first label
    for success in (0.7, 1.0):
        found = rounds(monkeypatch, 8, blocks(success))
        assert needed[success] / 8 <= found <= needed[success] / 8 + N
    assert needed[0.7] < 0.7 * everything


def visited(arrays) -> np.ndarray:
    hidden, lm_head, labels, valid = arrays
    success = ((hidden @ lm_head).argmax(-1) == labels) & valid
    return np.cumprod(np.concatenate([valid[..., :1], success[..., :-1]], -1), -1) > 0


def test_no_block_to_train():
    hidden, lm_head, labels, valid = blocks(0.5)
    (loss, _), grads = loss_and_gradient(
        hidden, lm_head, labels, np.zeros_like(valid), objective=Objective("auf"), chunk=4
    )
    assert loss == 0 and not np.asarray(grads).any()


def print_differences():
    """Of a process with 8 devices: by how much each mesh differs from one device."""
    for name in ("auf", "decay"):
        run = functools.partial(loss_and_gradient, objective=Objective(name), chunk=4)
        expected = run(*blocks(0.7))
        for axes in ((2, 4, 1), (1, 2, 4), (1, 1, 8), (2, 2, 2)):
            mesh = make_mesh(Mesh(*axes))
            hidden, lm_head, labels, valid = blocks(0.7)
            spread = [jax.device_put(x, batch_sharding(mesh)) for x in (hidden, labels, valid)]
            found = jax.jit(run)(spread[0], jax.device_put(lm_head, replicated(mesh)), *spread[1:])
            print(tiny.largest_difference(found, expected))


def test_a_mesh_gives_what_one_device_gives():
    """Rows over replica and fsdp, the vocabulary over tensor."""
    said = tiny.on_eight_devices("import test_lm_head; test_lm_head.print_differences()")
    differences = [float(line) for line in said.split()]
    assert len(differences) == 8 and max(differences) < 1e-5


def test_bfloat16_ranks_by_float32_logits():
    hidden, lm_head, _, valid = blocks(0.5)
    hidden, lm_head = jnp.asarray(hidden, jnp.bfloat16), jnp.asarray(lm_head, jnp.bfloat16)
    exact = np.asarray(hidden, np.float64) @ np.asarray(lm_head, np.float64)
    labels = exact.argsort(-1)[..., -2].astype(np.int32)
    _, rank = frozen_head_scores(hidden, lm_head, labels, valid, chunk=4)
    assert (np.asarray(rank) == 1).all()
    grads = jax.grad(
        lambda h: frozen_head_scores(h, lm_head, labels, valid, chunk=4, objective=TOP_2)[0].sum(),
    )(hidden)
    assert grads.dtype == jnp.bfloat16
