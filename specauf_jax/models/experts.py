"""A mixture of experts in the place of a layer's MLP (Qwen3-MoE): every token meets the few that its router chooses.

No token is dropped. The choices of all tokens lie in the order of their experts, and `jax.lax.ragged_dot` (on TPU a
kernel of its own) multiplies each stretch by its expert's matrices. On a mesh, experts are spread over `tensor`: each
device computes what its own experts have to say of its rows, and one sum brings that together.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from specauf_jax.architecture import Experts
from specauf_jax.sharding import experts_spec, mesh_of, per_device, rows_spec


class SparseMLP(nnx.Module):
    """Parameters under Hugging Face's names; the experts' matrices are stacked."""

    def __init__(self, config, *, rngs: nnx.Rngs):
        normal = nnx.initializers.normal(0.02)
        self.experts = ExpertMatrices(config.hidden_size, config.experts, rngs=rngs)
        self.gate = nnx.Linear(
            config.hidden_size, config.experts.num_experts, use_bias=False, kernel_init=normal, rngs=rngs
        )
        self.config: Experts = config.experts

    @jax.named_scope("experts")
    def __call__(self, x):
        """`[B, T, D]` → `[B, T, D]`."""
        weights, chosen = route(self.gate(x), self.config)
        kernels = [m["kernel"][...] for m in (self.experts.gate_proj, self.experts.up_proj, self.experts.down_proj)]
        mesh = mesh_of(x)
        rows, spread = rows_spec(mesh, len(x)), experts_spec(mesh, self.config.num_experts)
        mixed = functools.partial(mix_experts, axis="tensor" if spread[0] else None)
        return per_device(mixed, mesh, (rows, rows, rows, spread, spread, spread), rows)(x, weights, chosen, *kernels)


class ExpertMatrices(nnx.Module):
    """gate_proj and up_proj `[X, D, F]`, down_proj `[X, F, D]`."""

    def __init__(self, D: int, config: Experts, *, rngs: nnx.Rngs):
        X, F = config.num_experts, config.moe_intermediate_size

        def matrices(shape):
            return nnx.Dict(kernel=nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), shape)))

        self.gate_proj, self.up_proj, self.down_proj = matrices((X, D, F)), matrices((X, D, F)), matrices((X, F, D))


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


def mix_experts(x, weights, chosen, gate, up, down, axis: str | None = None) -> jax.Array:
    """Σ_j weight_j · down_j(silu(gate_j(x)) · up_j(x)) over each token's chosen experts.

    Args:
      x: `[B, T, D]`.
      weights: `[B, T, k]`.
      chosen: int32 `[B, T, k]`, of all experts.
      gate, up, down: `[X, D, F]` twice and `[X, F, D]`; where `axis` is given, this device's part of all experts.
      axis: of the mesh, that experts are spread over.

    Returns:
      `[B, T, D]`.
    """
    X, k, own = len(gate), chosen.shape[-1], chosen.reshape(-1)
    if axis is not None:
        own = own - lax.axis_index(axis) * X
        own = jnp.where((own >= 0) & (own < X), own, X)  # others' come last, and no expert here sees them
    order = jnp.argsort(own)
    sizes = jnp.bincount(own, length=X).astype(jnp.int32)
    rows = x.reshape(-1, x.shape[-1])[order // k]
    inner = jax.nn.silu(lax.ragged_dot(rows, gate, sizes)) * lax.ragged_dot(rows, up, sizes)
    said = lax.ragged_dot(inner, down, sizes)[jnp.argsort(order)]
    if axis is not None:
        said = jnp.where((own < X)[:, None], said, 0)
    mixed = (weights[..., None] * said.reshape(*chosen.shape, -1)).sum(axis=-2)
    return mixed if axis is None else lax.psum(mixed, axis)
