"""The three forms of block attention against plain loops and each other, on meshes, and through the TPU's compiler."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from specauf_jax.config import Mesh
from specauf_jax.kernels import block_attention as form
from specauf_jax.kernels import block_attention_tpu as kernel
from specauf_jax.kernels import block_attention_xla as loops
from specauf_jax.kernels.attention import NO_WINDOW
from specauf_jax.kernels.block_attention import (
    block_attention,
    causal_attention,
    dense,
    visible_ranges,
    with_gradient,
)
from specauf_jax.models.drafter import context_keys_values, draft_blocks
from specauf_jax.models.target import document_starts
from specauf_jax.sharding import make_mesh
from specauf_jax.training.blocks import make_blocks

FORMS = {
    "dense": dense,
    "loops": with_gradient(loops.forward, loops.backward),
    "kernel": with_gradient(
        functools.partial(kernel.forward, interpret=True), functools.partial(kernel.backward, interpret=True)
    ),
}
TILED = ("loops", "kernel")
SLOTS = 3  # of the blocks below
WINDOWS = (1, 2, 3, 5, 100, NO_WINDOW)  # shorter than a block, as long, longer, longer than the row, none


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """So that a few blocks and positions are several tiles, the last of them not whole."""
    monkeypatch.setattr(loops, "TILE_SLOTS", 4 * SLOTS)
    monkeypatch.setattr(loops, "CONTEXT_TILE", 8)
    monkeypatch.setattr(kernel, "LANES", 12)
    monkeypatch.setattr(kernel, "_QUERIES", 24)
    monkeypatch.setattr(kernel, "CONTEXT_TILE", 8)


def blocks(B=2, A=7, K=SLOTS, S=19, H=4, G=2, E=6, dtype=np.float32):
    """q, k, v, context_k, context_v, start, stop, keep, in no order; block 1 has no context, 2 and 5 are not kept."""
    rng = np.random.default_rng(1)
    shapes = (B, A, K, H, E), (B, A, K, G, E), (B, A, K, G, E), (B, S, G, E), (B, S, G, E)
    arrays = [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]
    start, stop = np.sort(rng.integers(0, S + 1, (2, B, A)), axis=0)
    stop[:, 1] = start[:, 1]
    keep = np.ones((B, A), bool)
    keep[:, [2, 5]] = False
    return *arrays, start, stop, keep


def seen_in(window, start, anchor, slot, slots=SLOTS):
    """Indices of the row and slots of the own block that one slot sees."""
    if window in (NO_WINDOW, None):
        return range(start, anchor), range(slots)
    oldest = anchor + slot - (window - 1)
    return range(max(start, oldest), anchor), [j for j in range(slots) if slot - window < j <= slot]


def one_query(q, keys, values):
    """Softmax attention of one head's query over lists of keys and values, in float64."""
    scores = [float(np.dot(q.astype(np.float64), key)) / len(q) ** 0.5 for key in keys]
    powers = [np.exp(score - max(scores)) for score in scores]
    return sum(p * value.astype(np.float64) for p, value in zip(powers, values, strict=True)) / sum(powers)


def plain_loops(q, k, v, context_k, context_v, start, stop, keep, window=None):
    """The definition, query by query."""
    q, k, v, context_k, context_v = map(np.asarray, (q, k, v, context_k, context_v))
    mixed, group = np.zeros(q.shape), q.shape[3] // k.shape[3]
    for b, a, slot, h in np.ndindex(q.shape[:4]):
        if keep[b, a]:
            context, own = seen_in(window, start[b, a], stop[b, a], slot)
            g = h // group
            keys = [context_k[b, j, g] for j in context] + [k[b, a, j, g] for j in own]
            values = [context_v[b, j, g] for j in context] + [v[b, a, j, g] for j in own]
            mixed[b, a, slot, h] = one_query(q[b, a, slot, h], keys, values)
    return mixed


def value_and_gradients(form, *arrays, seed=2):
    """The result, and gradients of a random projection of it with respect to all arrays, in float32."""

    @jax.jit
    def both(*arrays):
        mixed, pull = jax.vjp(form, *arrays)
        return mixed, pull(jnp.asarray(np.random.default_rng(seed).normal(size=mixed.shape), mixed.dtype))

    return jax.tree.map(lambda x: np.asarray(x, np.float32), both(*arrays))


# ---------------------------------------------------------------------------------------------
# What is computed


@pytest.mark.parametrize("window", [None, *WINDOWS])
@pytest.mark.parametrize("form", FORMS)
def test_equals_plain_loops(form, window):
    *arrays, start, stop, keep = blocks()
    traced = None if window is None else jnp.int32(window)
    mixed = jax.jit(lambda *x: FORMS[form](*x, visible_ranges(start, stop, keep, SLOTS, traced)))(*arrays)
    np.testing.assert_allclose(mixed, plain_loops(*arrays, start, stop, keep, window), atol=1e-6)
    assert not np.asarray(mixed)[:, [2, 5]].any() and np.asarray(mixed)[:, 1].any()


SHAPES = {
    "several tiles": {},
    "whole tiles": {"A": 8, "S": 16},
    "one of each": {"B": 1, "A": 6, "K": 1, "S": 1, "H": 1, "G": 1, "E": 2},
    "no groups": {"K": 2, "H": 3, "G": 3, "E": 5},
    "one group": {"K": 6, "S": 9, "H": 3, "G": 1},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", TILED)
def test_gradients_equal_those_of_the_dense_form(form, shape):
    *arrays, start, stop, keep = blocks(**SHAPES[shape])
    ranges = visible_ranges(start, stop, keep, arrays[0].shape[2])
    found, expected = (value_and_gradients(lambda *x, f=f: f(*x, ranges), *arrays) for f in (FORMS[form], dense))
    assert tiny.largest_difference(found, expected) < 1e-5


@pytest.mark.parametrize("form", TILED)
def test_bfloat16_is_near_the_float32_result(form):
    *arrays, start, stop, keep = blocks(dtype=jnp.bfloat16)
    ranges = visible_ranges(start, stop, keep, SLOTS)
    found = value_and_gradients(lambda *x: FORMS[form](*x, ranges), *arrays)
    expected = value_and_gradients(lambda *x: dense(*x, ranges), *(x.astype(jnp.float32) for x in arrays))
    assert 1e-5 < tiny.largest_difference(found, expected) < 2e-2


def test_the_choice_between_the_forms_changes_nothing():
    """Loops here, whatever the number of blocks, and also at sizes that the kernel could hold."""
    for shape in ({"A": 1}, {}, {"E": 12}):
        sizes = {"A": 7} | shape
        *arrays, start, stop, keep = blocks(**(sizes | {"A": 7}))
        cut = [x[:, : sizes["A"]] for x in (*arrays[:3], start, stop, keep)]
        q, k, v, *seen = cut
        mixed = block_attention(q, k, v, *arrays[3:], *seen)
        np.testing.assert_allclose(mixed, plain_loops(q, k, v, *arrays[3:], *seen), atol=1e-6)
        ranges = visible_ranges(*seen, SLOTS)
        found = value_and_gradients(lambda *x, seen=seen: block_attention(*x, *seen), q, k, v, *arrays[3:])
        expected = value_and_gradients(lambda *x, ranges=ranges: dense(*x, ranges), q, k, v, *arrays[3:])
        assert tiny.largest_difference(found, expected) < 1e-5
    assert kernel.holds(*arrays) and not kernel.holds(*blocks()[:5])


@pytest.mark.parametrize("form", FORMS)
def test_blocks_without_keys_have_gradients_of_exactly_zero(form):
    *arrays, start, stop, keep = blocks()
    ranges = visible_ranges(start, stop, keep, SLOTS)
    mixed, gradients = value_and_gradients(lambda *x: FORMS[form](*x, ranges)[:, [2, 5]], *arrays)
    assert not mixed.any() and all(not g.any() for g in gradients)  # nan would count as any
    nothing = visible_ranges(start, stop, np.zeros_like(keep), SLOTS)
    mixed, gradients = value_and_gradients(lambda *x: FORMS[form](*x, nothing), *arrays)
    assert not mixed.any() and all(not g.any() for g in gradients)


@pytest.mark.parametrize("form", FORMS)
def test_large_scores_stay_finite(form):
    q, *arrays, start, stop, keep = blocks()
    ranges = visible_ranges(start, stop, keep, SLOTS)
    mixed, gradients = value_and_gradients(lambda *x: FORMS[form](*x, ranges), q * 1e4, *arrays)
    assert np.isfinite(mixed).all() and all(np.isfinite(g).all() for g in gradients)


# ---------------------------------------------------------------------------------------------
# What is seen, and what is not even looked at


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_zero_outside_the_window_and_reach_all_of_it(form, window):
    q, *keys_and_values, start, stop, keep = blocks()
    B, A = keep.shape
    slots = [(a, slot) for a in (0, 1, 2, 6) for slot in range(SLOTS)]

    @jax.jit
    def reached(window, *arrays):
        ranges = visible_ranges(start, stop, keep, SLOTS, window)
        _, pull = jax.vjp(lambda *x: FORMS[form](q, *x, ranges), *arrays)
        cotangents = np.random.default_rng(5).normal(size=q.shape).astype(np.float32)
        one_slot = np.zeros((len(slots), 1, A, SLOTS, 1, 1), np.float32)
        for row, (a, slot) in enumerate(slots):
            one_slot[row, :, a, slot] = 1
        return jax.vmap(pull)(one_slot * cotangents)

    k, v, context_k, context_v = (np.asarray(g) for g in reached(jnp.int32(window), *keys_and_values))
    assert all(np.isfinite(g).all() for g in (k, v, context_k, context_v))
    for b, (row, (a, slot)) in ((b, x) for b in range(B) for x in enumerate(slots)):
        context, own = seen_in(window, start[b, a], stop[b, a], slot) if keep[b, a] else ((), ())
        in_context, in_block = np.zeros(context_k.shape[2], bool), np.zeros((A, SLOTS), bool)
        in_context[list(context)], in_block[a, list(own)] = True, True
        np.testing.assert_array_equal(context_v[row, b].any((-2, -1)), in_context)
        np.testing.assert_array_equal(v[row, b].any((-2, -1)), in_block)
        # A single key has weight 1 whatever it is, so its gradient may be zero inside.
        assert not context_k[row, b, ~in_context].any() and not k[row, b, ~in_block].any()


@pytest.mark.parametrize("form", TILED)
def test_tiles_that_no_block_sees_are_not_read(form):
    """Other documents and all behind the anchors are nan here, and leave no trace."""
    q, k, v, context_k, context_v, *_ = blocks(A=8, S=64)
    start = np.array([[8] * 4 + [32] * 4, [40] * 4 + [0] * 4])
    stop = np.array([[9, 12, 14, 16, 33, 33, 36, 40], [48, 41, 41, 45, 0, 1, 8, 8]])
    seen = np.zeros((2, 64, 1, 1), bool)
    seen[0, 8:16], seen[0, 32:40], seen[1, 40:48], seen[1, :8] = True, True, True, True
    ranges = visible_ranges(start, stop, np.ones_like(start, bool), SLOTS)

    def run(hidden):
        context = [np.where(seen, x, hidden) for x in (context_k, context_v)]
        return value_and_gradients(lambda *x: FORMS[form](*x, ranges), q, k, v, *context)

    found = run(np.float32(np.nan))
    assert tiny.same_bits(found, run(np.float32(0)))
    assert all(g[np.broadcast_to(~seen, g.shape)].any() == 0 for g in found[1][3:])


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
            seen = drafted.start, anchors, drafted.keep
            return draft_blocks(params, embeddings, drafted.positions, context.replace(v=values), *seen, config=drafter)

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
# Meshes and compilers, in processes of their own


def child(call: str, **environment) -> dict:
    """What a function of this module prints as its last line."""
    done = subprocess.run(
        [sys.executable, "-c", f"import test_block_attention; test_block_attention.{call}()"],
        cwd=Path(__file__).parent,
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


MESHES = {
    "rows and heads": Mesh(replica=2, fsdp=2, tensor=2),
    "groups that the mesh does not divide": Mesh(fsdp=2, tensor=4),
    "rows that the mesh does not divide": Mesh(fsdp=8),
}


def compare_meshes():
    """Of a process with 8 devices: for each mesh the difference from one device, and what crosses devices."""
    loops.TILE_SLOTS, loops.CONTEXT_TILE = 4 * SLOTS, 8
    *arrays, start, stop, keep = blocks(B=4)
    run = jax.jit(jax.value_and_grad(lambda x: (block_attention(*x, start, stop, keep) ** 2).sum()))
    expected, found = run(arrays), {}
    for name, config in MESHES.items():
        mesh = make_mesh(config)
        rows = ("replica", "fsdp") if name != "rows that the mesh does not divide" else None
        heads = "tensor" if name == "rows and heads" else None
        specs = [jax.P(rows, *[None] * (x.ndim - 3), heads) for x in arrays]
        spread = [jax.device_put(x, jax.NamedSharding(mesh, spec)) for x, spec in zip(arrays, specs, strict=True)]
        gradient = run.lower(spread).compile()
        difference = tiny.largest_difference(gradient(spread), expected)
        text = gradient.as_text()
        moved = [kind for kind in ("all-gather(", "all-to-all(", "collective-permute(") if kind in text]
        found[name] = {"difference": difference, "moved": moved}
    print(json.dumps({"devices": len(jax.devices()), "meshes": found}))


def test_eight_devices_compute_what_one_does_and_move_nothing():
    found = child("compare_meshes", XLA_FLAGS=f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8")
    assert found["devices"] == 8 and found["meshes"].keys() == MESHES.keys()
    for name, mesh in found["meshes"].items():
        assert mesh["difference"] < 1e-5 and mesh["moved"] == [], (name, mesh)


TOPOLOGIES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2")


def compile_for_tpus():
    """Kernels and MiB of temporary memory of a layer's attention, forward and backward, on each TPU."""
    from jax.experimental import topologies

    S, A, K, H, G, E = 3072, 512, 16, 32, 8, 128

    def layer(q, k, v, context_k, context_v, cotangent, start, stop, keep):
        """Heads as norm and RoPE leave them, and the result as `o_proj` takes it."""

        def mixed(*arrays):
            return block_attention(*arrays, start, stop, keep).reshape(1, A, K, H * E)

        result, pull = jax.vjp(mixed, q, k, v, context_k, context_v)
        return result, pull(cotangent)

    found = {}
    for name in TOPOLOGIES:
        device = topologies.get_topology_desc(platform="tpu", topology_name=name).devices[0]
        place = jax.sharding.SingleDeviceSharding(device)
        shapes = (1, A, K, H, E), (1, A, K, G, E), (1, A, K, G, E), (1, S, G, E), (1, S, G, E), (1, A, K, H * E)
        shapes = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place) for shape in shapes]
        shapes += [jax.ShapeDtypeStruct((1, A), dtype, sharding=place) for dtype in (jnp.int32, jnp.int32, jnp.bool_)]
        program = jax.jit(layer).lower(*shapes).compile()
        text = program.as_text()
        kernels = [kind for kind in ("forward", "backward") if f"%block_attention_{kind}" in text]
        found[name] = {"kernels": kernels, "mib": program.memory_analysis().temp_size_in_bytes / 2**20}
    print(json.dumps(found))


def test_kernels_compile_for_tpus_in_little_memory():
    pytest.importorskip("libtpu")
    # CPU flags would end libtpu; a second process may use it at the same time, as nothing runs on a TPU.
    found = child("compile_for_tpus", XLA_FLAGS="", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    assert found.keys() == set(TOPOLOGIES)
    for name, program in found.items():
        assert program["kernels"] == ["forward", "backward"] and program["mib"] <= 256, (name, program)


def test_causal_attention_of_packed_rows_equals_attention_over_ranges(monkeypatch):
    """Values and gradients, over documents whose ends are no tile's."""
    monkeypatch.setattr(loops, "TILE_SLOTS", 8)
    monkeypatch.setattr(loops, "CONTEXT_TILE", 16)
    rng, S = np.random.default_rng(5), 45
    q, k, v = (jnp.asarray(rng.normal(size=(2, S, heads, 8)), jnp.float32) for heads in (4, 2, 2))
    ids = jnp.asarray([[1] * 20 + [2] * 3 + [3] * 15 + [0] * 7, [1] * S])
    start, index = document_starts(ids), jnp.arange(S)[None]
    cotangent = jnp.asarray(rng.normal(size=q.shape), jnp.float32)

    @functools.partial(jax.jit, static_argnums=0)
    def run(f, *arrays):
        mixed, pull = jax.vjp(f, *arrays)
        return mixed, pull(cotangent)

    found = run(lambda q, k, v: causal_attention(q, k, v, start), q, k, v)
    own = jnp.zeros_like(start)  # nothing: the token itself is taken from the row
    ranges = jnp.stack([start, jnp.broadcast_to(index + 1, start.shape), own, own], axis=2)[..., None]
    expected = run(lambda q, k, v: dense(*(x[:, :, None] for x in (q, k, v)), k, v, ranges)[:, :, 0], q, k, v)
    assert tiny.largest_difference(found, expected) < 1e-5


def test_a_gpu_takes_few_scores_at_one_time(monkeypatch):
    """The form is another, the numbers are not."""
    rng, (B, A, K, H, G, E, S) = np.random.default_rng(0), (2, 3, 4, 4, 2, 8, 12)
    q, k, v, context_k, context_v = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in ((B, A, K, H, E), *[(B, A, K, G, E)] * 2, *[(B, S, G, E)] * 2)
    )
    seen = jnp.zeros((B, A), jnp.int32), jnp.full((B, A), 7), jnp.ones((B, A), bool)
    calls, real = [], form.dense
    monkeypatch.setattr(form, "dense", lambda *x: calls.append(0) or real(*x))
    expected = form.block_attention(q, k, v, context_k, context_v, *seen)
    assert not calls
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    found = form.block_attention(q, k, v, context_k, context_v, *seen)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    monkeypatch.setattr(form, "GPU_SCORES", 4 * B * A * K * H * (S + K) - 1)
    form.block_attention(q, k, v, context_k, context_v, *seen)
    assert len(calls) == 1
