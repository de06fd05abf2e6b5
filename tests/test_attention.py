from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from specauf_jax.config import Objective
from specauf_jax.kernels import attention, block_attention_xla
from specauf_jax.kernels.attention import cached_attention
from specauf_jax.kernels.chunks import map_chunks
from specauf_jax.kernels.lm_head import chunked_scores, project
from specauf_jax.models.target import target_features, target_head
from specauf_jax.objectives import label_scores
from specauf_jax.training.loss import LossConfig, loss_fn

CHUNKS = (1, 3, 5, 100)  # of a length of 7: the last chunk is whole, or filled up by 2 or 3


# ---------------------------------------------------------------------------------------------
# Plain-loop attention


def one_query(q, keys, values):
    """Softmax attention of one head's query over lists of keys and values, in float64; 0 without keys."""
    if not keys:
        return np.zeros(len(q))
    scores = [float(np.dot(q.astype(np.float64), key)) / len(q) ** 0.5 for key in keys]
    powers = [np.exp(score - max(scores)) for score in scores]
    return sum(p * value.astype(np.float64) for p, value in zip(powers, values, strict=True)) / sum(powers)


def ranges(B=2, T=7, S=9, H=4, G=2, E=6, N=3):
    """q, cache_k, cache_v, start, stop; among the ranges are empty ones and a whole row."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=shape).astype(np.float32) for shape in ((B, T, H, E), *[(N, B, G, S, E)] * 2))
    start, stop = np.sort(rng.integers(0, S + 1, (2, B, T)), axis=0)
    start[0, :3], stop[0, :3] = (0, 4, 7), (S, 4, 3)
    return q, k, v, start, stop


@pytest.mark.parametrize("tile", [2, 4, 9, 100])  # the last tile overlaps the one before, or not; one tile
@pytest.mark.parametrize("with_own", [False, True])
def test_cached_attention_equals_plain_loops_with_grouped_heads(tile, with_own, monkeypatch):
    monkeypatch.setattr(attention, "TILE_ON_CPU", tile)
    q, k, v, start, stop = ranges()
    (B, T, H, E), G, layer = q.shape, k.shape[2], 1
    rng = np.random.default_rng(1)
    own_k, own_v = rng.normal(size=(2, B, T, G, E)).astype(np.float32)
    sees = rng.integers(0, 2, (B, T, T)).astype(bool)
    sees[0, 1] = False
    mixed = jax.jit(cached_attention)(q, k, v, layer, start, stop, (own_k, own_v, sees) if with_own else None)
    for b, t, h in np.ndindex(B, T, H):
        g, seen, beside = h // (H // G), range(start[b, t], stop[b, t]), np.flatnonzero(sees[b, t] & with_own)
        keys = [k[layer, b, g, j] for j in seen] + [own_k[b, j, g] for j in beside]
        values = [v[layer, b, g, j] for j in seen] + [own_v[b, j, g] for j in beside]
        np.testing.assert_allclose(mixed[b, t, h], one_query(q[b, t, h], keys, values), atol=1e-6)
    assert not mixed[0, 1].any()  # an empty range


def test_a_cache_is_read_up_to_its_longest_row_only():
    """What lies behind may be anything: not even its tiles are touched."""
    q, k, v, start, stop = ranges(S=600)
    stop = np.minimum(stop, attention.TILE_ON_CPU + 1)
    k, v = k.copy(), v.copy()
    k[..., 2 * attention.TILE_ON_CPU :, :] = v[..., 2 * attention.TILE_ON_CPU :, :] = np.nan
    assert np.isfinite(cached_attention(q, k, v, 2, start, stop)).all()


def test_large_scores_stay_finite():
    q, k, v, start, stop = ranges()
    assert np.isfinite(cached_attention(q * 1e4, k, v, 0, start, stop)).all()


@pytest.mark.parametrize("layers", [1, 3])
def test_entries_stand_at_their_rows_own_positions(layers):
    """By a scatter, and row by row as on TPUs."""
    N, B, G, S, E, T, layer = 3, 4, 2, 9, 6, 3, 3 - layers
    rng = np.random.default_rng(0)
    cache, new = rng.normal(size=(N, B, G, S, E)), rng.normal(size=(layers, B, T, G, E))
    cache, new, first = cache.astype(np.float32), new.astype(np.float32), np.array([0, 6, 2, 3])
    expected = cache.copy()
    for n, b, t in np.ndindex(layers, B, T):
        expected[layer + n, b, :, first[b] + t] = new[n, b, t]
    run = jax.jit(lambda *x: attention.write_entries(*x))
    np.testing.assert_array_equal(run(cache, new, first, layer), expected)
    with mock.patch.object(jax.lax, "platform_dependent", lambda *x, tpu, default: tpu(*x)):
        row_by_row = jax.jit(lambda *x: attention.write_entries(*x))(cache, new, first, layer)
    np.testing.assert_array_equal(row_by_row, expected)


# ---------------------------------------------------------------------------------------------
# Chunks


def grads_and_value(f, *arrays):
    """Gradients of a random projection of f's (first) result, and all results."""

    def projected(*arrays):
        result = f(*arrays)
        first = jax.tree.leaves(result)[0]
        return (first * np.random.default_rng(2).normal(size=first.shape)).sum(), result

    return jax.jit(jax.grad(projected, argnums=tuple(range(len(arrays))), has_aux=True))(*arrays)


def in_chunks(hidden, lm_head, labels, chunk):
    def scores(labels, hidden):
        return label_scores(project(hidden, lm_head), labels)

    return chunked_scores(scores, (labels, hidden), chunk=chunk)


def test_label_scores_in_chunks_equals_all_logits_at_once():
    rng = np.random.default_rng(3)
    hidden, lm_head = rng.normal(size=(2, 7, 3, 6)).astype(np.float32), rng.normal(size=(6, 11)).astype(np.float32)
    labels = rng.integers(0, 11, (2, 7, 3), dtype=np.int32)

    def run(chunk):
        return grads_and_value(lambda h, w: in_chunks(h, w, labels, chunk), hidden, lm_head)

    whole = grads_and_value(lambda h, w: label_scores(h @ w, labels), hidden, lm_head)
    for chunk in CHUNKS:
        grads, scores = run(chunk)
        assert tiny.largest_difference((grads, scores), whole) < 1e-6
        np.testing.assert_array_equal(scores.rank == 0, (hidden @ lm_head).argmax(-1) == labels)


def test_logits_of_bfloat16_models_are_float32():
    """Rounded to bfloat16, several tokens would tie for the best."""
    rng = np.random.default_rng(4)
    hidden = jnp.asarray(rng.normal(size=(4, 8, 16)), jnp.bfloat16)
    lm_head = jnp.asarray(rng.normal(size=(16, 60)), jnp.bfloat16)
    exact = np.asarray(hidden, np.float64) @ np.asarray(lm_head, np.float64)
    labels = exact.argsort(-1)[..., -2].astype(np.int32)
    ce, rank = in_chunks(hidden, lm_head, labels, 3)
    chosen = np.take_along_axis(exact, labels[..., None], -1)[..., 0]
    np.testing.assert_array_equal(rank, np.ones_like(labels))
    np.testing.assert_allclose(ce, np.log(np.exp(exact).sum(-1)) - chosen, atol=1e-5)


@pytest.mark.parametrize("size", [1, 3, 7, 8])
def test_map_chunks_hands_out_at_most_size_entries_and_joins_any_tree(size):
    x, y = np.arange(2 * 7 * 3.0).reshape(2, 7, 3), np.arange(14).reshape(2, 7)
    seen = set()

    def f(x, y):
        seen.add(x.shape[1])
        return {"sum": x.sum(-1) + y, "pair": (x * 2, y % 2 == 0)}

    result = map_chunks(f, size, x, y)
    assert seen == {min(size, 7)}
    assert tiny.same_bits(result, {"sum": x.sum(-1) + y, "pair": (x * 2, y % 2 == 0)})


# ---------------------------------------------------------------------------------------------
# Memory


def largest_intermediate(jaxpr) -> int:
    """Elements of the largest array that any equation makes, in nested jaxprs too."""
    largest = 0
    for equation in jaxpr.eqns:
        largest = max(
            [largest, *(variable.aval.size for variable in equation.outvars if hasattr(variable.aval, "size"))]
        )
        for value in jax.tree.leaves(equation.params):
            inner = getattr(value, "jaxpr", value)  # closed or open
            if hasattr(inner, "eqns"):
                largest = max(largest, largest_intermediate(inner))
    return largest


def test_no_array_holds_the_logits_or_scores_of_all_blocks(monkeypatch):
    """Neither the forward nor the backward pass; with all blocks in one chunk both do exist."""
    A, K, S, V = 32, 4, 64, 211
    target = tiny.target_config(vocab_size=V)
    drafter = tiny.drafter_config(target)
    batch = tiny.random_batch([[30, 34]], length=S)
    batch = batch.replace(features=jnp.ones((1, S, 2 * target.hidden_size)))
    arguments = tiny.drafter_params(drafter), target_head(tiny.target_params(target)), batch, jax.random.key(0)

    def largest(chunk):
        monkeypatch.setattr(block_attention_xla, "TILE_SLOTS", chunk * K)
        config = LossConfig(drafter=drafter, objective=Objective(), num_anchors=A, slot_chunk=chunk * (K - 1))
        gradient = jax.make_jaxpr(lambda *x: jax.grad(loss_fn, has_aux=True)(*x, config=config))(*arguments)
        return largest_intermediate(gradient.jaxpr)

    all_logits, all_scores = A * (K - 1) * V, target.num_attention_heads * A * K * S
    assert largest(chunk=2) < min(all_logits, all_scores) / 2
    assert largest(chunk=A) >= max(all_logits, all_scores)


def test_no_array_holds_the_scores_of_all_queries_of_a_row(monkeypatch):
    monkeypatch.setattr(block_attention_xla, "TILE_SLOTS", 8)
    target, S = tiny.target_config(), 96
    batch = tiny.random_batch([[S]], length=S)
    jaxpr = jax.make_jaxpr(
        lambda params: target_features(
            params, batch.tokens, batch.positions, batch.document_ids, config=target, layer_ids=(0, 1)
        )
    )(tiny.target_params(target))
    assert largest_intermediate(jaxpr.jaxpr) < target.num_attention_heads * S * S / 2
