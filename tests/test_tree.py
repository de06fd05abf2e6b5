"""Draft trees: the best paths, as a heap finds them; exact at every temperature; and worth more than a chain."""

import dataclasses
import functools
import heapq
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_decoding
import test_domino
import tiny

from specauf_jax import config as c
from specauf_jax.decoding.baselines import PromptLookup
from specauf_jax.decoding.generate import generate, start, stream
from specauf_jax.decoding.speculate import draft_and_verify, propose_tree
from specauf_jax.decoding.state import Decoding
from specauf_jax.decoding.tree import ancestors, grow, walk
from specauf_jax.errors import SpecaufError
from specauf_jax.evaluation.measure import tau_micro
from specauf_jax.models.target import TargetStep
from specauf_jax.objectives import label_scores, tree_mask
from specauf_jax.sharding import make_mesh, parameter_sharding

LEVELS, V, D = 3, 17, 16
HEADS = {
    "dflash": tiny.drafter_config,
    "domino": functools.partial(tiny.domino_config, pure_draft_prefix_len=1),
    "dspark": tiny.dspark_config,
    "dflash2": tiny.dflash2_config,
    "dspark, rnn": functools.partial(tiny.dspark_config, markov_head_type="rnn"),
}
heads = pytest.mark.parametrize("name", HEADS)
SERVING = test_domino.SERVING


def drafter_of(name, target=SERVING, **changes):
    """A random drafter whose drafts are right now and then; its head's corrections matter."""
    drafter = HEADS[name](target, target_layer_ids=(0, 2), **changes)
    params = tiny.drafter_params(drafter, seed=3)
    if name == "domino":
        params["embed_proj"]["up"]["kernel"] *= 4.0
    if "dspark" in name:
        params["markov_head"]["markov_w2"]["kernel"] *= 2.0
    return drafter, params


def best_paths(head, params, hidden, logits, anchor, embedding, nodes, heat=1.0):
    """The N best paths of one row, best first, by a heap: {path of tokens: score}. float64 sums of float32 logits."""
    found, order = {}, itertools.count()

    def children(path, state, score):
        n, token = len(path), path[-1] if path else anchor
        if n == len(logits):
            return
        state, x = head.next_logits(
            params, state, jnp.int32(token), jnp.int32(n), hidden[n], logits[n], embedding=embedding
        )
        x = np.asarray(x, np.float64) / heat
        for token, likely in enumerate(x - x.max() - np.log(np.exp(x - x.max()).sum())):
            heapq.heappush(heap, (-score - likely, next(order), (*path, token), state))

    heap: list = []
    children((), head.first_state((), jnp.float32), 0.0)
    while heap and len(found) < nodes:
        score, _, path, state = heapq.heappop(heap)
        found[path] = -score
        children(path, state, -score)
    return found


def paths_of(tree, row):
    """{path of tokens: index} of every node but the root, each reached through its parents."""
    tokens, parents, depths = (np.asarray(x[row]) for x in (tree.tokens, tree.parents, tree.depths))
    found = {}
    for node in range(1, len(tokens)):
        if parents[node] < 0:
            continue
        path, at = (), node
        while at:
            path, at = (int(tokens[at]), *path), parents[at]
        assert len(path) == depths[node] and parents[node] < node and path not in found
        found[path] = node
    return found


def drawn(seed, rows=3):
    """Hidden states, logits and anchors."""
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(rows, LEVELS, D)).astype(np.float32)
    logits = (2 * rng.normal(size=(rows, LEVELS, V))).astype(np.float32)
    return jnp.asarray(hidden), jnp.asarray(logits), jnp.asarray(rng.integers(0, V, (rows, 1)), jnp.int32)


@heads
@pytest.mark.parametrize("nodes", [1, 5, 24, 60])
def test_the_tree_is_that_of_the_best_paths(name, nodes):
    drafter, params = drafter_of(name)
    hidden, logits, anchor = drawn(nodes)
    embedding = jnp.asarray(np.random.default_rng(1).normal(size=(V, D)), jnp.float32)
    heat = jnp.array([0.5, 1.0, 2.0])

    @jax.jit
    def grown(hidden, logits, anchor):
        return grow(drafter.head, params, hidden, embedding=embedding, anchor=anchor, logits=logits, temperature=heat,
                    nodes=nodes)  # fmt: skip

    tree = grown(hidden, logits, anchor)
    assert tree.tokens.shape == (3, nodes + 1)
    deepest = 0
    for row in range(3):
        wanted = best_paths(drafter.head, params, hidden[row], logits[row], int(anchor[row, 0]), embedding, nodes,
                            float(heat[row]))  # fmt: skip
        assert paths_of(tree, row).keys() == wanted.keys()
        deepest = max(deepest, *map(len, wanted))
        assert tree.tokens[row, 0] == anchor[row, 0] and tree.parents[row, 0] == -1
    assert deepest == min(nodes, LEVELS) or nodes == 5


def test_more_nodes_than_paths_leave_places_that_nothing_reaches():
    drafter, params = drafter_of("dflash")
    hidden, logits, anchor = drawn(0)
    sure = jnp.where(jnp.arange(V) < 2, logits, -jnp.inf)  # two tokens a slot: 2 + 4 + 8 paths
    tree = grow(drafter.head, params, hidden, embedding=jnp.zeros((V, D)), anchor=anchor, logits=sure,
                temperature=jnp.ones(3), nodes=20)  # fmt: skip
    for row in range(3):
        assert len(paths_of(tree, row)) == 14
    assert (tree.parents[:, 15:] == -1).all() and (tree.depths[:, 15:] == 0).all()
    seen = np.asarray(ancestors(tree, LEVELS))
    np.testing.assert_array_equal(seen[:, 15:], np.broadcast_to(np.eye(21, dtype=bool)[15:], (3, 6, 21)))
    path, accepted = walk(tree, jnp.broadcast_to(tree.tokens[:, 1:2], (3, 21)), LEVELS)
    assert path.max() < 15 and (accepted >= 1).all()


@pytest.mark.parametrize("seed", range(3))
def test_ancestors_and_walk_equal_plain_loops(seed):
    drafter, params = drafter_of("dflash")
    hidden, logits, anchor = drawn(seed)
    tree = grow(drafter.head, params, hidden, embedding=jnp.zeros((V, D)), anchor=anchor, logits=logits,
                temperature=jnp.ones(3), nodes=30)  # fmt: skip
    rng, seen = np.random.default_rng(seed), np.asarray(jax.jit(ancestors, static_argnums=1)(tree, LEVELS))
    choices = np.asarray(tree.tokens)[np.arange(3)[:, None], rng.integers(1, 31, (3, 31))]
    path, accepted = jax.jit(walk, static_argnums=2)(tree, jnp.asarray(choices), LEVELS)
    for row in range(3):
        parents, tokens = np.asarray(tree.parents[row]), np.asarray(tree.tokens[row])
        for node in range(31):
            above, at = {node}, node
            while at:
                at = int(parents[at])
                above.add(at)
            assert {*np.flatnonzero(seen[row, node]).tolist()} == above
        at, wanted = 0, [0]
        while children := [i for i in range(1, 31) if parents[i] == at and tokens[i] == choices[row, at]]:
            [at] = children
            wanted.append(at)
        assert accepted[row] == len(wanted) - 1
        np.testing.assert_array_equal(path[row], wanted + [wanted[-1]] * (LEVELS + 1 - len(wanted)))
    assert accepted.max() > 0


@pytest.mark.parametrize("nodes", [3, 8, 30])
def test_an_objective_never_stops_before_the_tree_and_mostly_with_it(nodes):
    """Against the heap: of labels drawn from the drafter's own distribution, which slots train."""
    drafter, params = drafter_of("dflash")
    rows, same, behind = 40, 0, 0
    hidden, logits, anchor = drawn(nodes, rows)
    labels = np.asarray(jax.random.categorical(jax.random.key(nodes), 1.5 * logits))
    valid = jnp.ones(labels.shape, bool).at[0, 1].set(False)
    rank = label_scores(logits, jnp.asarray(labels)).rank
    live = np.asarray(tree_mask(rank, valid, nodes))
    assert live[:, 0].all() and not live[0, 1:].any()
    for row in range(1, rows):
        best = best_paths(drafter.head, params, hidden[row], logits[row], 0, jnp.zeros((V, D)), nodes)
        exact = [tuple(labels[row, :k].tolist()) in best or k == 0 for k in range(LEVELS)]
        assert (live[row] >= exact).all()
        same += (live[row] == exact).all()
        behind += not all(exact)
    assert same > 0.6 * rows and behind > 5


# ---------------------------------------------------------------------------------------------
# Decoding


def decoding(drafter, nodes, **kwargs):
    return Decoding(TargetStep(SERVING, (0, 2)), drafter, tree_nodes=nodes, **kwargs)


@heads
def test_greedy_trees_write_the_targets_own_words_and_more_of_them_a_round(name):
    """Prompts of different lengths in batches, with and without a stop token."""
    drafter, params = drafter_of(name)
    prompts, texts = test_domino.own_words()
    stop = int(np.bincount(np.concatenate([text[4:16] for text in texts]), minlength=V).argmax())
    taus = []
    for nodes in (None, 3, 30):
        for stops in ((), (stop,)) if nodes == 30 else ((),):
            expected = [text[:20] for text in texts]
            expected = [text[: text.index(stop) + 1] if {*stops} & {*text} else text for text in expected]
            config = decoding(drafter, nodes, stop_tokens=stops)
            found = generate(params, test_domino.serving_target(), prompts, config=config, max_new_tokens=20,
                             batch_size=4)  # fmt: skip
            assert [g.tokens for g in found] == expected
            if not stops:
                taus.append(tau_micro([g.accepted for g in found]))
    assert taus[0] < taus[2] and taus[1] < taus[2], taus


@heads
def test_caches_hold_what_was_committed_and_nothing_else(name):
    """After rounds with trees: what reading the committed tokens from the start gives, to rounding."""
    drafter, params = drafter_of(name)
    config, target = decoding(drafter, 20), test_domino.serving_target()
    prompts, _ = test_domino.own_words()
    state, rounds = start(params, target, prompts, config=config, max_new_tokens=24), []
    step = jax.jit(draft_and_verify, static_argnames="config")
    while not state.done.all():
        state, done = step(params, target, state, config=config)
        rounds.append(np.asarray(done.accepted))
    assert np.max(rounds) >= 2
    texts = [np.asarray(row[:length]).tolist() for row, length in zip(state.tokens, state.length, strict=True)]
    again = start(params, target, texts, config=config, max_new_tokens=1)
    for row, text in enumerate(texts):
        for found, expected in zip(
            jax.tree.leaves((state.target_cache, state.drafter_cache)),
            jax.tree.leaves((again.target_cache, again.drafter_cache)),
            strict=True,
        ):
            one, other = (np.asarray(x[:, row, :, : len(text) - 1]) for x in (found, expected))
            np.testing.assert_allclose(one, other, atol=2e-3 * np.abs(other).max())  # the target sharpens rounding


def test_the_rows_temperature_shapes_the_tree_and_may_be_as_low_as_it_likes():
    drafter, params = drafter_of("dspark")
    config, target = decoding(drafter, 12), test_domino.serving_target()
    state = start(params, target, test_domino.own_words()[0], config=config, max_new_tokens=8)
    anchor = jnp.take_along_axis(state.tokens, state.length[:, None] - 1, axis=1)

    def paths(temperature, of_trees=1.0):
        heated = dataclasses.replace(state, temperature=jnp.full_like(state.temperature, temperature))
        how = dataclasses.replace(config, tree_temperature=of_trees)
        tree = propose_tree(params, target, heated, anchor, config=how)
        return [frozenset(paths_of(tree, row)) for row in range(len(anchor))]

    assert paths(0.0) == paths(1.0) != paths(3.0) == paths(0.0, 3.0) == paths(1.5, 2.0)
    for low in ((1e-3,), (1e-30,), (1e-37,), (1e-30, 1e-20)):
        assert all(max(map(len, found)) == LEVELS for found in paths(*low))


def test_a_tree_of_one_node_a_level_is_the_chain():
    """A drafter that is sure of itself: its best paths are one path and its beginnings."""
    drafter, params = drafter_of("dflash")
    params = params | {"norm": {"scale": params["norm"]["scale"] * 400}}
    prompts, _ = test_domino.own_words()
    options = {"max_new_tokens": 20, "batch_size": 3}
    chain, tree = (
        generate(params, test_domino.serving_target(), prompts, config=decoding(drafter, nodes), **options)
        for nodes in (None, drafter.block_size - 1)
    )
    assert [(g.tokens, g.accepted) for g in chain] == [(g.tokens, g.accepted) for g in tree]
    assert {0, 1} <= {a for g in chain for a in g.accepted}


@heads
@pytest.mark.parametrize("sampling", [c.Sampling(1.0, top_k=4), c.Sampling(0.8, top_p=0.6)])
def test_sampled_trees_follow_the_targets_law(name, sampling):
    """Chi-square of 3-token continuations, rare ones pooled, against enumeration."""
    drafter, params = drafter_of(name)
    target, prompt, draws = test_domino.serving_target(1.0), [3, 1, 4], 3000
    found = generate(params, target, [prompt] * draws, config=decoding(drafter, 10), max_new_tokens=3,
                     sampling=sampling, seed=1, batch_size=draws)  # fmt: skip
    assert {0, 1} <= {n for g in found for n in g.accepted}
    test_domino.assert_law(found, target, sampling, least=10)


def test_a_row_depends_neither_on_its_neighbours_nor_on_streaming():
    drafter, params = drafter_of("domino")
    target, asked = test_domino.serving_target(1.0), test_decoding.prompts(5, seed=8)
    for sampling in (c.Sampling(), c.Sampling(temperature=0.9, top_p=0.8)):
        options = {"config": decoding(drafter, 9), "max_new_tokens": 12, "sampling": sampling, "seed": 1}
        one, five = (generate(params, target, asked, batch_size=size, **options) for size in (1, 5))
        assert [g.tokens for g in one] == [g.tokens for g in five]
        parts = list(stream(params, target, asked[2], index=2, **options))
        assert sum((tokens for tokens, _ in parts), []) == one[2].tokens
        assert [accepted for _, accepted in parts] == one[2].accepted


def test_on_meshes():
    """Rows over all devices, heads over two: the same words."""
    assert tiny.on_eight_devices("import test_tree; test_tree.print_on_meshes()") == "same\n"


def print_on_meshes():
    drafter, params = drafter_of("domino")
    target, asked = test_domino.serving_target(), test_decoding.prompts(8, seed=8)
    options = {"config": decoding(drafter, 9), "max_new_tokens": 12, "batch_size": 8}
    alone = [g.tokens for g in generate(params, target, asked, **options)]
    for axes in ((8, 1, 1), (1, 4, 2)):
        mesh = make_mesh(c.Mesh(*axes))
        placed = [jax.device_put(tree, parameter_sharding(tree, mesh)) for tree in (params, target)]
        assert [g.tokens for g in generate(*placed, asked, mesh=mesh, **options)] == alone
    print("same")


def test_what_cannot_draft_trees_is_refused():
    drafter, _ = drafter_of("dflash")

    @dataclasses.dataclass(frozen=True)
    class Chains:
        step: TargetStep

        def __call__(self, *arguments):
            return self.step(*arguments)

    for step, kind, changes, said in (
        (None, drafter, {"tree_nodes": 0}, "tree_nodes 0"),
        (None, drafter, {"tree_nodes": 10**9}, "tree_nodes 1000000000"),
        (None, drafter, {"tree_nodes": 2.5}, "tree_nodes 2.5"),
        (None, drafter, {"tree_nodes": True}, "tree_nodes True"),
        (None, drafter, {"tree_nodes": 4, "tree_temperature": 0.0}, "tree_temperature 0.0"),
        (None, drafter, {"tree_temperature": 0.5}, "tree_temperature 0.5 with tree_nodes None"),
        (None, drafter, {"tree_nodes": 4, "tree_temperature": math.inf}, "tree_temperature inf"),
        (None, drafter, {"tree_nodes": 4, "verify_slots": 2}, "verify_slots 2"),
        (None, None, {"tree_nodes": 4}, "no drafter that predicts"),
        (None, PromptLookup(4), {"tree_nodes": 4}, "no drafter that predicts"),
        (Chains(TargetStep(SERVING, (0, 2))), drafter, {"tree_nodes": 4}, "reads chains alone"),
    ):
        with pytest.raises(SpecaufError, match=said):
            Decoding(step or TargetStep(SERVING, (0, 2)), kind, **changes)
