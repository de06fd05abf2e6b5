"""Linear attention by a gated delta rule (arXiv 2412.06464), as in Qwen3.5: a state of fixed size in place of a cache.

Of every head S [Dk, Dv] runs over a document: S ← α S, S ← S + β k (v - Sᵀ k)ᵀ, out = Sᵀ q, with α = exp(g) in (0, 1].
Tokens are taken in chunks, whose own part is products of matrices; one state goes from chunk to chunk. All in float32.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.scipy.linalg import solve_triangular

from specauf_jax.parts import Hybrid
from specauf_jax.pytrees import pytree

CHUNK = 64  # tokens


@pytree
class Tokens:
    """What the rule takes of tokens `[B, T]`, float32."""

    k: jax.Array  # [B, T, H, Dk], of length 1
    v: jax.Array  # [B, T, H, Dv]
    g: jax.Array  # [B, T, H], ln α
    beta: jax.Array  # [B, T, H]


class GatedDeltaNet(nnx.Module):
    """Parameters under Hugging Face's names."""

    def __init__(self, config, *, rngs: nnx.Rngs):
        self.shape: Hybrid = config.hybrid
        D, H = config.hidden_size, self.shape.linear_num_value_heads
        values, normal = H * self.shape.linear_value_head_dim, nnx.initializers.normal(0.02)

        def linear(inputs: int, outputs: int):
            return nnx.Linear(inputs, outputs, use_bias=False, kernel_init=normal, rngs=rngs)

        if self.shape.interleaved:
            self.in_proj_qkvz = linear(D, self.shape.channels + values)
            self.in_proj_ba = linear(D, 2 * H)
        else:
            self.in_proj_qkv = linear(D, self.shape.channels)
            self.in_proj_z = linear(D, values)
            self.in_proj_b = linear(D, H)
            self.in_proj_a = linear(D, H)
        width = (self.shape.linear_conv_kernel_dim, 1, self.shape.channels)
        self.conv1d = nnx.Dict(kernel=nnx.Param(normal(rngs.params(), width)))
        self.A_log = nnx.Param(jnp.log(jax.random.uniform(rngs.params(), (H,), minval=1e-3, maxval=16.0)))
        self.dt_bias = nnx.Param(jnp.ones(H))
        self.norm = nnx.RMSNorm(self.shape.linear_value_head_dim, epsilon=config.rms_norm_eps, rngs=rngs)
        self.out_proj = linear(values, D)

    def __call__(self, x, start):
        """`[B, S, D]` of packed rows → `[B, S, D]`; `start` int32 `[B, S]`, the first token of each one's document."""
        (B, S, _), W = x.shape, self.shape.linear_conv_kernel_dim
        mixed, *parts, gate = self._projected(x)
        before = jnp.zeros((B, W - 1, mixed.shape[-1]), mixed.dtype)
        q, tokens = self._tokens(*parts, self._convolved(mixed, before, jnp.arange(S) - start))
        out, _ = delta_rule(q, tokens, self.empty_state(B), start)
        return self._output(out, gate)

    def read(self, x, state, tail):
        """A block `[B, T, D]` after what `state` and `tail` hold, which stay as they are.

        Returns:
          `[B, T, D]`, and what `settle` needs: the block's Tokens, and the convolution's inputs `[B, W-1+T, C]`.
        """
        mixed, *parts, gate = self._projected(x)
        q, tokens = self._tokens(*parts, self._convolved(mixed, tail, jnp.full(x.shape[:2], len(tail[0]))))
        out, _ = delta_rule(q, tokens, state, jnp.zeros(x.shape[:2], jnp.int32))
        return self._output(out, gate), (tokens, jnp.concatenate([tail, mixed.astype(tail.dtype)], axis=1))

    def empty_state(self, B: int) -> jax.Array:
        return jnp.zeros((B, *self.shape.state), jnp.float32)

    def _projected(self, x):
        """What the convolution mixes `[B, T, C]`, a and b `[B, T, H]`, and gates of the output `[B, T, H · Dv]`."""
        if not self.shape.interleaved:
            return self.in_proj_qkv(x), self.in_proj_a(x), self.in_proj_b(x), self.in_proj_z(x)
        keys, (H, Dk, Dv) = self.shape.linear_num_key_heads, self.shape.state
        of_key = H // keys  # value heads of a key head
        found = self.in_proj_qkvz(x).reshape(*x.shape[:-1], keys, -1)
        *parts, gate = jnp.split(found, (Dk, 2 * Dk, 2 * Dk + of_key * Dv), axis=-1)
        b, a = jnp.split(self.in_proj_ba(x).reshape(*x.shape[:-1], keys, -1), 2, axis=-1)
        flat = [part.reshape(*x.shape[:-1], -1) for part in (*parts, a, b, gate)]
        return jnp.concatenate(flat[:3], axis=-1), *flat[3:]

    def _convolved(self, mixed, before, seen):
        """silu of the causal convolution over the last W inputs, of which a token sees `seen` before itself."""
        W, T = self.shape.linear_conv_kernel_dim, mixed.shape[1]
        inputs = jnp.concatenate([before.astype(mixed.dtype), mixed], axis=1).astype(jnp.float32)
        kernel = self.conv1d["kernel"][:, 0].astype(jnp.float32)
        taps = (jnp.where((seen >= W - 1 - j)[..., None], inputs[:, j : j + T] * kernel[j], 0.0) for j in range(W))
        return jax.nn.silu(sum(taps)).astype(mixed.dtype)

    def _tokens(self, a, b, mixed) -> tuple[jax.Array, Tokens]:
        """Queries `[B, T, H, Dk]`, and the rest."""
        shape = self.shape
        keys, Dk, Dv = shape.linear_num_key_heads * shape.linear_key_head_dim, *shape.state[1:]
        parts = zip(jnp.split(mixed, (keys, 2 * keys), axis=-1), (Dk, Dk, Dv), strict=True)
        q, k, v = (part.reshape(*part.shape[:-1], -1, size) for part, size in parts)
        q, k = (jnp.repeat(_of_length_one(x), v.shape[-2] // q.shape[-2], axis=-2) for x in (q, k))
        rate = jnp.exp(self.A_log[...].astype(jnp.float32))
        g = -rate * jax.nn.softplus(a.astype(jnp.float32) + self.dt_bias[...].astype(jnp.float32))
        beta = jax.nn.sigmoid(b).astype(jnp.float32)
        return q * Dk**-0.5, Tokens(k=k, v=v.astype(jnp.float32), g=g, beta=beta)

    def _output(self, out, gate):
        """`[B, T, H, Dv]`, gated by `[B, T, H · Dv]` → `[B, T, D]`."""
        normed = self.norm(out.astype(gate.dtype))
        gated = normed * jax.nn.silu(gate.reshape(out.shape).astype(jnp.float32))
        return self.out_proj(gated.astype(gate.dtype).reshape(gate.shape))


def delta_rule(q, tokens: Tokens, state, start) -> tuple[jax.Array, jax.Array]:
    """Outputs of tokens, and the state after them.

    Args:
      q: float32 `[B, T, H, Dk]`.
      tokens: `[B, T, ...]`.
      state: float32 `[B, H, Dk, Dv]`, of the document that start[:, 0] names.
      start: int32 `[B, T]`, ascending: equal numbers are of one document. A new one begins with a state of 0.

    Returns:
      float32 `[B, T, H, Dv]` and `[B, H, Dk, Dv]`.
    """
    B, T, H, _ = q.shape
    size = min(CHUNK, T)
    extra = -T % size

    def chunks(x, mode="constant"):  # what is added neither fades the state nor writes to it
        x = jnp.pad(x, [(0, 0), (0, extra)] + [(0, 0)] * (x.ndim - 2), mode=mode)
        return jnp.moveaxis(x.reshape(B, -1, size, *x.shape[2:]), 1, 0)

    def step(carry, chunk):
        state, document = carry
        q, tokens, start = chunk
        out, state = _chunk(q, tokens, state, start, document)
        return (state, start[:, -1]), out

    xs = chunks(q), jax.tree.map(chunks, tokens), chunks(start, "edge")
    (state, _), out = lax.scan(step, (state, start[:, 0]), xs)
    return jnp.moveaxis(out, 0, 1).reshape(B, -1, H, out.shape[-1])[:, :T], state


def _chunk(q, tokens: Tokens, state, start, document):
    """`delta_rule` of one chunk `[B, C, ...]` after a state of `document`, int32 `[B]`."""
    C = q.shape[1]
    fade = jnp.cumsum(tokens.g, axis=1).swapaxes(1, 2)  # [B, H, C]
    same = (start[:, :, None] == start[:, None]) & jnp.tri(C, dtype=bool)  # [B, C, C]: what a token sees
    between = jnp.exp(jnp.where(same[:, None], fade[..., :, None] - fade[..., None, :], -jnp.inf))  # [B, H, C, C]
    since = jnp.where((start == document[:, None])[:, None], jnp.exp(fade), 0.0)  # [B, H, C]: of the state before
    q, k, v = (jnp.moveaxis(x, 2, 1) for x in (q, tokens.k, tokens.v))  # [B, H, C, ...]
    beta = jnp.moveaxis(tokens.beta, 2, 1)[..., None]
    own = _product("bhid,bhjd->bhij", beta * k, k) * between
    held = _product("bhid,bhde->bhie", k * since[..., None], state)
    written = solve_triangular(jnp.eye(C) + jnp.tril(own, -1), beta * (v - held), lower=True, unit_diagonal=True)
    out = _product("bhid,bhde->bhie", q * since[..., None], state)
    out += _product("bhij,bhje->bhie", _product("bhid,bhjd->bhij", q, k) * between, written)
    state = since[..., -1, None, None] * state
    state += _product("bhjd,bhje->bhde", k * between[..., -1, :, None], written)
    return jnp.moveaxis(out, 1, 2), state


def settle(state, tail, tokens: Tokens, inputs, count):
    """State and tail after the first `count` tokens, int32 `[B]`, of a block that `GatedDeltaNet.read` saw.

    Args:
      state: `[B, H, Dk, Dv]`.
      tail: `[B, W-1, C]`.
      tokens: `[B, T, ...]`, of it.
      inputs: `[B, W-1+T, C]`, of it.
    """
    B, T = tokens.beta.shape[:2]
    kept = (jnp.arange(T) < count[:, None])[..., None]
    faded, written = (jnp.where(kept, x, 0.0) for x in (tokens.g, tokens.beta))
    tokens = dataclasses.replace(tokens, g=faded, beta=written)
    _, state = delta_rule(jnp.zeros_like(tokens.k), tokens, state, jnp.zeros((B, T), jnp.int32))
    at = count[:, None] + jnp.arange(tail.shape[1])
    return state, jnp.take_along_axis(inputs, at[..., None], axis=1)


def _product(equation: str, *operands):
    return jnp.einsum(equation, *operands, precision=lax.Precision.HIGHEST)


def _of_length_one(x):
    x = x.astype(jnp.float32)
    return x * lax.rsqrt(jnp.square(x).sum(axis=-1, keepdims=True) + 1e-6)
