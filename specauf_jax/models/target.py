"""The target: a causal language model, as pure functions of a parameter tree."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from specauf_jax.architecture import Target
from specauf_jax.errors import SpecaufError
from specauf_jax.kernels.attention import cached_attention
from specauf_jax.kernels.block_attention import causal_attention
from specauf_jax.models.cpu import few_rows, is_serving
from specauf_jax.models.delta import Tokens, settle
from specauf_jax.models.layers import (
    KVCache,
    init_kv_cache,
    module_of,
    rms_norm,
    scan_first_layers,
    scan_layers,
    stack_layers,
    with_entries,
)
from specauf_jax.models.rope import rope_angles
from specauf_jax.parts import RopeScaling
from specauf_jax.pytrees import pytree
from specauf_jax.sharding import spread_rows

MOST_POSITIONS = 2**30  # in place of the window of a layer without one


def _as_they_are(arrays, **_):
    """Embeddings in the parameters' own precision, which all layers take over; nnx would make them float32."""
    return arrays


class CausalLM(nnx.Module):
    """Parameters of the target, under Hugging Face's names; layers are stacked."""

    def __init__(self, config: Target, *, rngs: nnx.Rngs):
        normal = nnx.initializers.normal(0.02)
        self.embed_tokens = nnx.Embed(
            config.vocab_size, config.hidden_size, embedding_init=normal, promote_dtype=_as_they_are, rngs=rngs
        )
        self.layers = stack_layers(config, rngs)
        self.norm = rms_norm(config, config.hidden_size, rngs)
        if not config.tie_word_embeddings:
            self.lm_head = nnx.Linear(
                config.hidden_size, config.vocab_size, use_bias=False, kernel_init=normal, rngs=rngs
            )


@pytree
class Head:
    """What a drafter shares with its target, frozen."""

    embedding: jax.Array  # [V, D]
    lm_head: jax.Array  # [D, V]
    serving: jax.Array | None = None  # [V, D], the LM head where parameters are in serving form

    def logits(self, hidden: jax.Array) -> jax.Array:
        """`[..., D]` → float32 `[..., V]`."""
        if self.serving is not None:
            return few_rows(hidden, self.serving, jnp.float32)
        return jnp.einsum("...d,dv->...v", hidden, self.lm_head, preferred_element_type=jnp.float32)


def init_target(config: Target, key: jax.Array) -> dict:
    """Random float32 parameters: normal(0.02) matrices, norms at 1."""
    return nnx.to_pure_dict(nnx.state(CausalLM(config, rngs=nnx.Rngs(key)), nnx.Param))


def target_shapes(config: Target) -> dict:
    """The parameter tree with shapes in place of arrays."""
    return jax.eval_shape(lambda: init_target(config, jax.random.key(0)))


def target_head(params: dict) -> Head:
    """Embedding and LM head; a tied head is the embedding's transpose."""
    embedding = params["embed_tokens"]["embedding"]
    kernel = params["lm_head"]["kernel"] if "lm_head" in params else embedding.T
    if not is_serving(params):
        return Head(embedding=embedding, lm_head=kernel)
    serving = kernel if "lm_head" in params else embedding
    return Head(embedding=embedding, lm_head=serving.T, serving=serving)


def document_starts(document_ids: jax.Array) -> jax.Array:
    """Index in its row of the first token of every token's document, int32 `[B, S]`."""
    index = jnp.arange(document_ids.shape[-1], dtype=jnp.int32)
    first = jnp.pad(document_ids[..., 1:] != document_ids[..., :-1], ((0, 0), (1, 0)), constant_values=True)
    return lax.cummax(jnp.where(first, index, 0), axis=document_ids.ndim - 1)


@jax.named_scope("target")
def target_hidden(params: dict, tokens, positions, document_ids, *, config: Target) -> jax.Array:
    """Final-normed hidden states of packed rows, `[B, S, D]`; for training the target itself.

    Args:
      params: as from `init_target`.
      tokens: int32 `[B, S]`.
      positions: int32 `[B, S]`, within each token's own document.
      document_ids: int32 `[B, S]`; attention is causal within a document.
    """
    model = module_of(CausalLM, config, params)
    run = _packed(positions, document_ids, config)

    def body(x, layer, i):
        return run(x, layer, i), None

    numbers = jnp.arange(config.num_hidden_layers // config.period)
    return model.norm(scan_layers(body, _embedded(model, tokens, config), model.layers, numbers)[0])


@jax.named_scope("target")
def target_features(params: dict, tokens, positions, document_ids, *, config: Target, layer_ids) -> jax.Array:
    """Residual outputs of the tapped layers side by side, `[B, S, L·D]`.

    Runs no layer above the highest tap, no final norm and no LM head. Arguments as for
    `target_hidden`; `layer_ids` are 0-based and ascending.
    """
    rows = (tokens, positions, document_ids)
    return _tapped(module_of(CausalLM, config, params), *rows, config, layer_ids, max(layer_ids) + 1)[1]


@jax.named_scope("target")
def target_states(params: dict, tokens, positions, document_ids, *, config: Target, layer_ids):
    """`target_features`, and `target_hidden` of the same pass: what soft losses need."""
    model = module_of(CausalLM, config, params)
    rows = (tokens, positions, document_ids)
    x, features = _tapped(model, *rows, config, layer_ids, config.num_hidden_layers)
    return features, model.norm(x)


def _embedded(model: CausalLM, tokens, config: Target) -> jax.Array:
    """`[B, T, D]`; Gemma's embeddings count for their root of D, rounded as they are."""
    x = model.embed_tokens(tokens)
    if config.model_type == "gemma3":
        x *= jnp.asarray(config.hidden_size**0.5, x.dtype)
    return spread_rows(x)


def _angles_of_layers(positions, config: Target):
    """Number of a layer → its RoPE angles: layers with a window may have a base of their own."""
    angles = rope_angles(positions, config)
    if config.rope_local_base_freq is None:
        return lambda i: angles
    local = rope_angles(
        positions, dataclasses.replace(config, rope_theta=config.rope_local_base_freq, rope_scaling=RopeScaling())
    )
    slides = jnp.asarray([window is not None for window in config.windows])
    return lambda i: jax.tree.map(lambda own, others: jnp.where(slides[i], own, others), local, angles)


def _within_window(start, index, i, config: Target) -> jax.Array:
    """First of what each token sees in layer i: int32 like `start`, which is that of a layer without a window."""
    if not any(config.windows):
        return start
    windows = jnp.asarray([window or MOST_POSITIONS for window in config.windows], jnp.int32)
    return jnp.maximum(start, index - (windows[i] - 1))


def _packed(positions, document_ids, config: Target):
    """(x `[B, S, D]`, layer, its number) → x after it, of packed rows: nothing passes from a document to the next."""
    angles, start = _angles_of_layers(positions, config), document_starts(document_ids)
    index = jnp.arange(start.shape[1], dtype=jnp.int32)

    def run(x, layer, i):
        def attend(q, k, v, sinks=None):
            return causal_attention(q, k, v, _within_window(start, index, i, config), sinks), None

        return spread_rows(layer(x, angles(i), attend, lambda net, h: (net(h, start), None))[0])

    return run


def _tapped(model, tokens, positions, document_ids, config: Target, layer_ids, count: int):
    """The residual stream after `count` layers, `[B, S, D]`, and the taps, `[B, S, L·D]`."""
    run = _packed(positions, document_ids, config)
    x = _embedded(model, tokens, config)

    def body(carry, layer, i):
        x, taps = carry
        x = run(x, layer, i)
        return x, _tap(taps, x, i, layer_ids, count)

    x, taps = scan_first_layers(body, (x, _empty_taps(x, layer_ids, count)), model.layers, count)
    return x, taps[..., : len(layer_ids), :].reshape(*x.shape[:-1], -1)


@dataclasses.dataclass(frozen=True)
class TargetStep:
    """The one function that decoding asks of a target; any callable of this form can take its place.

    `(params, tokens [B, T], positions [B, T], cache) -> (logits [B, T, V], taps [B, T, L·D], cache)`

    Row b holds T consecutive tokens at consecutive positions. The cache is addressed by position:
    the call may rely on what earlier calls left at smaller positions, and overwrites its own. That
    is all that taking back rejected drafts needs. `read_tree` and `keep` serve draft trees; a target
    without them decodes chains. `settle` is for a cache that positions do not address: see `HybridStep`. Hashable, so
    that it is static under jit.
    """

    config: Target
    layer_ids: tuple[int, ...]

    def __post_init__(self):
        if self.config.hybrid is not None:
            raise SpecaufError(f"a TargetStep of a {self.config.model_type}", "a HybridStep", "call target_step")

    @jax.named_scope("target")
    def __call__(self, params, tokens, positions, cache: KVCache):
        def run(layer, x, angles, i, cache):
            def attend(q, k, v, sinks=None):
                start = _within_window(jnp.zeros_like(positions), positions, i, self.config)
                return _read_chain(q, k, v, sinks, i, start, positions, cache)

            return layer(x, angles, attend)

        return _run(self, params, tokens, positions, run, cache)

    @jax.named_scope("target")
    def read_tree(self, params, tokens, anchor, depths, sees, cache: KVCache):
        """One pass over a tree of tokens, the root first. The cache stays as it is; see `keep`.

        Args:
          params: as from `init_target`.
          tokens: int32 `[B, T]`.
          anchor: int32 `[B, 1]`, the root's position; the cache holds all before it.
          depths: int32 `[B, T]`: a node's position is the anchor's and its depth.
          sees: bool `[B, T, T]`, which of the nodes each node sees.
          cache: of positions before the anchor.

        Returns:
          logits `[B, T, V]`, taps `[B, T, L·D]`, and what `keep` takes over: KVCache of `[N, B, T, G, E]`.
        """
        stop = jnp.broadcast_to(anchor, depths.shape)

        def run(layer, x, angles, i, read):
            def attend(q, k, v, sinks=None):
                own = (k.astype(cache.k.dtype), v.astype(cache.v.dtype))
                kept = KVCache(k=read.k.at[i].set(own[0]), v=read.v.at[i].set(own[1]))
                start = _within_window(jnp.zeros_like(depths), anchor + depths, i, self.config)
                inside = sees & (depths[:, None] >= _within_window(-anchor, depths, i, self.config)[..., None])
                return cached_attention(q, cache.k, cache.v, i, start, stop, (*own, inside), sinks), kept

            return layer(x, angles, attend)

        N, B, G, _, E = cache.k.shape
        read = jax.tree.map(lambda x: jnp.zeros((N, B, tokens.shape[1], G, E), x.dtype), cache)
        return _run(self, params, tokens, anchor + depths, run, read)

    def keep(self, cache: KVCache, read: KVCache, path, positions) -> KVCache:
        """The cache with a tree's nodes `path`, int32 `[B, K]`, at consecutive `positions`, int32 `[B, K]`."""
        chosen = jax.tree.map(lambda x: jnp.take_along_axis(x, path[None, ..., None, None], axis=2), read)
        return with_entries(cache, chosen, positions[:, 0])

    def init_cache(self, batch: int, length: int, dtype=jnp.float32) -> KVCache:
        """Room for `length` positions of each row."""
        return init_kv_cache(self.config, batch, length, dtype)


@pytree
class HybridCache:
    """Of full attention by position; of linear attention what stands for all tokens so far."""

    kv: KVCache
    state: jax.Array  # float32 [N, B, H, Dk, Dv], of N linear layers
    tail: jax.Array  # [N, B, W-1, C], the last inputs of their convolutions
    unsettled: Any = None  # of the last block: Tokens [N, B, T, ...] and the convolutions' inputs [N, B, W-1+T, C]


@dataclasses.dataclass(frozen=True)
class HybridStep:
    """`TargetStep` of a target with linear attention (Qwen3.5), whose state cannot be addressed by position.

    A call reads its block after the settled tokens, which must be all before it, and settles none of it: `settle` says
    how many of the block's tokens stand, so that rejected drafts leave no trace. Chains only.
    """

    config: Target
    layer_ids: tuple[int, ...]

    @jax.named_scope("target")
    def __call__(self, params, tokens, positions, cache: HybridCache):
        period = self.config.period

        def run(layer, x, angles, i, carry):
            kv, unsettled = carry

            def attend(q, k, v):
                mixed, written = _read_chain(q, k, v, None, i // period, jnp.zeros_like(positions), positions, kv)
                return mixed, (written, unsettled)

            def recur(net, h):
                at = i // period * (period - 1) + i % period
                output, block = net.read(h, cache.state[at], cache.tail[at])
                return output, (kv, jax.tree.map(lambda all_, x: all_.at[at].set(x), unsettled, block))

            return layer(x, angles, attend, recur)

        carry = cache.kv, self._empty_block(cache, tokens.shape[1])
        logits, taps, (kv, unsettled) = _run(self, params, tokens, positions, run, carry)
        return logits, taps, dataclasses.replace(cache, kv=kv, unsettled=unsettled)

    def settle(self, cache: HybridCache, count) -> HybridCache:
        """The cache after the first `count` tokens, int32 `[B]`, of the block that was read last."""

        def one(layer):
            state, tail, (tokens, inputs) = layer
            return settle(state, tail, tokens, inputs, count)

        state, tail = lax.map(one, (cache.state, cache.tail, cache.unsettled))
        return dataclasses.replace(cache, state=state, tail=tail, unsettled=None)

    def init_cache(self, batch: int, length: int, dtype=jnp.float32) -> HybridCache:
        """Room for `length` positions of each row, of which none is settled."""
        shape, full = self.config.hybrid, self.config.num_hidden_layers // self.config.period
        assert shape is not None
        linear = self.config.num_hidden_layers - full
        return HybridCache(
            kv=init_kv_cache(self.config, batch, length, dtype, full),
            state=jnp.zeros((linear, batch, *shape.state), jnp.float32),
            tail=jnp.zeros((linear, batch, shape.linear_conv_kernel_dim - 1, shape.channels), dtype),
        )

    def _empty_block(self, cache: HybridCache, T: int):
        N, B, H, Dk, Dv = cache.state.shape

        def zeros(*shape):
            return jnp.zeros((N, B, T, H, *shape), jnp.float32)

        inputs = jnp.zeros((N, B, cache.tail.shape[2] + T, cache.tail.shape[3]), cache.tail.dtype)
        return Tokens(k=zeros(Dk), v=zeros(Dv), g=zeros(), beta=zeros()), inputs


def target_step(config: Target, layer_ids: tuple[int, ...]) -> TargetStep | HybridStep:
    """What decodes a target."""
    return (HybridStep if config.hybrid else TargetStep)(config, layer_ids)


def _read_chain(q, k, v, sinks, i, start, positions, cache: KVCache):
    """Attention of consecutive tokens over the cache's layer i from `start` on, and the cache with their entries."""
    written = with_entries(cache, KVCache(k=k[None], v=v[None]), positions[:, 0], i)
    # Written, then read: what is read afterwards could not be written in place.
    return cached_attention(q, written.k, written.v, i, start, positions + 1, sinks=sinks), written


def _run(step: TargetStep | HybridStep, params, tokens, positions, run, carry):
    """All layers, each as it is told: `run` (layer, x, angles, its number, carry) → (x, carry)."""
    config, ids, count = step.config, step.layer_ids, step.config.num_hidden_layers
    model = module_of(CausalLM, config, params)
    angles = _angles_of_layers(positions, config)
    x = _embedded(model, tokens, config)

    def body(all_, layer, i):
        x, taps, carry = all_
        x, carry = run(layer, x, angles(i), i, carry)
        x = spread_rows(x)
        return x, _tap(taps, x, i, ids, count), carry

    x, taps, carry = scan_first_layers(body, (x, _empty_taps(x, ids, count), carry), model.layers, count)
    logits = target_head(params).logits(model.norm(x))
    return logits, taps[..., : len(ids), :].reshape(*tokens.shape, -1), carry


def _empty_taps(x, layer_ids, layers_run):
    """A slot per tap, and one for the layers above the highest if they run: `[B, T, L (+1), D]`."""
    surplus = layers_run > max(layer_ids) + 1
    return jnp.zeros((*x.shape[:-1], len(layer_ids) + surplus, x.shape[-1]), x.dtype)


def _tap(taps, x, i, layer_ids, layers_run):
    """Every layer writes into the slot of the next tap at or above it, so the tap itself writes last.

    The barrier keeps TPUs from writing it in the layer's last product, which then takes longer.
    """
    slot_of_layer = jnp.asarray(np.searchsorted(np.asarray(layer_ids), np.arange(layers_run)))
    row = lax.optimization_barrier(x)[..., None, :]
    return lax.dynamic_update_index_in_dim(taps, row, slot_of_layer[i], axis=taps.ndim - 2)
