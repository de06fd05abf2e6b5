"""Operations with a backward pass of their own: the numbers of autodiff, fewer bytes."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specauf_jax.models.layers import float_dtype, gated, product


def arrays(*shapes, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return [jnp.asarray(3 * rng.normal(size=shape), dtype) for shape in shapes]


def value_and_gradients(run, *arguments):
    value, pull = jax.vjp(run, *arguments)
    [cotangent] = arrays(value.shape, dtype=value.dtype)
    return value, *pull(cotangent)


def plain_gate(gate, up):
    return jax.nn.silu(gate) * up


def plain_product(x, kernel):
    return jnp.einsum("...d,df->...f", x, kernel)


CASES = {
    "gated": (gated, plain_gate, ((2, 5, 7), (2, 5, 7))),
    "product": (product, plain_product, ((2, 5, 7), (7, 3))),
    "product of one vector": (product, plain_product, ((7,), (7, 3))),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_and_gradients_are_those_of_autodiff(case, dtype):
    ours, plain, shapes = CASES[case]
    found, expected = (value_and_gradients(run, *arrays(*shapes, dtype=dtype)) for run in (ours, plain))
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype == dtype
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        np.testing.assert_allclose(a, b, rtol=0, atol=(1e-6 if dtype == "float32" else 2e-2) * np.abs(b).max())


def test_a_gate_far_from_zero_has_a_finite_gradient():
    gate = jnp.array([-1e4, -100.0, 0.0, 100.0, 1e4])
    found = value_and_gradients(gated, gate, jnp.ones_like(gate))
    expected = value_and_gradients(plain_gate, gate, jnp.ones_like(gate))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_the_gate_keeps_its_two_arguments_and_nothing_else():
    def kept(run):
        _, pull = jax.eval_shape(functools.partial(jax.vjp, run), *arrays((4, 6), (4, 6)))
        return sum(math.prod(x.shape) for x in jax.tree.leaves(pull))

    assert kept(gated) == 2 * 24 < kept(plain_gate)


def test_the_compute_precision_is_that_of_the_first_real_numbers():
    """A caller's own parameters may begin with whole ones."""
    assert float_dtype({"a_table": jnp.zeros(3, jnp.int32), "w": jnp.zeros(2, jnp.bfloat16)}) == jnp.bfloat16
