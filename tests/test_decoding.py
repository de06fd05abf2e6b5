"""Decoding: exact for any drafter, at any temperature, for any target."""

import dataclasses
import functools
import math
import os

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from scipy.stats import chisquare

from specauf_jax import architecture as a
from specauf_jax import config as c
from specauf_jax.decoding.baselines import PromptLookup
from specauf_jax.decoding.generate import generate, stream
from specauf_jax.decoding.sampling import distribution
from specauf_jax.decoding.speculate import draft_and_verify, prefill
from specauf_jax.decoding.state import Decoding, init_state
from specauf_jax.errors import SpecaufError
from specauf_jax.models.drafter import init_drafter
from specauf_jax.models.layers import init_kv_cache
from specauf_jax.models.resolve import resolve_drafter
from specauf_jax.models.target import Head, TargetStep, init_target, target_features, target_head, target_hidden

V, D, K = 17, 16, 4
TARGET = a.Target(
    vocab_size=V,
    hidden_size=D,
    intermediate_size=24,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
)
DRAFTER = resolve_drafter(
    a.Drafter(block_size=K, num_hidden_layers=2, mask_token_id=16, target_layer_ids=(0, 2)), TARGET
)


def sharpened(params, scale=12.0):
    """Random models are nearly indifferent; larger embeddings give them opinions, and repeats."""
    return jax.tree.map(lambda x: x * scale if x.ndim > 1 else x, params)


@pytest.fixture(scope="module")
def models():
    return sharpened(init_drafter(DRAFTER, jax.random.key(1))), sharpened(init_target(TARGET, jax.random.key(0)))


def decoding(drafter=DRAFTER, **kwargs):
    return Decoding(target_step=TargetStep(TARGET, DRAFTER.target_layer_ids), drafter=drafter, **kwargs)


def prompts(count, seed=0, longest=20):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, V - 1, rng.integers(1, longest + 1)).tolist() for _ in range(count)]


def greedy_by_hand(target_params, prompt, count, stops=(), target=TARGET):
    """The slowest oracle: the whole text through the packed forward for every token. No cache."""
    text = list(prompt)
    for _ in range(count):
        tokens = np.zeros((1, 128), np.int32)
        tokens[0, : len(text)] = text
        text.append(int(_argmaxes(target_params, tokens, target)[len(text) - 1]))
        if text[-1] in stops:
            break
    return text[len(prompt) :]


@functools.partial(jax.jit, static_argnames="target")
def _argmaxes(params, tokens, target):
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    hidden = target_hidden(params, tokens, positions, jnp.ones_like(tokens), config=target)
    return jnp.argmax(hidden @ target_head(params).lm_head, -1)[0]


def test_greedy_speculation_equals_a_cacheless_loop_in_mixed_batches(models):
    asked = prompts(12)
    expected = [greedy_by_hand(models[1], prompt, 24) for prompt in asked]
    for batch_size in (1, 5):
        found = generate(*models, asked, config=decoding(), max_new_tokens=24, batch_size=batch_size)
        assert [g.tokens for g in found] == expected
        assert [g.prompt for g in found] == asked
    alone = generate(None, models[1], asked, config=decoding(drafter=None), max_new_tokens=24, batch_size=5)
    assert [g.tokens for g in alone] == expected
    assert all(g.accepted == [0] * 24 for g in alone)


def test_every_row_stops_at_its_own_end_of_sequence(models):
    asked = prompts(10, seed=3)
    free = [greedy_by_hand(models[1], prompt, 24) for prompt in asked]
    stop = int(np.bincount(np.concatenate(free), minlength=V).argmax())
    expected = [greedy_by_hand(models[1], prompt, 24, stops=(stop,)) for prompt in asked]
    assert len({len(tokens) for tokens in expected}) > 2  # stops early, late and not at all
    found = generate(*models, asked, config=decoding(stop_tokens=(stop,)), max_new_tokens=24, batch_size=4)
    assert [g.tokens for g in found] == expected


def test_accepted_counts_what_the_target_agreed_with(models):
    """A drafter that cannot be wrong: its target's weights make every next token the same."""
    _, target = models
    constant = jax.tree.map(jnp.zeros_like, target)
    drafter = jax.tree.map(jnp.zeros_like, models[0])  # all logits 0: argmax is token 0, as is the target's
    [found] = generate(drafter, constant, [[5, 6]], config=decoding(), max_new_tokens=10, batch_size=1)
    assert found.tokens == [0] * 10
    assert found.accepted == [3, 3, 3]  # 4 + 4 + the last round, cut by the limit after 2


def test_rounds_account_for_every_token(models):
    for g in generate(*models, prompts(8, seed=5), config=decoding(), max_new_tokens=21, batch_size=4):
        emitted = [a + 1 for a in g.accepted]
        assert sum(emitted[:-1]) < len(g.tokens) == 21 <= sum(emitted)


def test_streaming_gives_the_same_tokens_round_by_round(models):
    asked = prompts(3, seed=7)
    for sampling in (c.Sampling(), c.Sampling(temperature=1.0, top_k=5)):
        whole = generate(*models, asked, config=decoding(), max_new_tokens=15, sampling=sampling, seed=4, batch_size=3)
        for index, prompt in enumerate(asked):
            parts = list(
                stream(*models, prompt, config=decoding(), max_new_tokens=15, sampling=sampling, seed=4, index=index)
            )
            assert sum((tokens for tokens, _ in parts), []) == whole[index].tokens
            assert [accepted for _, accepted in parts] == whole[index].accepted


def test_a_row_does_not_depend_on_its_neighbours(models):
    asked, sampling = prompts(6, seed=8), c.Sampling(temperature=0.9, top_p=0.8)
    one, six = (
        generate(*models, asked, config=decoding(), max_new_tokens=12, sampling=sampling, seed=1, batch_size=size)
        for size in (1, 6)
    )
    assert [g.tokens for g in one] == [g.tokens for g in six]
    other = generate(*models, asked, config=decoding(), max_new_tokens=12, sampling=sampling, seed=2, batch_size=6)
    assert [g.tokens for g in other] != [g.tokens for g in six]


def test_an_empty_prompt_is_refused(models):
    with pytest.raises(SpecaufError, match="prompt 1 is empty"):
        generate(*models, [[1], []], config=decoding(), max_new_tokens=2)


def test_no_prompts_give_no_results(models):
    assert generate(*models, [], config=decoding(), max_new_tokens=2) == []


def test_draws_follow_the_given_indices(models):
    asked, sampling = prompts(3, seed=8), c.Sampling(temperature=1.0)
    common = dict(config=decoding(), max_new_tokens=8, sampling=sampling, batch_size=3)
    whole = generate(*models, asked, **common)
    assert generate(*models, asked[1:], indices=[1, 2], **common) == whole[1:]
    assert generate(*models, asked[1:], **common) != whole[1:]


@pytest.mark.parametrize("kind", ["dflash", "domino", "prompt lookup"])
def test_fewer_verified_tokens_give_the_same_text(kind):
    target, asked = tiny.target_params(), [[1, 2, 3, 1, 2], [4], [3, 3, 2] * 4, [2, 4, 1], [5, 1]]
    drafter = {"dflash": tiny.drafter_config(), "domino": tiny.domino_config(), "prompt lookup": PromptLookup(4)}[kind]
    params = None if kind == "prompt lookup" else tiny.drafter_params(drafter)
    config = Decoding(TargetStep(tiny.target_config(), (0, 1)), drafter)
    whole, three, two = (
        generate(params, target, asked, config=dataclasses.replace(config, verify_slots=width), max_new_tokens=25,
                 batch_size=2) for width in (None, 3, 2)
    )  # fmt: skip
    assert [g.tokens for g in whole] == [g.tokens for g in three] == [g.tokens for g in two]
    most = [max(a for g in found for a in g.accepted) for found in (whole, three, two)]
    assert most == [most[0], min(most[0], 2), 1] and most[0] == (1 if kind == "dflash" else 3)
    # A narrow round accepts what a whole one would have accepted of its first drafts.
    for width, found in ((3, three), (2, two)):
        assert all(g.accepted[0] == min(w.accepted[0], width - 1) for g, w in zip(found, whole, strict=True))
    assert [dataclasses.replace(config, verify_slots=n).block_size for n in (None, 2, 4)] == [4, 2, 4]
    for changes in ({"verify_slots": 5}, {"verify_slots": 0}, {"drafter": None, "verify_slots": 2}):
        with pytest.raises(SpecaufError, match="verify_slots"):
            dataclasses.replace(config, **changes)


def test_one_compilation_per_shape(models):
    count = {"traces": 0}

    @dataclasses.dataclass(frozen=True)
    class Counting:
        step: TargetStep

        def __call__(self, *args):
            count["traces"] += 1
            return self.step(*args)

        def init_cache(self, *args):
            return self.step.init_cache(*args)

    counting = dataclasses.replace(decoding(), target_step=Counting(TargetStep(TARGET, DRAFTER.target_layer_ids)))
    generate(*models, prompts(5, longest=16), config=counting, max_new_tokens=6, batch_size=2)
    first = count["traces"]
    generate(*models, prompts(9, seed=1, longest=16), config=counting, max_new_tokens=6, batch_size=2)
    assert count["traces"] == first


# Sampling -------------------------------------------------------------------------------------


def enumerated_law(target_params, prompt, length, sampling):
    """Probability of every continuation of `length` tokens, by enumeration. float64 `[V ** length]`."""
    small = np.indices((V,) * length).reshape(length, -1).T
    tokens = np.concatenate([np.tile(prompt, (len(small), 1)), small], axis=1)
    logits = np.asarray(_all_logits(target_params, jnp.asarray(tokens, jnp.int32)))[:, len(prompt) - 1 : -1]
    law = np.ones(len(small))
    for k in range(length):
        law *= np.take_along_axis(_filtered(logits[:, k], sampling), small[:, k : k + 1], axis=1)[:, 0]
    return law


@jax.jit
def _all_logits(params, tokens):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    hidden = target_hidden(params, tokens, positions, jnp.ones_like(tokens), config=TARGET)
    return hidden @ target_head(params).lm_head


def _filtered(logits, sampling):
    """Temperature, top-k, top-p by plain loops."""
    result = np.zeros(logits.shape, np.float64)
    for row, scores in enumerate(np.asarray(logits, np.float64) / sampling.temperature):
        order = sorted(range(V), key=lambda token: (-scores[token], token))
        order = order[: sampling.top_k or V]
        powers = np.exp(scores[order] - scores[order[0]])
        powers /= powers.sum()
        total, kept = 0.0, []
        for token, p in zip(order, powers, strict=True):
            if total < sampling.top_p:
                kept.append((token, p))
            total += p
        for token, p in kept:
            result[row, token] = p / sum(p for _, p in kept)
    return result


@pytest.mark.skipif(bool(os.environ["XLA_FLAGS"]), reason="test_default_flags runs it: optimised, it is thrice as fast")
@pytest.mark.parametrize(
    "sampling,drafter_seed,width",
    [
        (c.Sampling(1.0), 1, None),
        (c.Sampling(0.7, top_k=5), 2, None),
        (c.Sampling(1.3, top_p=0.8), 1, None),
        (c.Sampling(1.0), 2, 3),
    ],
)
def test_sampled_speculation_follows_the_targets_law(models, sampling, drafter_seed, width):
    """Chi-square of 3-token continuations (17^3 outcomes, rare ones pooled) against enumeration."""
    target = sharpened(init_target(TARGET, jax.random.key(0)), 6.0)
    drafter = sharpened(init_drafter(DRAFTER, jax.random.key(drafter_seed)), 6.0)
    prompt, draws = [3, 1, 4], 20_000
    found = generate(drafter, target, [prompt] * draws, config=decoding(verify_slots=width), max_new_tokens=3,
                     sampling=sampling, seed=drafter_seed, batch_size=draws)  # fmt: skip
    # Rejections and acceptances both happen.
    assert len({a for g in found for a in g.accepted}) > 2 and max(max(g.accepted) for g in found) == (width or K) - 1
    outcomes = np.ravel_multi_index(np.asarray([g.tokens for g in found]).T, (V,) * 3)
    observed = np.bincount(outcomes, minlength=V**3)
    law = enumerated_law(target, prompt, 3, sampling)
    assert observed[law == 0].sum() == 0
    common = law * draws >= 8
    expected = np.append(law[common], law[~common].sum()) * draws
    seen = np.append(observed[common], observed[~common].sum())
    keep = expected > 0
    assert keep.sum() > 10
    assert chisquare(seen[keep], expected[keep] * seen.sum() / expected[keep].sum()).pvalue > 0.01


def test_the_chi_square_would_notice_a_wrong_law(models):
    """The same statistic rejects draws of a slightly different temperature: the test above can fail."""
    target = sharpened(init_target(TARGET, jax.random.key(0)), 6.0)
    prompt, draws = [3, 1, 4], 20_000
    found = generate(None, target, [prompt] * draws, config=decoding(drafter=None), max_new_tokens=1,
                     sampling=c.Sampling(1.1), batch_size=draws)  # fmt: skip
    observed = np.bincount([g.tokens[0] for g in found], minlength=V)
    right, wrong = (enumerated_law(target, prompt, 1, c.Sampling(t)) * draws for t in (1.1, 1.0))
    assert chisquare(observed, right).pvalue > 0.01 > 1e-6 > chisquare(observed, wrong).pvalue


def test_distribution_by_hand():
    logits = jnp.log(jnp.array([[[0.1, 0.4, 0.3, 0.2]]]))

    def of(temperature, top_k, top_p):
        return distribution(logits, *(jnp.array([x]) for x in (temperature, top_k, top_p)))[0, 0]

    np.testing.assert_allclose(of(1.0, 0, 1.0), [0.1, 0.4, 0.3, 0.2], rtol=1e-6)
    np.testing.assert_allclose(of(0.0, 0, 1.0), [0, 1, 0, 0])
    np.testing.assert_allclose(of(1.0, 2, 1.0), [0, 4 / 7, 3 / 7, 0], rtol=1e-6)
    np.testing.assert_allclose(of(1.0, 0, 0.5), [0, 4 / 7, 3 / 7, 0], rtol=1e-6)  # 0.4 alone falls short of 0.5
    np.testing.assert_allclose(of(1.0, 0, 0.01), [0, 1, 0, 0])
    np.testing.assert_allclose(of(0.5, 0, 1.0), np.square([1, 4, 3, 2]) / 30, rtol=1e-5)
    np.testing.assert_allclose(
        distribution(1e4 * logits, jnp.array([2e-38]), jnp.array([0]), jnp.ones(1))[0, 0], [0, 1, 0, 0]
    )


def cut(scores, temperature, top_k, top_p):
    """`distribution` of one slot by plain loops in float64; and how near a running sum came to top_p."""
    below = [float(x) - float(max(scores)) for x in scores]
    order = sorted(range(len(scores)), key=lambda token: (-below[token], token))[: top_k or None]
    powers = {token: math.exp(below[token] / temperature) for token in order}
    total, kept, nearest = 0.0, [], 1.0
    for token in order:
        if total < top_p or top_p == 1:
            kept.append(token)
        total += powers[token] / sum(powers.values())
        nearest = min(nearest, abs(total - top_p)) if top_p < 1 else nearest
    result = np.zeros(len(scores))
    result[kept] = [powers[token] / sum(powers[t] for t in kept) for token in kept]
    return result, nearest


@pytest.mark.parametrize("vocabulary", [1, 2, 50])
def test_distribution_against_plain_loops(vocabulary):
    """With many exact ties, impossible tokens, and all ways to cut, each row of a batch in its own way."""
    rng = np.random.default_rng(vocabulary)
    B, T = 64, 3
    logits = rng.integers(-3, 3, (B, T, vocabulary)).astype(np.float32)
    logits[: B // 2][rng.random((B // 2, T, vocabulary)) < 0.3] = -np.inf
    logits[..., 0] = np.where(np.isfinite(logits).any(-1), logits[..., 0], 1.0)
    temperature = rng.choice([1.0, 0.3, 2.5, 1e-6, 2e-38], B).astype(np.float32)
    top_k = rng.choice([0, 1, 2, 3, 7, 49, 50, 2**31 - 1], B).astype(np.int32)
    top_p = rng.choice([1.0, 0.013, 0.413, 0.777, 0.9931], B).astype(np.float32)
    found = np.asarray(distribution(*map(jnp.asarray, (logits, temperature, top_k, top_p))))
    compared = 0
    for row in range(B):
        for slot in range(T):
            expected, nearest = cut(logits[row, slot], float(temperature[row]), int(top_k[row]),
                                    float(top_p[row]))  # fmt: skip
            if nearest > 1e-6:  # rounding may decide otherwise
                np.testing.assert_allclose(found[row, slot], expected, rtol=1e-5, atol=1e-30)
                compared += 1
    assert compared > 0.9 * B * T


def test_equal_tokens_are_cut_by_their_index():
    logits = jnp.zeros((1, 1, 8))  # each of probability 1/8, exactly
    for top_k, top_p, kept in ((3, 1.0, 3), (0, 0.5, 4), (0, 0.51, 5), (4, 0.5, 2), (4, 0.51, 3), (0, 0.125, 1)):
        found = distribution(logits, jnp.ones(1), jnp.array([top_k]), jnp.array([top_p], jnp.float32))[0, 0]
        np.testing.assert_allclose(found, [1 / kept] * kept + [0] * (8 - kept), rtol=1e-6)


def test_a_top_k_beyond_any_vocabulary_keeps_all(models):
    found = [generate(*models, prompts(2), config=decoding(), max_new_tokens=4, sampling=c.Sampling(1.0, top_k=top_k))
             for top_k in (0, 3_000_000_000)]  # fmt: skip
    assert found[0] == found[1]


def test_greedy_and_sampled_rows_share_a_batch(models):
    """Temperature is data: a greedy row between sampled ones stays greedy."""
    asked = prompts(4, seed=11)
    expected = generate(*models, asked, config=decoding(), max_new_tokens=6, batch_size=4)
    width = 32
    tokens = np.zeros((4, width), np.int32)
    for row, prompt in enumerate(asked):
        tokens[row, : len(prompt)] = prompt
    length = jnp.array([len(p) for p in asked])
    keys = jax.random.split(jax.random.key(0), 4)
    how = (jnp.array([0.0, 1.5, 0.0, 1.5]), jnp.int32(0), jnp.float32(1.0))
    config = decoding()
    state = init_state(jnp.asarray(tokens), length, length + 6, keys, how,
                       target_cache=config.target_step.init_cache(4, width + K, jnp.float32),
                       drafter_cache=init_kv_cache(DRAFTER, 4, width + K, jnp.float32))  # fmt: skip
    state = prefill(*models, state, config=config)
    round_ = jax.jit(functools.partial(draft_and_verify, config=config))
    while not state.done.all():
        state, _ = round_(*models, state)
    for row in (0, 2):
        begin = len(asked[row])
        assert state.tokens[row, begin : begin + 6].tolist() == expected[row].tokens


@pytest.mark.parametrize("columns", [1, 3])  # whether a prompt is read first
def test_a_state_without_its_drafters_cache_is_refused(models, columns):
    config, length = decoding(), jnp.array([columns])
    state = init_state(jnp.ones((1, 8), jnp.int32), length, length + 1, jax.random.split(jax.random.key(0), 1),
                       (jnp.float32(0), jnp.int32(0), jnp.float32(1)),
                       target_cache=config.target_step.init_cache(1, 12, jnp.float32))  # fmt: skip
    with pytest.raises(SpecaufError, match="without drafter_cache"):
        draft_and_verify(*models, prefill(*models, state, config=config), config=config)


# A caller's own target ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class RecurrentStep:
    """An Elman network: not ours, not a Transformer. Its cache keeps the state after every position."""

    def __call__(self, params, tokens, positions, cache):
        def advance(state, inputs):
            token, before = inputs
            del before
            state = jnp.tanh(params["embedding"][token] + state @ params["recurrent"])
            return state, state

        rows = jnp.arange(tokens.shape[0])
        previous = cache[rows, jnp.maximum(positions[:, 0] - 1, 0)] * (positions[:, :1] > 0)
        _, states = jax.lax.scan(advance, previous, (tokens.T, positions.T))
        states = jnp.moveaxis(states, 0, 1)
        cache = cache.at[rows[:, None], positions].set(states)
        return states @ params["head"], states, cache

    def init_cache(self, batch, length, dtype):
        return jnp.zeros((batch, length, D), dtype)


def recurrent_head(params):
    return Head(embedding=params["embedding"], lm_head=params["head"])


def recurrent_model():
    keys = jax.random.split(jax.random.key(5), 3)
    params = {name: jax.random.normal(key, shape) for name, key, shape in
              zip(("embedding", "recurrent", "head"), keys, ((V, D), (D, D), (D, V)), strict=True)}  # fmt: skip
    drafter = dataclasses.replace(DRAFTER, target_layer_ids=(0,), num_target_layers=1)
    return params, drafter


def test_a_chunk_that_would_end_behind_the_row_begins_sooner(models):
    """Of 40 tokens 20 are there: a chunk of 32 reads 8 to 39 anew, and the caches hold what one pass leaves."""
    config, rng = decoding(), np.random.default_rng(3)
    tokens = jnp.asarray(rng.integers(0, V - 1, (2, 40)), jnp.int32)
    length, how = jnp.full(2, 40), (jnp.float32(0), jnp.int32(0), jnp.float32(1))

    def empty():
        caches = {
            "target_cache": config.target_step.init_cache(2, 40),
            "drafter_cache": init_kv_cache(DRAFTER, 2, 40, jnp.float32),
        }
        return init_state(tokens, length, length + 1, jax.random.split(jax.random.key(0), 2), how, **caches)

    whole = prefill(*models, empty(), config=config, chunk_size=40)
    part = prefill(*models, dataclasses.replace(empty(), length=jnp.full(2, 21)), config=config, chunk_size=20)
    part = prefill(*models, dataclasses.replace(part, length=length), config=config, chunk_size=32, begin=20)
    for name in ("target_cache", "drafter_cache"):
        found, expected = (jax.tree.map(lambda x: x[..., :39, :], getattr(state, name)) for state in (part, whole))
        assert tiny.largest_difference(found, expected) < 1e-5


def test_a_recurrent_target_decodes_exactly():
    params, drafter = recurrent_model()
    drafter_params = sharpened(init_drafter(drafter, jax.random.key(2)))
    config = Decoding(target_step=RecurrentStep(), drafter=drafter, target_head=recurrent_head)
    asked = prompts(6, seed=9)
    found = generate(drafter_params, params, asked, config=config, max_new_tokens=16, batch_size=4)
    for prompt, g in zip(asked, found, strict=True):
        state, text = np.zeros(D), list(prompt)
        for i in range(len(prompt) + 16):
            state = np.tanh(np.asarray(params["embedding"])[text[i]] + state @ np.asarray(params["recurrent"]))
            if i >= len(prompt) - 1:
                text.append(int(np.argmax(state @ np.asarray(params["head"]))))
        assert g.tokens == text[len(prompt) : len(prompt) + 16]


def test_a_recurrent_targets_features_train_a_drafter():
    from specauf_jax.training.blocks import Batch
    from specauf_jax.training.loss import LossConfig, loss_fn

    params, drafter = recurrent_model()
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, V - 1, (2, 24)), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(24, dtype=jnp.int32), (2, 24))
    _, features, _ = RecurrentStep()(params, tokens, positions, RecurrentStep().init_cache(2, 24, jnp.float32))
    batch = Batch(tokens=tokens, loss_mask=jnp.ones((2, 24), bool), document_ids=jnp.ones_like(tokens),
                  positions=positions, features=features)  # fmt: skip
    config = LossConfig(drafter=drafter, objective=c.Objective("auf"), num_anchors=6)
    drafter_params = init_drafter(drafter, jax.random.key(0))
    grad = jax.jit(jax.value_and_grad(functools.partial(loss_fn, config=config), has_aux=True))
    (loss, aux), grads = grad(drafter_params, recurrent_head(params), batch, jax.random.key(1))
    chex.assert_tree_all_finite((loss, grads))
    assert aux.final.blocks == 12 and loss > 0
    stepped = jax.tree.map(lambda p, g: p - 0.1 * g, drafter_params, grads)
    assert grad(stepped, recurrent_head(params), batch, jax.random.key(1))[0][0] < loss


# Training meets decoding -------------------------------------------------------------------------


def test_training_logits_equal_decoding_logits(models):
    """Same anchor, same weights: what is trained is what is served (relative 1e-5)."""
    from specauf_jax.decoding.speculate import propose
    from specauf_jax.training.blocks import Batch, make_blocks
    from specauf_jax.training.loss import LossConfig, block_hidden

    drafter_params, target_params = models
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, V - 1, (2, 24)), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(24, dtype=jnp.int32), (2, 24))
    ones = jnp.ones_like(tokens)
    layer_ids = DRAFTER.target_layer_ids
    features = target_features(target_params, tokens, positions, ones, config=TARGET, layer_ids=layer_ids)
    batch = Batch(tokens=tokens, loss_mask=ones > 0, document_ids=ones, positions=positions, features=features)
    anchors = jnp.array([[0, 7, 15], [1, 9, 20]])
    blocks = make_blocks(batch, anchors, anchors >= 0, config=DRAFTER)
    head, loss = target_head(target_params), LossConfig(drafter=DRAFTER, objective=c.Objective())
    trained = (block_hidden(drafter_params, head, batch, blocks, config=loss) @ head.lm_head)[:, :, 1:]
    config = decoding()
    for i in range(3):
        length = anchors[:, i] + 1
        state = init_state(tokens, length, length + 1, jax.random.split(jax.random.key(0), 2),
                           (jnp.float32(0), jnp.int32(0), jnp.float32(1)),
                           target_cache=config.target_step.init_cache(2, 40, jnp.float32),
                           drafter_cache=init_kv_cache(DRAFTER, 2, 40, jnp.float32))  # fmt: skip
        state = prefill(drafter_params, target_params, state, config=config)
        anchor = jnp.take_along_axis(tokens, anchors[:, i : i + 1], axis=1)
        served = propose(drafter_params, target_params, state, anchor, state.keys, config=config).logits
        np.testing.assert_allclose(served, trained[:, i], rtol=1e-5, atol=1e-5 * float(jnp.abs(served).max()))
