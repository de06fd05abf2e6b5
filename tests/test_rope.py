"""Rotary frequencies against the papers' formulas, one frequency at a time in float64."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from specauf_jax.models.rope import _by_halves, _by_product, apply_rope, rope_angles, rope_frequencies
from specauf_jax.parts import RopeScaling

LLAMA = RopeScaling(
    "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
)
SCALINGS = {
    "default": RopeScaling(),
    "linear": RopeScaling("linear", factor=2.5),
    "llama3": LLAMA,
    "llama3, of 3.2": dataclasses.replace(LLAMA, factor=32.0),
    "llama3, other bounds": dataclasses.replace(LLAMA, low_freq_factor=0.5, high_freq_factor=9.0),
    "llama3, length of the model": dataclasses.replace(LLAMA, original_max_position_embeddings=None),
    "yarn": RopeScaling("yarn", factor=4.0, original_max_position_embeddings=32_768),
    "yarn, length of the model": RopeScaling("yarn", factor=2.0),
    "yarn, untruncated": RopeScaling("yarn", factor=4.0, original_max_position_embeddings=4096, truncate=False),
    "yarn, other bounds": RopeScaling(
        "yarn", factor=40.0, original_max_position_embeddings=4096, beta_fast=16.0, beta_slow=2.0
    ),
    "yarn, of a text shorter than a wave": RopeScaling("yarn", factor=4.0, original_max_position_embeddings=128),
}
SHAPES = [(128, 1e6), (64, 5e5), (8, 1e4)]  # head_dim and rope_theta of Qwen3, of Llama 3.2 1B, and of the tests


def model(E, theta, scaling):
    return tiny.target_config(head_dim=E, rope_theta=theta, rope_scaling=scaling, max_position_embeddings=40_960)


def frequency_by_hand(i, E, theta, scaling, max_positions):
    """Radians per position of the i-th of E/2 pairs."""
    plain = theta ** (-2 * i / E)
    if scaling.rope_type == "default":
        return plain
    if scaling.rope_type == "linear":  # positions are divided
        return plain / scaling.factor
    length = scaling.original_max_position_embeddings or max_positions
    if scaling.rope_type == "llama3":
        turns = length / (2 * math.pi / plain)  # over the pretraining length
        if turns < scaling.low_freq_factor:
            return plain / scaling.factor
        if turns > scaling.high_freq_factor:
            return plain
        smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        return (1 - smooth) * plain / scaling.factor + smooth * plain
    # YaRN, as its authors' code has it: the ramp is linear in i, between the pairs that turn beta times.
    bounds = []
    for beta in (scaling.beta_fast, scaling.beta_slow):
        bounds.append(E / 2 * math.log(length / (2 * math.pi * beta)) / math.log(theta))
    low, high = bounds
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, E - 1)
    if low == high:
        high += 0.001
    ramp = min(max((i - low) / (high - low), 0), 1)
    return plain / scaling.factor * ramp + plain * (1 - ramp)


@pytest.mark.parametrize(("E", "theta"), SHAPES)
@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_frequencies_equal_the_formulas(scaling, E, theta):
    found, amplitude = rope_frequencies(model(E, theta, scaling))
    expected = [frequency_by_hand(i, E, theta, scaling, 40_960) for i in range(E // 2)]
    assert found.dtype == np.float32 and found.shape == (E // 2,)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    by_hand = 0.1 * math.log(scaling.factor) + 1 if scaling.rope_type == "yarn" else 1.0
    assert amplitude == pytest.approx(by_hand, rel=1e-12)
    if E == 128 and scaling.rope_type in ("llama3", "yarn"):
        # Left alone, stretched whole, and between: all three occur.
        stretch = np.array([theta ** (-2 * i / E) for i in range(E // 2)]) / found
        assert stretch.max() == pytest.approx(scaling.factor, rel=1e-6)
        assert ((stretch > 1.01) & (stretch < 0.99 * scaling.factor)).any()
        assert stretch.min() == pytest.approx(1, rel=1e-6)


def test_frequencies_of_llama_3_1():
    """Pairs 0 to 28 turn more than 4 times in 8192 positions, those from 35 less than once."""
    config = model(128, 5e5, LLAMA)
    found, _ = rope_frequencies(config)
    plain, _ = rope_frequencies(dataclasses.replace(config, rope_scaling=RopeScaling()))
    stretch = plain / found
    np.testing.assert_array_equal(found[:29], plain[:29])
    np.testing.assert_array_equal(found[35:], plain[35:] / 8)
    assert (np.diff(stretch[28:36]) > 0).all()
    np.testing.assert_allclose(found[[0, 63]], [1.0, 1 / (8 * 5e5 ** (126 / 128))], rtol=1e-6)
    # Pair 32: 1 / sqrt(5e5) turns 1.843848 times, which keeps 0.281283 of it and an eighth of the rest.
    np.testing.assert_allclose(found[32] * math.sqrt(5e5), 0.281283 + (1 - 0.281283) / 8, rtol=1e-5)


def test_amplitudes_of_yarn():
    def amplitude(**changes):
        return rope_frequencies(model(8, 1e4, RopeScaling("yarn", **changes)))[1]

    assert amplitude(factor=4.0) == pytest.approx(1.1386294361)
    assert amplitude(factor=40.0) == pytest.approx(1.3688879454)
    assert amplitude(factor=1.0) == 1
    assert amplitude(factor=0.5) == 1
    assert amplitude(factor=4.0, attention_factor=1.25) == 1.25
    assert amplitude(factor=40.0, mscale=1.0, mscale_all_dim=1.0) == 1
    assert amplitude(factor=40.0, mscale=0.707, mscale_all_dim=1.0) == pytest.approx(1.2608037774 / 1.3688879454)


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_angles_of_long_positions(scaling):
    """Against float64 with the float32 frequency as it is: what float32 loses by the product stays below 2e-3."""
    config = model(128, 1e6, scaling)
    frequencies, amplitude = rope_frequencies(config)
    positions = np.array([[0, 1, 1000, 8191], [32_765, 32_766, 32_767, 40_959 % 32_768]])
    cos, sin = jax.jit(lambda x: rope_angles(x, config))(positions)
    assert cos.shape == sin.shape == (2, 4, 1, 64) and cos.dtype == sin.dtype == jnp.float32
    exact = positions[..., None, None] * np.float64(frequencies)
    assert exact.max() > 10_000
    np.testing.assert_allclose(np.hypot(cos, sin), np.full(exact.shape, amplitude), rtol=1e-5)
    turned = np.exp(1j * exact) * (np.asarray(cos) - 1j * np.asarray(sin)) / amplitude
    assert np.abs(np.angle(turned)).max() < 2e-3


@pytest.mark.parametrize("form", [_by_product, _by_halves])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_both_forms_round_once(dtype, form):
    """Values against the definition in float64; the gradient of a TPU's form too, which autodiff would round more."""
    x, cotangent = jax.random.normal(jax.random.key(0), (2, 3, 7, 4, 16), dtype)
    angles = jax.random.uniform(jax.random.key(1), (3, 7, 1, 8))
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    found, pull = jax.vjp(lambda x: jax.jit(form)(x, cos, sin), x)
    turns = np.asarray(cos, np.float64) + 1j * np.asarray(sin, np.float64)
    rounding = {"rtol": jnp.finfo(dtype).eps, "atol": 1e-6}

    def check(found, start, turns):
        left, right = np.split(np.asarray(start, np.float64), 2, axis=-1)
        end = (left + 1j * right) * turns
        np.testing.assert_allclose(np.asarray(found, np.float64), np.concatenate([end.real, end.imag], -1), **rounding)

    check(found, x, turns)
    if form is _by_product:
        (gradient,) = pull(cotangent)
        assert gradient.dtype == found.dtype == dtype
        check(gradient, cotangent, turns.conj())


def test_rotation_pairs_each_element_with_the_one_half_a_head_away():
    config = model(8, 1e4, RopeScaling("yarn", factor=4.0, original_max_position_embeddings=64))
    frequencies, amplitude = rope_frequencies(config)
    x = np.random.default_rng(0).normal(size=(3, 2, 8)).astype(np.float32)
    turned = apply_rope(jnp.asarray(x), rope_angles(jnp.array([0, 5, 300]), config))
    for row, position in enumerate((0, 5, 300)):
        for i in range(4):
            pair = (x[row, :, i] + 1j * x[row, :, i + 4]) * np.exp(1j * position * float(frequencies[i])) * amplitude
            np.testing.assert_allclose(turned[row, :, i], pair.real, atol=1e-4)
            np.testing.assert_allclose(turned[row, :, i + 4], pair.imag, atol=1e-4)
    assert apply_rope(jnp.asarray(x, jnp.bfloat16), rope_angles(jnp.array([0, 5, 300]), config)).dtype == jnp.bfloat16
