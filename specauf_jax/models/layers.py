"""The building blocks of the Qwens and Llama in Flax NNX, shared by target and drafter.

Modules are thin: they hold parameters and say how a token's vector is transformed. What a query
may see is the caller's business, passed in as a function. Compute precision is that of the
parameters; norms, softmax and RoPE angles are float32 inside.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from specauf_jax.config import Remat
from specauf_jax.kernels.attention import write_entries
from specauf_jax.models.cpu import gated, is_serving, product, turn_products
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


def init_kv_cache(config, batch: int, length: int, dtype) -> KVCache:
    """An empty cache for a `Target` or `Drafter`, of at least so many positions; 0 everywhere."""
    room = -(-length // _TILE_ROWS) * _TILE_ROWS
    shape = (config.num_hidden_layers, batch, config.num_key_value_heads, room, config.head_dim)
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


class Attention(nnx.Module):
    """Projections of grouped-query attention; Qwen3 norms queries and keys per head, Qwen2.5 has biases."""

    def __init__(self, config, *, rngs: nnx.Rngs):
        D, E, bias = config.hidden_size, config.head_dim, config.qkv_bias
        self.head_dim = E
        self.q_proj = _linear(D, config.num_attention_heads * E, rngs, bias)
        self.k_proj = _linear(D, config.num_key_value_heads * E, rngs, bias)
        self.v_proj = _linear(D, config.num_key_value_heads * E, rngs, bias)
        self.o_proj = _linear(config.num_attention_heads * E, D, rngs)
        norm = functools.partial(nnx.RMSNorm, E, epsilon=config.rms_norm_eps, rngs=rngs)
        self.q_norm: nnx.RMSNorm | None = norm() if config.qk_norm else None
        self.k_norm: nnx.RMSNorm | None = norm() if config.qk_norm else None

    def queries(self, x, angles):
        """`[..., D]` → `[..., H, E]`."""
        return apply_rope(self._normed(self.q_norm, self.q_proj(x)), angles)

    def keys_values(self, x, angles):
        """`[..., D]` → keys and values, `[..., G, E]` each."""
        return apply_rope(self._normed(self.k_norm, self.k_proj(x)), angles), self._heads(self.v_proj(x))

    def output(self, mixed):
        """`[..., H, E]` → `[..., D]`."""
        return self.o_proj(mixed.reshape(*mixed.shape[:-2], -1))

    def _normed(self, norm, x):
        heads = self._heads(x)
        return heads if norm is None else norm(heads)

    def _heads(self, x):
        return x.reshape(*x.shape[:-1], -1, self.head_dim)


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) · up(x))."""

    def __init__(self, config, *, rngs: nnx.Rngs):
        D, F = config.hidden_size, config.intermediate_size
        self.gate_proj = _linear(D, F, rngs)
        self.up_proj = _linear(D, F, rngs)
        self.down_proj = _linear(F, D, rngs)

    def __call__(self, x):
        return self.down_proj(gated(self.gate_proj(x), self.up_proj(x)))


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
    """Pre-norm Transformer layer."""

    def __init__(self, config, *, rngs: nnx.Rngs):
        D, epsilon = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = nnx.RMSNorm(D, epsilon=epsilon, rngs=rngs)
        self.self_attn = Attention(config, rngs=rngs)
        self.post_attention_layernorm = nnx.RMSNorm(D, epsilon=epsilon, rngs=rngs)
        self.mlp = SwiGLU(config, rngs=rngs) if config.experts is None else SparseMLP(config, rngs=rngs)
        shape = config.convolution
        self.attention_conv: SlotConvolution | None = shape and SlotConvolution(D, *shape, rngs=rngs)
        self.mlp_conv: SlotConvolution | None = shape and SlotConvolution(D, *shape, rngs=rngs)

    def __call__(self, x, angles, attend):
        """Args:
          x: `[..., D]`.
          angles: of x's positions.
          attend: (q, k, v of x) → (mixed `[..., H, E]`, anything).

        Returns:
          `[..., D]`, and what `attend` returned beside.
        """
        normed, convolved = _convolution(self.attention_conv, self.input_layernorm(x))
        mixed, beside = attend(self.self_attn.queries(normed, angles), *self.self_attn.keys_values(normed, angles))
        x = x + convolved(self.self_attn.output(mixed))
        normed, convolved = _convolution(self.mlp_conv, self.post_attention_layernorm(x))
        return x + convolved(self.mlp(normed)), beside


def stack_layers(config, rngs: nnx.Rngs) -> DecoderLayer:
    """All layers as one module whose parameters have a leading layer axis."""
    count = config.num_hidden_layers
    return nnx.vmap(lambda rngs: DecoderLayer(config, rngs=rngs))(rngs.split(count))


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


def scan_layers(body, carry, layers: DecoderLayer, xs=None, remat: Remat = "none"):
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
        return body(carry, nnx.merge(graphdef, params), x)

    if remat != "none":
        policies = jax.checkpoint_policies
        policy = {"dots": policies.save_only_these_names(_PRODUCT), "layers": policies.nothing_saveable}[remat]
        step = jax.checkpoint(step, policy=policy, prevent_cse=False)

    return lax.scan(step, carry, (params, xs))


def scan_first_layers(body, carry, layers: DecoderLayer, count: int):
    """`carry = body(carry, layer, i)` over the first `count` layers, in place.

    Indexing inside the loop rather than slicing before it: a slice of the stacked parameters would
    be a copy of nearly the whole model. For frozen parameters; gradients want `scan_layers`.
    """
    if isinstance(layers, nnx.List):
        for i in range(count):
            carry = body(carry, layers[i], i)
        return carry
    graphdef, params = nnx.split(layers)

    def step(carry, i):
        return body(carry, nnx.merge(graphdef, jax.tree.map(lambda p: p[i], params)), i), None

    return lax.scan(step, carry, jnp.arange(count))[0]


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
