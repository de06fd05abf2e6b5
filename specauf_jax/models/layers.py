"""Qwen3's building blocks in Flax NNX, shared by target and drafter.

Modules are thin: they hold parameters and say how a token's vector is transformed. What a query
may see is the caller's business, passed in as a function. Compute precision is that of the
parameters; norms, softmax and RoPE angles are float32 inside.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax


@chex.dataclass(frozen=True)
class KVCache:
    """Keys and values of all layers, addressed by position: `[N, B, S, G, E]` each."""

    k: jax.Array
    v: jax.Array


def init_kv_cache(config, batch: int, length: int, dtype) -> KVCache:
    """An empty cache for a `Target` or `Drafter`; 0 everywhere."""
    shape = (config.num_hidden_layers, batch, length, config.num_key_value_heads, config.head_dim)
    return KVCache(k=jnp.zeros(shape, dtype), v=jnp.zeros(shape, dtype))


def rope_angles(positions: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of every position's rotations, float32 `[..., 1, E/2]` (one head axis).

    float32 throughout: in bfloat16 positions above 256 could not be told apart.
    """
    inverse_frequency = 1.0 / (np.float32(theta) ** (np.arange(0, head_dim, 2, dtype=np.float32) / head_dim))
    angles = positions[..., None, None].astype(jnp.float32) * inverse_frequency
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate `[..., H, E]` in half-split form (element e pairs with e + E/2)."""
    cos, sin = angles
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1).astype(x.dtype)


class Attention(nnx.Module):
    """Projections of grouped-query attention with per-head RMSNorm on queries and keys."""

    def __init__(self, config, *, rngs: nnx.Rngs):
        D, E = config.hidden_size, config.head_dim
        self.head_dim = E
        self.q_proj = _linear(D, config.num_attention_heads * E, rngs)
        self.k_proj = _linear(D, config.num_key_value_heads * E, rngs)
        self.v_proj = _linear(D, config.num_key_value_heads * E, rngs)
        self.o_proj = _linear(config.num_attention_heads * E, D, rngs)
        self.q_norm = nnx.RMSNorm(E, epsilon=config.rms_norm_eps, rngs=rngs)
        self.k_norm = nnx.RMSNorm(E, epsilon=config.rms_norm_eps, rngs=rngs)

    def queries(self, x, angles):
        """`[..., D]` → `[..., H, E]`."""
        return apply_rope(self.q_norm(self._heads(self.q_proj(x))), angles)

    def keys_values(self, x, angles):
        """`[..., D]` → keys and values, `[..., G, E]` each."""
        return apply_rope(self.k_norm(self._heads(self.k_proj(x))), angles), self._heads(self.v_proj(x))

    def output(self, mixed):
        """`[..., H, E]` → `[..., D]`."""
        return self.o_proj(mixed.reshape(*mixed.shape[:-2], -1))

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
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nnx.Module):
    """Pre-norm Transformer layer."""

    def __init__(self, config, *, rngs: nnx.Rngs):
        D, epsilon = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = nnx.RMSNorm(D, epsilon=epsilon, rngs=rngs)
        self.self_attn = Attention(config, rngs=rngs)
        self.post_attention_layernorm = nnx.RMSNorm(D, epsilon=epsilon, rngs=rngs)
        self.mlp = SwiGLU(config, rngs=rngs)

    def __call__(self, x, angles, attend):
        """Args:
          x: `[..., D]`.
          angles: of x's positions.
          attend: (q, k, v of x) → (mixed `[..., H, E]`, anything).

        Returns:
          `[..., D]`, and what `attend` returned beside.
        """
        normed = self.input_layernorm(x)
        mixed, beside = attend(self.self_attn.queries(normed, angles), *self.self_attn.keys_values(normed, angles))
        x = x + self.self_attn.output(mixed)
        return x + self.mlp(self.post_attention_layernorm(x)), beside


def stack_layers(config, rngs: nnx.Rngs) -> DecoderLayer:
    """All layers as one module whose parameters have a leading layer axis."""
    count = config.num_hidden_layers
    return nnx.vmap(lambda rngs: DecoderLayer(config, rngs=rngs))(rngs.split(count))


def scan_layers(body, carry, layers: DecoderLayer, xs=None):
    """`carry, y = body(carry, layer, x)` over all stacked layers, compiled once whatever their number."""
    graphdef, params = nnx.split(layers)

    def step(carry, inputs):
        params, x = inputs
        return body(carry, nnx.merge(graphdef, params), x)

    return lax.scan(step, carry, (params, xs))


def scan_first_layers(body, carry, layers: DecoderLayer, count: int):
    """`carry = body(carry, layer, i)` over the first `count` layers, in place.

    Indexing inside the loop rather than slicing before it: a slice of the stacked parameters would
    be a copy of nearly the whole model. For frozen parameters; gradients want `scan_layers`.
    """
    graphdef, params = nnx.split(layers)

    def step(carry, i):
        return body(carry, nnx.merge(graphdef, jax.tree.map(lambda p: p[i], params)), i), None

    return lax.scan(step, carry, jnp.arange(count))[0]


def cast(params, dtype):
    """Parameters in compute precision."""
    return jax.tree.map(lambda p: p.astype(dtype), params)


def _linear(inputs: int, outputs: int, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(inputs, outputs, use_bias=False, kernel_init=nnx.initializers.normal(0.02), rngs=rngs)
