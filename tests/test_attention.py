import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from specauf_jax.config import Objective
from specauf_jax.kernels import attention
from specauf_jax.kernels.attention import NO_WINDOW, attend, block_attend
from specauf_jax.kernels.chunks import map_chunks
from specauf_jax.kernels.lm_head import lm_head_cross_entropy
from specauf_jax.models.drafter import context_keys_values, draft_blocks
from specauf_jax.models.target import target_features, target_head
from specauf_jax.objectives import cross_entropy_and_rank
from specauf_jax.training.blocks import make_blocks
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


def ranges(B=2, T=7, S=9, H=4, G=2, E=6):
    """q, k, v, start, stop; among the ranges are empty ones and a whole row."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=shape).astype(np.float32) for shape in ((B, T, H, E), (B, S, G, E), (B, S, G, E)))
    start, stop = np.sort(rng.integers(0, S + 1, (2, B, T)), axis=0)
    start[0, :3], stop[0, :3] = (0, 4, 7), (S, 4, 3)
    return q, k, v, start, stop


def blocks(B=2, A=7, K=3, S=9, H=4, G=2, E=6):
    """q, k, v, context_k, context_v, start, stop, keep; block 1 has no context, blocks 2 and 5 are not kept."""
    rng = np.random.default_rng(1)
    shapes = (B, A, K, H, E), (B, A, K, G, E), (B, A, K, G, E), (B, S, G, E), (B, S, G, E)
    arrays = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    start, stop = np.sort(rng.integers(0, S + 1, (2, B, A)), axis=0)
    stop[:, 1] = start[:, 1]
    keep = np.ones((B, A), bool)
    keep[:, [2, 5]] = False
    return *arrays, start, stop, keep


def test_attend_equals_plain_loops_with_grouped_heads():
    q, k, v, start, stop = ranges()
    mixed = attend(q, k, v, start, stop)
    group = q.shape[2] // k.shape[2]
    for b, t, h in np.ndindex(q.shape[:3]):
        seen = range(start[b, t], stop[b, t])
        expected = one_query(q[b, t, h], [k[b, j, h // group] for j in seen], [v[b, j, h // group] for j in seen])
        np.testing.assert_allclose(mixed[b, t, h], expected, atol=1e-6)
    assert not mixed[0, 1].any() and not mixed[0, 2].any()  # empty ranges


def test_block_attend_equals_plain_loops_with_grouped_heads():
    q, k, v, context_k, context_v, start, stop, keep = blocks()
    mixed = block_attend(q, k, v, context_k, context_v, start, stop, keep, anchor_chunk=100)
    group = q.shape[3] // k.shape[3]
    for b, a, slot, h in np.ndindex(q.shape[:4]):
        keys, values = [], []
        if keep[b, a]:
            seen, g = range(start[b, a], stop[b, a]), h // group
            keys = [context_k[b, j, g] for j in seen] + list(k[b, a, :, g])
            values = [context_v[b, j, g] for j in seen] + list(v[b, a, :, g])
        np.testing.assert_allclose(mixed[b, a, slot, h], one_query(q[b, a, slot, h], keys, values), atol=1e-6)
    assert not mixed[:, [2, 5]].any() and mixed[:, 1].any()


def test_attention_without_keys_has_gradients_of_exactly_zero():
    *arrays, start, _ = ranges()
    grads, mixed = grads_and_value(lambda *x: attend(*x, start, start), *arrays)
    assert not mixed.any() and all(not g.any() for g in grads)  # nan would count as any
    *arrays, start, stop, keep = blocks()
    grads, mixed = grads_and_value(lambda *x: block_attend(*x, start, stop, keep, anchor_chunk=3)[:, [2, 5]], *arrays)
    assert not mixed.any() and all(not g.any() for g in grads)


def test_large_scores_stay_finite():
    q, k, v, start, stop = ranges()
    grads, mixed = grads_and_value(lambda q: attend(q, k, v, start, stop), q * 1e4)
    assert np.isfinite(mixed).all() and np.isfinite(grads[0]).all()


# ---------------------------------------------------------------------------------------------
# Chunks


def grads_and_value(f, *arrays):
    """Gradients of a random projection of f's (first) result, and all results."""

    def projected(*arrays):
        result = f(*arrays)
        first = jax.tree.leaves(result)[0]
        return (first * np.random.default_rng(2).normal(size=first.shape)).sum(), result

    return jax.jit(jax.grad(projected, argnums=tuple(range(len(arrays))), has_aux=True))(*arrays)


def test_attend_in_chunks_equals_attend_at_once(monkeypatch):
    *arrays, start, stop = ranges()
    whole = grads_and_value(lambda *x: attend(*x, start, stop), *arrays)
    for chunk in CHUNKS:
        monkeypatch.setattr(attention, "QUERY_CHUNK", chunk)
        assert tiny.largest_difference(grads_and_value(lambda *x: attend(*x, start, stop), *arrays), whole) < 1e-6


def test_block_attend_in_chunks_equals_block_attend_at_once():
    *arrays, start, stop, keep = blocks()

    def run(chunk):
        return grads_and_value(lambda *x: block_attend(*x, start, stop, keep, anchor_chunk=chunk), *arrays)

    whole = run(7)
    assert all(tiny.largest_difference(run(chunk), whole) < 1e-6 for chunk in CHUNKS)


def test_lm_head_cross_entropy_in_chunks_equals_all_logits_at_once():
    rng = np.random.default_rng(3)
    hidden, lm_head = rng.normal(size=(2, 7, 3, 6)).astype(np.float32), rng.normal(size=(6, 11)).astype(np.float32)
    labels = rng.integers(0, 11, (2, 7, 3), dtype=np.int32)

    def run(chunk):
        return grads_and_value(lambda h, w: lm_head_cross_entropy(h, w, labels, chunk=chunk), hidden, lm_head)

    whole = grads_and_value(lambda h, w: cross_entropy_and_rank(h @ w, labels), hidden, lm_head)
    for chunk in CHUNKS:
        grads, (ce, rank) = run(chunk)
        assert tiny.largest_difference((grads, (ce, rank)), whole) < 1e-6
        np.testing.assert_array_equal(rank == 0, (hidden @ lm_head).argmax(-1) == labels)


def test_logits_of_bfloat16_models_are_float32():
    """Rounded to bfloat16, several tokens would tie for the best."""
    rng = np.random.default_rng(4)
    hidden = jnp.asarray(rng.normal(size=(4, 8, 16)), jnp.bfloat16)
    lm_head = jnp.asarray(rng.normal(size=(16, 60)), jnp.bfloat16)
    exact = np.asarray(hidden, np.float64) @ np.asarray(lm_head, np.float64)
    labels = exact.argsort(-1)[..., -2].astype(np.int32)
    ce, rank = lm_head_cross_entropy(hidden, lm_head, labels, chunk=3)
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
# Sliding windows

SLOTS = 3  # of the blocks below
WINDOWS = (1, 2, 3, 5, 100, NO_WINDOW)  # shorter than a block, as long, longer, longer than the row, none


def seen_in(window, start, anchor, slot, slots=SLOTS):
    """Indices of the row and slots of the own block that one slot sees."""
    if window == NO_WINDOW:
        return range(start, anchor), range(slots)
    oldest = anchor + slot - (window - 1)
    return range(max(start, oldest), anchor), [j for j in range(slots) if slot - window < j <= slot]


@jax.jit
def windowed(q, k, v, context_k, context_v, start, stop, keep, window):
    return block_attend(q, k, v, context_k, context_v, start, stop, keep, window, anchor_chunk=100)


@pytest.mark.parametrize("window", WINDOWS)
def test_block_attend_with_a_window_equals_plain_loops(window):
    q, k, v, context_k, context_v, start, stop, keep = arguments = blocks()
    mixed = windowed(*arguments, jnp.int32(window))
    group = q.shape[3] // k.shape[3]
    for b, a, slot, h in np.ndindex(q.shape[:4]):
        keys, values, g = [], [], h // group
        if keep[b, a]:
            context, own = seen_in(window, start[b, a], stop[b, a], slot)
            keys = [context_k[b, j, g] for j in context] + [k[b, a, j, g] for j in own]
            values = [context_v[b, j, g] for j in context] + [v[b, a, j, g] for j in own]
        np.testing.assert_allclose(mixed[b, a, slot, h], one_query(q[b, a, slot, h], keys, values), atol=1e-6)
    assert not mixed[:, [2, 5]].any() and mixed[:, 1].any()
    if window == NO_WINDOW:
        np.testing.assert_allclose(mixed, block_attend(*arguments, anchor_chunk=100), atol=1e-6)


@pytest.mark.parametrize("window", WINDOWS)
def test_gradients_are_zero_outside_the_window_and_reach_all_of_it(window):
    q, *keys_and_values, start, stop, keep = blocks()
    B, A = keep.shape

    @jax.jit
    def reached(window, *arrays):
        _, pull = jax.vjp(lambda *x: windowed(q, *x, start, stop, keep, window), *arrays)
        cotangents = np.random.default_rng(5).normal(size=q.shape).astype(np.float32)
        one_slot = jnp.einsum("ax,ky->akxy", jnp.eye(A), jnp.eye(SLOTS)).reshape(A * SLOTS, A, SLOTS)
        return jax.vmap(pull)(one_slot[:, None, :, :, None, None] * cotangents)

    k, v, context_k, context_v = (np.asarray(g) for g in reached(jnp.int32(window), *keys_and_values))
    assert all(np.isfinite(g).all() for g in (k, v, context_k, context_v))
    for b, a, slot in np.ndindex(B, A, SLOTS):
        context, own = seen_in(window, start[b, a], stop[b, a], slot) if keep[b, a] else ((), ())
        in_context, in_block = np.zeros(context_k.shape[2], bool), np.zeros((A, SLOTS), bool)
        in_context[list(context)], in_block[a, list(own)] = True, True
        row = a * SLOTS + slot
        np.testing.assert_array_equal(context_v[row, b].any((-2, -1)), in_context)
        np.testing.assert_array_equal(v[row, b].any((-2, -1)), in_block)
        # A single key has weight 1 whatever it is, so its gradient may be zero inside.
        assert not context_k[row, b, ~in_context].any() and not k[row, b, ~in_block].any()


def test_block_attend_with_a_window_in_chunks_equals_block_attend_at_once():
    *arrays, start, stop, keep = blocks()

    def run(chunk):
        return grads_and_value(lambda *x: block_attend(*x, start, stop, keep, 2, anchor_chunk=chunk), *arrays)

    whole = run(7)
    assert all(tiny.largest_difference(run(chunk), whole) < 1e-6 for chunk in CHUNKS)


KINDS = {"s": "sliding_attention", "f": "full_attention"}


@pytest.mark.parametrize("kinds", ["sfs", "ss", "fs"])
def test_every_layer_of_a_drafter_has_its_own_window(kinds):
    """Each slot's hidden state depends on exactly those context values and slots that its layers let through."""
    K, W = 4, 5
    drafter = tiny.drafter_config(
        num_hidden_layers=len(kinds), layer_types=tuple(KINDS[kind] for kind in kinds), sliding_window=W
    )
    params, batch = tiny.drafter_params(drafter), tiny.random_batch([[9, 12], [24]], seed=6)
    anchors = jnp.array([[0, 3, 8, 9, 12, 20], [0, 1, 4, 5, 11, 22]])
    drafted = make_blocks(batch, anchors, anchors >= 0, config=drafter)
    rng = np.random.default_rng(7)
    features, embeddings, weights = (
        jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, 24, 32), (2, 6, K, 16), (2, 6, K, 16))
    )

    @jax.jit
    def reached(embeddings):
        context = context_keys_values(params, features, batch.positions, config=drafter)

        def hidden(values, embeddings):
            return draft_blocks(
                params, embeddings, drafted.positions, context.replace(v=values), drafted.start, anchors, drafted.keep,
                config=drafter, anchor_chunk=4,
            )  # fmt: skip

        _, pull = jax.vjp(hidden, context.v, embeddings)
        one_slot = jnp.einsum("ax,ky->akxy", jnp.eye(6), jnp.eye(K))
        return jax.vmap(jax.vmap(pull))(one_slot[:, :, None, ..., None] * weights)

    values, slots = (np.asarray(g) for g in reached(embeddings))  # [A, K, M, B, S, G, E], [A, K, B, A, K, D]
    windows = [W if kind == "s" else NO_WINDOW for kind in kinds]
    for b, a, k in np.ndindex(2, 6, K):
        start, anchor, streams = int(drafted.start[b, a]), int(anchors[b, a]), {k}
        for layer in reversed(range(len(kinds))):
            seen = [seen_in(windows[layer], start, anchor, slot, K) for slot in streams]
            expected = np.isin(np.arange(24), [j for context, _ in seen for j in context])
            np.testing.assert_array_equal(values[a, k, layer, b].any((-2, -1)), expected, err_msg=f"layer {layer}")
            streams |= {j for _, own in seen for j in own}
        expected = np.zeros((6, K), bool)
        expected[a, list(streams)] = True
        np.testing.assert_array_equal(slots[a, k, b].any(-1), expected)


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


def test_no_array_holds_the_logits_or_scores_of_all_blocks():
    """Neither the forward nor the backward pass; with all blocks in one chunk both do exist."""
    A, K, S, V = 32, 4, 64, 211
    target = tiny.target_config(vocab_size=V)
    drafter = tiny.drafter_config(target)
    batch = tiny.random_batch([[30, 34]], length=S)
    batch = batch.replace(features=jnp.ones((1, S, 2 * target.hidden_size)))
    arguments = tiny.drafter_params(drafter), target_head(tiny.target_params(target)), batch, jax.random.key(0)

    def largest(chunk):
        config = LossConfig(
            drafter=drafter, objective=Objective(), num_anchors=A, anchor_chunk=chunk, slot_chunk=chunk * (K - 1)
        )
        gradient = jax.make_jaxpr(lambda *x: jax.grad(loss_fn, has_aux=True)(*x, config=config))(*arguments)
        return largest_intermediate(gradient.jaxpr)

    all_logits, all_scores = A * (K - 1) * V, target.num_attention_heads * A * K * S
    assert largest(chunk=2) < min(all_logits, all_scores) / 2
    assert largest(chunk=A) >= max(all_logits, all_scores)


def test_no_array_holds_the_scores_of_all_queries_of_a_row(monkeypatch):
    monkeypatch.setattr(attention, "QUERY_CHUNK", 8)
    target, S = tiny.target_config(), 96
    batch = tiny.random_batch([[S]], length=S)
    jaxpr = jax.make_jaxpr(
        lambda params: target_features(
            params, batch.tokens, batch.positions, batch.document_ids, config=target, layer_ids=(0, 1)
        )
    )(tiny.target_params(target))
    assert largest_intermediate(jaxpr.jaxpr) < target.num_attention_heads * S * S / 2
