"""A mixture of experts in the place of a layer's MLP: every token meets the few that its router chooses.

No token is dropped. The choices of all tokens lie in the order of their experts, and `jax.lax.ragged_dot` (on TPU a
kernel of its own) multiplies each stretch by its expert's matrices. On a mesh, experts are spread over `tensor`: each
device computes what its own experts have to say of its rows, and one sum brings that together.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from specauf_jax.parts import Experts
from specauf_jax.sharding import experts_spec, mesh_of, per_device, rows_spec


class SparseMLP(nnx.Module):
    """Parameters under Hugging Face's names; the experts' matrices are stacked."""

    def __init__(self, config, *, rngs: nnx.Rngs):
        self.config: Experts = config.experts
        limited, normal = self.config.swiglu_limit is not None, nnx.initializers.normal(0.02)
        router = nnx.Linear(
            config.hidden_size, self.config.num_experts, use_bias=limited, kernel_init=normal, rngs=rngs
        )
        self.router: nnx.Linear | None = router if limited else None
        self.gate: nnx.Linear | None = None if limited else router
        self.experts = expert_matrices(config.hidden_size, self.config, rngs)

    @jax.named_scope("experts")
    def __call__(self, x):
        """`[B, T, D]` → `[B, T, D]`."""
        weights, chosen = route((self.gate or self.router)(x), self.config)
        matrices = jax.tree.map(lambda param: param[...], nnx.to_pure_dict(nnx.state(self.experts, nnx.Param)))
        mesh = mesh_of(x)
        rows, spread = rows_spec(mesh, len(x)), experts_spec(mesh, self.config.num_experts)
        mixed = functools.partial(mix_experts, config=self.config, axis="tensor" if spread[0] else None)
        return per_device(mixed, mesh, (rows, rows, rows, spread), rows)(x, weights, chosen, matrices)


def expert_matrices(D: int, config: Experts, rngs: nnx.Rngs) -> nnx.Dict:
    """gate_proj and up_proj `[X, D, F]`, down_proj `[X, F, D]`.

    Of gpt-oss gate_up_proj `[X, D, 2F]` in place of the first two, whose numbers take turns, and biases.
    """
    X, F = config.num_experts, config.moe_intermediate_size
    limited = config.swiglu_limit is not None
    sizes = {"gate_up_proj": (D, 2 * F)} if limited else {"gate_proj": (D, F), "up_proj": (D, F)}
    sizes["down_proj"] = (F, D)

    def matrices(shape):
        param = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (X, *shape)))
        return param if limited else nnx.Dict(kernel=param)

    found = {name: matrices(shape) for name, shape in sizes.items()}
    biases = {f"{name}_bias": nnx.Param(jnp.zeros((X, shape[1]))) for name, shape in sizes.items() if limited}
    return nnx.Dict(found | biases)


def route(logits: jax.Array, config: Experts) -> tuple[jax.Array, jax.Array]:
    """The experts of each token.

    Args:
      logits: `[..., X]`, of the router.
      config: how many are chosen, and whether their weights are brought to 1.

    Returns:
      their weights, in the precision of the logits, and int32 indices, `[..., k]` each.
    """
    weights, chosen = lax.top_k(jax.nn.softmax(logits.astype(jnp.float32)), config.num_experts_per_tok)
    if config.norm_topk_prob:
        weights /= weights.sum(axis=-1, keepdims=True)
    return weights.astype(logits.dtype), chosen


def mix_experts(x, weights, chosen, matrices: dict, *, config: Experts, axis: str | None = None) -> jax.Array:
    """Σ_j weight_j · down_j(silu(gate_j(x)) · up_j(x)) over each token's chosen experts.

    Args:
      x: `[B, T, D]`.
      weights: `[B, T, k]`.
      chosen: int32 `[B, T, k]`, of all experts.
      matrices: as of `expert_matrices`; where `axis` is given, this device's part of all experts.
      config: what they compute.
      axis: of the mesh, that experts are spread over.

    Returns:
      `[B, T, D]`.
    """
    k, own = chosen.shape[-1], chosen.reshape(-1)
    X = len(jax.tree.leaves(matrices)[0])
    if axis is not None:
        own = own - lax.axis_index(axis) * X
        own = jnp.where((own >= 0) & (own < X), own, X)  # others' come last, and no expert here sees them
    order = jnp.argsort(own)
    sizes = jnp.bincount(own, length=X).astype(jnp.int32)
    rows = x.reshape(-1, x.shape[-1])[order // k]

    def product(name: str, rows):
        result = lax.ragged_dot(rows, jax.tree.leaves(matrices[name])[0], sizes)
        bias = matrices.get(f"{name}_bias")
        return result if bias is None else result + bias[jnp.minimum(own[order], X - 1)]

    if config.swiglu_limit is None:
        inner = jax.nn.silu(product("gate_proj", rows)) * product("up_proj", rows)
    else:
        inner = _limited(product("gate_up_proj", rows), config.swiglu_limit)
    said = product("down_proj", inner)[jnp.argsort(order)]
    if axis is not None:
        said = jnp.where((own < X)[:, None], said, 0)
    mixed = (weights[..., None] * said.reshape(*chosen.shape, -1)).sum(axis=-2)
    return mixed if axis is None else lax.psum(mixed, axis)


def _limited(both, most: float):
    """What an expert of gpt-oss multiplies with down_proj, `[M, F]`, of gates and values in turn, `[M, 2F]`."""
    gate, up = jnp.minimum(both[..., ::2], most), jnp.clip(both[..., 1::2], -most, most)
    return gate * jax.nn.sigmoid(1.702 * gate) * (up + 1)
