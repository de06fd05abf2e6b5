"""Prompt lookup: its drafts against a plain search, its decoding against the target alone."""

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from specauf_jax.config import Sampling
from specauf_jax.decoding.baselines import PromptLookup, look_up
from specauf_jax.decoding.generate import generate
from specauf_jax.decoding.state import Decoding
from specauf_jax.models.target import TargetStep

TARGET = tiny.target_config()
STEP = TargetStep(TARGET, (0,))


def searched(text: list[int], longest: int, count: int) -> list[int]:
    """Longest first, latest first: by slicing lists."""
    for n in range(min(longest, len(text) - 1), 0, -1):
        for end in range(len(text) - 1, n - 1, -1):
            if text[end - n : end] == text[-n:]:
                following = text[end:]
                return [following[i % len(following)] for i in range(count)]
    return [text[-1]] * count


def test_drafts_by_hand():
    tokens = jnp.array([[1, 2, 3, 9, 1, 2, 4, 1, 2], [5, 6, 7, 5, 0, 5, 6, 7, 5]])
    found = look_up(tokens, jnp.array([9, 4]), config=PromptLookup(block_size=5, longest=2))
    assert found.tolist() == [[4, 1, 2, 4], [6, 7, 5, 6]]  # what lies behind a row's end (0 5 6 …) is not seen


@pytest.mark.parametrize("longest", [1, 2, 3])
def test_drafts_equal_those_of_a_plain_search(longest):
    rng = np.random.default_rng(longest)
    length = rng.integers(1, 25, 300)
    tokens = rng.integers(0, 4, (300, 24))
    found = look_up(jnp.asarray(tokens), jnp.asarray(length), config=PromptLookup(block_size=6, longest=longest))
    for row, n, drafts in zip(tokens.tolist(), length, found.tolist(), strict=True):
        assert drafts == searched(row[:n], longest, 5)


def asked(count: int) -> list[list[int]]:
    rng = np.random.default_rng(3)
    return [rng.integers(1, 5, n).tolist() for n in rng.integers(1, 20, count)]


def test_greedy_text_is_the_targets_own():
    params = tiny.target_params()
    alone = generate(None, params, asked(8), config=Decoding(STEP), max_new_tokens=40, batch_size=4)
    for longest in (1, 3):
        config = Decoding(STEP, PromptLookup(block_size=4, longest=longest))
        found = generate(None, params, asked(8), config=config, max_new_tokens=40, batch_size=4)
        assert [g.tokens for g in found] == [g.tokens for g in alone]
        accepted = [a for g in found for a in g.accepted]
        assert {0, 3} <= set(accepted) <= set(range(4))
        for g in found:  # accepted as the search says, round by round
            text, end = g.prompt + g.tokens, len(g.prompt)
            for a in g.accepted:
                drafts = searched(text[:end], longest, 3)
                agreed = [x == y for x, y in zip(drafts, text[end:], strict=False)] + [False] * 4
                assert agreed.index(False) == min(a, len(text) - end)
                end += a + 1


def test_sampled_text_follows_the_targets_law():
    """First two tokens of many draws, with and without drafts: total variation within sampling noise."""
    params, count = tiny.target_params(), 4096
    prompts = [[1, 2, 1, 2, 1]] * count
    sampling = Sampling(temperature=1.0)
    common = dict(max_new_tokens=2, sampling=sampling, batch_size=count)
    shares = []
    for config, seed in ((Decoding(STEP, PromptLookup(4, 2)), 0), (Decoding(STEP), 1), (Decoding(STEP), 2)):
        found = generate(None, params, prompts, config=config, seed=seed, **common)
        pairs = np.asarray([g.tokens for g in found]) @ [TARGET.vocab_size, 1]
        shares.append(np.bincount(pairs, minlength=TARGET.vocab_size**2) / count)
        if config.drafter:
            assert {g.accepted[0] for g in found} >= {0, 1}  # drafts were both kept and thrown away
    looked_up, alone, again = shares
    assert np.abs(looked_up - alone).sum() < 1.5 * np.abs(again - alone).sum()


def test_no_model_takes_part():
    config = Decoding(STEP, PromptLookup())
    assert config.model is None and config.block_size == 8
    assert Decoding(STEP, tiny.drafter_config()).model == tiny.drafter_config() and Decoding(STEP).model is None
