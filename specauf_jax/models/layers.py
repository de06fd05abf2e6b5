"""The building blocks of all targets and drafters in Flax NNX.

Modules are thin: they hold parameters and say how a token's vector is transformed. What a query
may see is the caller's business, passed in as a function. Compute precision is that of the
parameters; norms, softmax and RoPE angles are float32 inside.
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from specauf_jax.config import Remat
from specauf_jax.kernels.attention import write_entries
from specauf_jax.models.cpu import gated, is_serving, product, turn_products
from specauf_jax.models.delta import GatedDeltaNet
from specauf_jax.models.experts import SparseMLP
from specauf_jax.models.rope import apply_rope
from specauf_jax.pytrees import pytree

_PRODUCT = "product with weights"  # the name of such a result, for what is kept for the backward pass


@pytree
class KVCache:
    """Keys and values of all layers, by position.

    A row's context and what one pass reads `[N, B, T, G, E]`; caches `[N, B, G, S, E]`: a head's positions lie
    together, and S is a multiple of a tile's rows, so that TPUs read them as they lie.
    """

    k: jax.Array
    v: jax.Array


_TILE_ROWS = 16  # of bfloat16


def init_kv_cache(config, batch: int, length: int, dtype, layers: int | None = None) -> KVCache:
    """An empty cache for a `Target` or `Drafter` (or so many layers), of at least so many positions; 0 everywhere."""
    room = -(-length // _TILE_ROWS) * _TILE_ROWS
    layers = config.num_hidden_layers if layers is None else layers
    shape = (layers, batch, config.num_key_value_heads, room, config.head_dim)
    return KVCache(k=jnp.zeros(shape, dtype), v=jnp.zeros(shape, dtype))


def with_entries(cache: KVCache, new: KVCache, first, layer=0) -> KVCache:
    """A cache with entries of consecutive positions, which must be in it, in the place of what was there.

    Args:
      cache: `[N, B, G, S, E]`.
      new: `[n, B, T, G, E]`, of the layers from `layer` on.
      first: int32 `[B]`, the position of each row's first entry.
      layer: int [].
    """
    return jax.tree.map(lambda old, x: write_entries(old, x.astype(old.dtype), first, jnp.asarray(layer)), cache, new)


class CentredNorm(nnx.Module):
    """RMSNorm whose parameter is its scale less 1."""

    def __init__(self, D: int, epsilon: float, *, rngs: nnx.Rngs):
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.zeros(D))

    def __call__(self, x):
        wide = x.astype(jnp.float32)
        wide *= lax.rsqrt(jnp.square(wide).mean(axis=-1, keepdims=True) + self.epsilon)
        return (wide * (1 + self.scale[...].astype(jnp.float32))).astype(x.dtype)


def rms_norm(config, D: int, rngs: nnx.Rngs) -> nnx.Module:
    """A norm of a target's or drafter's kind."""
    kind = CentredNorm if config.block.centred else nnx.RMSNorm
    return kind(D, epsilon=config.rms_norm_eps, rngs=rngs)


class Attention(nnx.Module):
    """Projections of grouped-query attention, with what `specauf_jax.parts.Block` says of it."""

    def __init__(self, config, *, rngs: nnx.Rngs):
        D, E, block, H = config.hidden_size, config.head_dim, config.block, config.num_attention_heads
        self.head_dim, self.gated, self.scalar = E, block.gated, config.query_pre_attn_scalar
        self.q_proj = _linear(D, H * E * (1 + self.gated), rngs, block.qkv_bias)
        self.k_proj = _linear(D, config.num_key_value_heads * E, rngs, block.qkv_bias)
        self.v_proj = _linear(D, config.num_key_value_heads * E, rngs, block.qkv_bias)
        self.o_proj = _linear(H * E, D, rngs, block.output_bias)
        self.q_norm: nnx.Module | None = rms_norm(config, E, rngs) if block.qk_norm else None
        self.k_norm: nnx.Module | None = rms_norm(config, E, rngs) if block.qk_norm else None
        self.sinks: nnx.Param | None = nnx.Param(jnp.zeros(H)) if block.sinks else None

    def queries(self, x, angles):
        """`[..., D]` → `[..., H, E]`, and the gates of what heads will mix, as many; None without."""
        found = _heads(self.q_proj, x, self.head_dim * (1 + self.gated))
        queries, gates = jnp.split(found, 2, axis=-1) if self.gated else (found, None)
        queries = apply_rope(self._normed(self.q_norm, queries), angles)
        if self.scalar is not None:
            queries *= (self.head_dim / self.scalar) ** 0.5  # attention divides scores by the root of head_dim
        return queries, gates

    def keys_values(self, x, angles):
        """`[..., D]` → keys and values, `[..., G, E]` each."""
        keys, values = (_heads(project, x, self.head_dim) for project in (self.k_proj, self.v_proj))
        return apply_rope(self._normed(self.k_norm, keys), angles), values

    def output(self, mixed, gates):
        """`[..., H, E]` and their gates → `[..., D]`."""
        if gates is not None:
            mixed *= jax.nn.sigmoid(gates)
        return self.o_proj(mixed.reshape(*mixed.shape[:-2], -1))

    def _normed(self, norm, heads):
        return heads if norm is None else norm(heads)


def _heads(project, x, width: int):
    """`[..., D]` → `[..., heads, width]`."""
    found = project(x)
    if math.prod(x.shape[:-1]) < x.shape[-1]:  # to write so few tokens by head, XLA on TPUs would turn the matrix first
        found = lax.optimization_barrier(found)
    return found.reshape(*found.shape[:-1], -1, width)


class GatedMLP(nnx.Module):
    """down(activation(gate(x)) · up(x)), of width F."""

    def __init__(self, config, F: int, *, rngs: nnx.Rngs):
        D = config.hidden_size
        self.gate_proj = _linear(D, F, rngs)
        self.up_proj = _linear(D, F, rngs)
        self.down_proj = _linear(F, D, rngs)
        self.activation = config.block.activation

    def __call__(self, x):
        gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(gated(gate, up) if self.activation == "silu" else jax.nn.gelu(gate) * up)


class ExpertsMLP(SparseMLP):
    """A mixture of experts, and where the model has one the expert that every token meets."""

    def __init__(self, config, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        shared = config.experts.shared_expert_intermediate_size
        self.shared_expert: GatedMLP | None = shared and GatedMLP(config, shared, rngs=rngs)
        self.shared_expert_gate: nnx.Linear | None = shared and _linear(config.hidden_size, 1, rngs)

    def __call__(self, x):
        mixed = super().__call__(x)
        if self.shared_expert is None:
            return mixed
        return mixed + jax.nn.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x)


class SlotConvolution(nnx.Module):
    """Causal convolutions over a block's slots, of what a part of a layer reads and of what it writes (DFlash2).

    Every slot has kernels of its own: kernel[t] = base_kernel[t] + kernel_projection(h)[t], h `[..., K, D]` the normed
    input, the second one number for each group of channels. y_k = Σ_t x_{k-t} ⊙ kernel_k[t]; slots before the block
    count as 0. Training starts from the identity.
    """

    def __init__(self, D: int, taps: int, group: int, *, rngs: nnx.Rngs):
        self.group = group
        self.base_kernel = nnx.Param(jnp.zeros((2, taps, D)).at[:, 0].set(1.0))
        zeros = nnx.initializers.zeros_init()
        self.kernel_projection = nnx.Linear(D, 2 * taps * (D // group), use_bias=False, kernel_init=zeros, rngs=rngs)

    def kernels(self, h):
        """`[..., K, D]` → the two kernels of every slot, `[..., K, 2, T, D]`."""
        _, taps, D = self.base_kernel.shape
        found = self.kernel_projection(h).reshape(*h.shape[:-1], 2, taps, D // self.group)
        return self.base_kernel[...] + jnp.repeat(found, self.group, axis=-1)

    @staticmethod
    def convolve(x, kernel):
        """y of `[..., K, D]` by `[..., K, T, D]`."""
        K, taps = x.shape[-2], kernel.shape[-2]
        padded = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(taps - 1, 0), (0, 0)])
        shifted = (padded[..., taps - 1 - t : taps - 1 - t + K, :] for t in range(taps))
        return sum(x * kernel[..., t, :] for t, x in enumerate(shifted))


def _convolution(conv: SlotConvolution | None, h):
    """What a part of a layer reads in place of h, and what becomes of its output."""
    if conv is None:
        return h, lambda output: output
    kernels = conv.kernels(h)
    return conv.convolve(h, kernels[..., 0, :, :]), lambda output: conv.convolve(output, kernels[..., 1, :, :])


class DecoderLayer(nnx.Module):
    """Pre-norm Transformer layer, of linear attention if `linear`.

    With `outer_norms` four norms: before and after attention, before and after the MLP, under the names of Gemma 3.
    """

    def __init__(self, config, *, linear: bool = False, rngs: nnx.Rngs):
        D, outer = config.hidden_size, config.block.outer_norms
        self.input_layernorm = rms_norm(config, D, rngs)
        self.self_attn: Attention | None = None if linear else Attention(config, rngs=rngs)
        self.linear_attn: GatedDeltaNet | None = GatedDeltaNet(config, rngs=rngs) if linear else None
        self.post_attention_layernorm = rms_norm(config, D, rngs)
        self.pre_feedforward_layernorm: nnx.Module | None = rms_norm(config, D, rngs) if outer else None
        self.post_feedforward_layernorm: nnx.Module | None = rms_norm(config, D, rngs) if outer else None
        dense = config.experts is None
        self.mlp = GatedMLP(config, config.intermediate_size, rngs=rngs) if dense else ExpertsMLP(config, rngs=rngs)
        shape = config.convolution
        self.attention_conv: SlotConvolution | None = shape and SlotConvolution(D, *shape, rngs=rngs)
        self.mlp_conv: SlotConvolution | None = shape and SlotConvolution(D, *shape, rngs=rngs)

    def __call__(self, x, angles, attend, recur=None):
        """Args:
          x: `[..., D]`.
          angles: of x's positions.
          attend: (q, k, v of x, and the heads' sinks where there are some) → (mixed `[..., H, E]`, anything).
          recur: of linear attention, (GatedDeltaNet, its input) → (its output `[..., D]`, anything).

        Returns:
          `[..., D]`, and what `attend` or `recur` returned beside.
        """
        normed, convolved = _convolution(self.attention_conv, self.input_layernorm(x))
        if self.linear_attn is not None:
            output, beside = recur(self.linear_attn, normed)
        else:
            queries, gates = self.self_attn.queries(normed, angles)
            sinks = () if self.self_attn.sinks is None else (self.self_attn.sinks[...],)
            mixed, beside = attend(queries, *self.self_attn.keys_values(normed, angles), *sinks)
            output = self.self_attn.output(mixed, gates)
        if self.pre_feedforward_layernorm is not None:
            x = x + self.post_attention_layernorm(output)
            return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x))), beside
        x = x + convolved(output)
        normed, convolved = _convolution(self.mlp_conv, self.post_attention_layernorm(x))
        return x + convolved(self.mlp(normed)), beside


class Period(nnx.Module):
    """Layers of linear attention, stacked, and one of full attention after them (Qwen3.5, Qwen3-Next)."""

    def __init__(self, config, *, rngs: nnx.Rngs):
        count = config.hybrid.full_attention_interval - 1
        self.linear = nnx.vmap(lambda rngs: DecoderLayer(config, linear=True, rngs=rngs))(rngs.split(count))
        self.full = DecoderLayer(config, rngs=rngs)


def stack_layers(config, rngs: nnx.Rngs) -> DecoderLayer | Period:
    """All layers, or periods of them, as one module whose parameters have a leading axis."""
    kind: type = Period if config.hybrid else DecoderLayer
    return nnx.vmap(lambda rngs: kind(config, rngs=rngs))(rngs.split(config.num_hidden_layers // config.period))


def _layers_of(part: DecoderLayer | Period) -> list[DecoderLayer]:
    """In the order in which they run."""
    if isinstance(part, DecoderLayer):
        return [part]
    graphdef, params = nnx.split(part.linear)
    count = len(jax.tree.leaves(params)[0])
    return [*(nnx.merge(graphdef, jax.tree.map(lambda p, j=j: p[j], params)) for j in range(count)), part.full]


def module_of(kind: type, config, params: dict):
    """A model of class `kind` with these parameters, stacked or in serving form."""
    return nnx.merge(_graphdef(kind, config, is_serving(params)), params)


@functools.lru_cache
def _graphdef(kind: type, config, serving: bool):
    def build():
        model = kind(config, rngs=nnx.Rngs(0))
        if serving:
            model.layers = nnx.List([DecoderLayer(config, rngs=nnx.Rngs(0)) for _ in range(config.num_hidden_layers)])
            turn_products(model)
        return model

    return nnx.split(nnx.eval_shape(build))[0]


def scan_layers(body, carry, layers: DecoderLayer | Period, xs=None, remat: Remat = "none"):
    """`carry, y = body(carry, layer, x)` over all stacked layers, compiled once whatever their number.

    Under a gradient, `remat` says what is kept of each layer for the backward pass: everything, the
    products with weights ("dots"), or the layer's input alone ("layers").
    """
    if isinstance(layers, nnx.List):
        ys = []
        for i, layer in enumerate(layers):
            carry, y = body(carry, layer, jax.tree.map(lambda x, i=i: x[i], xs))
            ys.append(y)
        return carry, jax.tree.map(lambda *y: jnp.stack(y), *ys)
    graphdef, params = nnx.split(layers)

    def step(carry, inputs):
        params, x = inputs
        for layer in _layers_of(nnx.merge(graphdef, params)):
            carry, y = body(carry, layer, x)
        return carry, y

    if remat != "none":
        policies = jax.checkpoint_policies
        policy = {"dots": policies.save_only_these_names(_PRODUCT), "layers": policies.nothing_saveable}[remat]
        step = jax.checkpoint(step, policy=policy, prevent_cse=False)

    return lax.scan(step, carry, (params, xs))


def scan_first_layers(body, carry, layers: DecoderLayer | Period, count: int):
    """`carry = body(carry, layer, i)` over the first `count` layers, in place.

    Indexing inside the loop rather than slicing before it: a slice of the stacked parameters would
    be a copy of nearly the whole model. For frozen parameters; gradients want `scan_layers`.
    """
    if isinstance(layers, nnx.List):
        for i in range(count):
            carry = body(carry, layers[i], i)
        return carry
    graphdef, params = nnx.split(layers)

    def part(i) -> list[DecoderLayer]:
        return _layers_of(nnx.merge(graphdef, jax.tree.map(lambda p: p[i], params)))

    period = 1 if isinstance(layers, DecoderLayer) else jax.tree.leaves(params["linear"])[0].shape[1] + 1

    def step(carry, i):
        for j, layer in enumerate(part(i)):
            carry = body(carry, layer, i * period + j)
        return carry, None

    carry = lax.scan(step, carry, jnp.arange(count // period))[0]
    for j, layer in enumerate(part(count // period)[: count % period] if count % period else []):
        carry = body(carry, layer, count - count % period + j)
    return carry


def float_dtype(params) -> jnp.dtype:
    """Compute precision: that of the first parameter which is no whole number."""
    return next(x.dtype for x in jax.tree.leaves(params) if jnp.issubdtype(x.dtype, jnp.floating))


def cast(params, dtype):
    """Parameters in compute precision."""
    return jax.tree.map(lambda p: p.astype(dtype), params)


def _linear(inputs: int, outputs: int, rngs: nnx.Rngs, bias: bool = False) -> nnx.Linear:
    normal = nnx.initializers.normal(0.02)
    return nnx.Linear(inputs, outputs, use_bias=bias, kernel_init=normal, dot_general=_dot, rngs=rngs)


def _dot(x, kernel, dimensions, **_):
    return checkpoint_name(product(x, kernel), _PRODUCT)
