"""Measures of decoding, by hand."""

import dataclasses

import pytest

from specauf_jax.decoding.generate import Generation
from specauf_jax.evaluation.measure import (
    acceptance_measures,
    alpha,
    calibration,
    in_loop,
    outside_loops,
    tau_macro,
    tau_micro,
)


def test_tau_micro_weighs_rounds_and_macro_weighs_prompts():
    accepted = [[3, 1], [0, 0, 0, 0], []]
    assert tau_micro(accepted) == pytest.approx((4 + 2 + 4) / 6)
    assert tau_macro(accepted) == pytest.approx((3 + 1) / 2)
    assert tau_micro([[], []]) is None and tau_macro([]) is None


def test_alpha_is_conditional_on_getting_that_far():
    accepted = [[3, 1, 0], [2]]  # of 4 rounds 3 accept a first draft, 2 a second, 1 a third
    assert alpha(accepted, block_size=4) == [3 / 4, 2 / 3, 1 / 2]
    assert alpha([[0, 0]], block_size=4) == [0.0, None, None]


def test_a_loop_is_a_period_of_at_most_16_over_16_tokens():
    assert in_loop([7] * 17)  # period 1 needs one token before the 16
    assert not in_loop([7] * 16)
    assert in_loop(list(range(16)) * 2)  # period 16
    assert not in_loop(list(range(17)) * 2)  # period 17
    assert not in_loop(list(range(16)) * 2 + [99])
    assert in_loop([1, 2, 3] + [5, 6] * 9)


def test_rounds_that_start_in_a_loop_are_left_out():
    prompt, tokens = list(range(100, 120)), [7] * 40
    # Anchors after 0, 4, …: the text ends in 17 sevens from the round whose anchor is the 17th on.
    accepted = [3] * 10
    assert outside_loops(prompt, tokens, accepted) == [3] * 5  # anchors after 0, 4, 8, 12, 16 sevens


def test_acceptance_measures_of_two_prompts():
    generations = [
        Generation(prompt=[1], tokens=[2, 3, 4, 5, 6], accepted=[3, 1]),  # a stop cut the second round's last token
        Generation(prompt=[1], tokens=[2], accepted=[0]),
    ]
    assert acceptance_measures(generations, block_size=4) == {
        "tau_micro": pytest.approx(7 / 3),
        "tau_macro": 2.0,
        "tau_outside_loops": pytest.approx(7 / 3),
        "alpha": [2 / 3, 0.5, 1.0],
        "calibration": None,
        "rounds": 3,
        "tokens": 6,
        "prompts": 2,
    }
    sure = [
        dataclasses.replace(generations[0], survival=[1.5, 1.0, 0.5]),
        dataclasses.replace(generations[1], survival=[0.9, 0.5, 0.25]),
    ]
    assert calibration(sure) == {
        "predicted": [pytest.approx(0.8), pytest.approx(0.5), pytest.approx(0.25)],
        "observed": [pytest.approx(2 / 3), pytest.approx(1 / 3), pytest.approx(1 / 3)],
    }
    turns = acceptance_measures(generations, block_size=4, prompts=[5, 5])
    assert (turns["tau_macro"], turns["prompts"]) == (pytest.approx(7 / 3), 1)
