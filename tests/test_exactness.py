"""Exactness told apart from rounding: a tie, a mismatch, and what results files say of them."""

import dataclasses

import jax.numpy as jnp
import pytest
import tiny

from specauf_jax.decoding.baselines import PromptLookup
from specauf_jax.decoding.generate import Generation, generate
from specauf_jax.decoding.state import Decoding
from specauf_jax.evaluation.exactness import Comparison, compare, said
from specauf_jax.models.layers import KVCache
from specauf_jax.models.target import TargetStep

TARGET = tiny.target_config()
PROMPTS = [[3, 5, 2, 7], [1, 2, 3, 1, 2], [4, 4, 9]]


@dataclasses.dataclass(frozen=True)
class Tied:
    """A target of which a second token is as good as the best one, but for rounding, at every fifth position."""

    inner: TargetStep
    rounding: float

    def __call__(self, params, tokens, positions, cache):
        logits, taps, cache = self.inner(params, tokens, positions, cache)
        other = (jnp.argmax(logits, -1) + 1) % logits.shape[-1]
        second = jnp.arange(logits.shape[-1]) == other[..., None]
        shift = self.rounding if tokens.shape[1] > 1 else -self.rounding
        here = second & (positions % 5 == 3)[..., None]
        return jnp.where(here, logits.max(-1, keepdims=True) + shift, logits), taps, cache

    def init_cache(self, *args):
        return self.inner.init_cache(*args)


@dataclasses.dataclass(frozen=True)
class Corrupted:
    """A target that loses what it read at one position when it reads several tokens at one time."""

    inner: TargetStep

    def __call__(self, params, tokens, positions, cache):
        logits, taps, cache = self.inner(params, tokens, positions, cache)
        if tokens.shape[1] > 1:
            cache = KVCache(k=cache.k.at[:, :, :, 6].set(3.0), v=cache.v.at[:, :, :, 6].set(-3.0))
        return logits, taps, cache

    def init_cache(self, *args):
        return self.inner.init_cache(*args)


def compared(written_by, read_by) -> Comparison:
    """Speculation with one target step against the text of `read_by` alone, judged by the latter."""
    params = tiny.target_params(TARGET)
    speculative = Decoding(target_step=written_by, drafter=PromptLookup(4))
    alone = Decoding(target_step=read_by)
    texts = [generate(None, params, PROMPTS, config=config, max_new_tokens=24, batch_size=4)
             for config in (speculative, alone)]  # fmt: skip
    assert texts[0] != texts[1] or written_by == read_by
    return compare(*texts, params, dataclasses.replace(speculative, target_step=read_by), 4, None)


STEP = TargetStep(TARGET, (1,))


def test_the_same_texts():
    assert compared(STEP, STEP) == Comparison(compared=3)


def test_a_tie_is_counted_and_exact():
    found = compared(Tied(STEP, 4e-6), Tied(STEP, 4e-6))
    assert found.mismatches == 0 and len(found.gaps) == 3
    results = found.results()
    assert results["exact"] is True and results["ties"] == 3
    assert 2e-6 < results["largest_tie_gap"] < 8e-6
    assert said(results) == f"exact, ties: 3, largest gap {results['largest_tie_gap']:.1g}"


def test_what_is_too_far_apart_for_rounding_is_no_tie():
    """Two readings that differ by more than float32 can are no excuse."""
    found = compared(Tied(STEP, 0.1), Tied(STEP, 0.1))
    assert found.gaps == () and found.mismatches == 3


@pytest.mark.parametrize("judge", [STEP, Corrupted(STEP)], ids=["sound", "corrupted"])
def test_a_corrupted_cache_is_a_mismatch(judge):
    found = compared(Corrupted(STEP), judge)
    assert found.gaps == () and found.mismatches > 0
    assert found.results()["exact"] is False and "DIFFER" in said(found.results())


def test_tokens_that_are_not_the_two_best_are_a_mismatch():
    params, config = tiny.target_params(TARGET), Decoding(target_step=STEP, drafter=PromptLookup(4))
    [text] = generate(None, params, PROMPTS[:1], config=config, max_new_tokens=6)
    worse = Generation(text.prompt, [*text.tokens[:3], (text.tokens[3] + 5) % 17, *text.tokens[4:]], [])
    assert compare([worse], [text], params, config, 1, None) == Comparison(1, 1)
    shorter = Generation(text.prompt, text.tokens[:-1], [])
    assert compare([shorter], [text], params, config, 1, None) == Comparison(1, 1)


def test_sums_of_comparisons():
    total = Comparison(3, 1, (1e-6,)) + Comparison(2, 0, (3e-6,))
    assert total == Comparison(5, 1, (1e-6, 3e-6))
    assert said(Comparison().results()) == "sampled"
