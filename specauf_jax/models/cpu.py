"""What XLA on CPUs needs to be fast: parameters in serving form, and two operations with a backward pass of their own.

Serving form: each layer's parameters by themselves, matrices with their outputs first. Decoding takes it through
`serving_params`, which leaves parameters as they are on other devices; the two operations give everywhere what autodiff
gives, with fewer bytes.
"""

import jax
from flax import nnx
from jax import lax


def serving_params(params: dict) -> dict:
    """Parameters of a target or drafter as this machine decodes fastest with them: in serving form on CPUs, else as
    they are. Every function that decodes takes either form.

    A round multiplies few rows by every matrix, so that reading the weights is nearly all of its time. On CPUs a
    layer taken out of a stack is a copy (three times the traffic), and a product of few rows is 2 to 4 times
    faster with the outputs in front (each core then walks through its own rows of the matrix, nothing is packed).
    Training keeps the stacked form, whose compile time does not grow with depth.
    """

    if jax.default_backend() != "cpu" or "linear" in params["layers"]:  # periods of layers stay together
        return params

    def turned(path, x):
        names = [key.key for key in path]
        turns = names[-1] == "kernel" and names[0] in ("layers", "fc", "lm_head") and "experts" not in names
        return x.T if turns else x

    layers = params["layers"]
    count = jax.tree.leaves(layers)[0].shape[0]
    apart = {i: jax.tree.map(lambda p, i=i: p[i], layers) for i in range(count)}
    return jax.tree_util.tree_map_with_path(turned, params | {"layers": apart})


def is_serving(params: dict) -> bool:
    """Whether parameters are in serving form."""
    return 0 in params["layers"]


def turn_products(model: nnx.Module) -> None:
    """Let a module's products take matrices in serving form."""
    for _, module in nnx.iter_modules(model):
        if isinstance(module, nnx.Linear):
            module.dot_general = _turned_dot


def few_rows(x, weight, preferred_element_type=None):
    """`[..., D]` by a matrix in serving form `[F, D]` → `[..., F]`."""
    rows = x.reshape(-1, x.shape[-1])
    product = lax.dot_general(weight, rows, (((1,), (1,)), ((), ())), preferred_element_type=preferred_element_type)
    # Without the barrier XLA swaps the factors to save the small transposition, and packs the matrix again.
    return lax.optimization_barrier(product).T.reshape(*x.shape[:-1], -1)


def _turned_dot(x, kernel, dimensions, **_):
    return few_rows(x, kernel)


@jax.custom_vjp
def gated(gate, up):
    """silu(gate) · up, all `[..., F]`; keeps both for the backward pass, where autodiff keeps four arrays."""
    return jax.nn.silu(gate) * up


def _gated_backward(saved, cotangent):
    gate, up = saved
    share = jax.nn.sigmoid(gate)
    return cotangent * up * share * (1 + gate * (1 - share)), cotangent * gate * share


gated.defvjp(lambda gate, up: (gated(gate, up), (gate, up)), _gated_backward)


@jax.custom_vjp
def product(x, kernel):
    """`[..., D]` by `[D, F]` → `[..., F]`.

    The kernel's gradient is asked for as `[D, F]` at once. Autodiff asks for `[F, D]`, and XLA on CPUs then makes a
    transposed copy of the cotangent, whose computation it fuses into that copy and runs against the memory's grain.
    """
    return lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))


def _product_backward(saved, cotangent):
    x, kernel = saved
    rows = tuple(range(x.ndim - 1))
    dx = lax.dot_general(cotangent, kernel, (((x.ndim - 1,), (1,)), ((), ())))
    return dx, lax.dot_general(x, cotangent, ((rows, rows), ((), ())))


product.defvjp(lambda x, kernel: (product(x, kernel), (x, kernel)), _product_backward)
