"""The DFlash drafter (arXiv 2602.06036): a few layers that fill a masked block in one pass; the body of every head.

The context, the target's tapped features of every position before the anchor, enters each layer
as keys and values only. They are computed once per position: in training all anchors of a row share
them (`draft_blocks`), in decoding a growing cache holds them (`draft_cached`).
"""

import jax
import jax.numpy as jnp
from flax import nnx

from specauf_jax.architecture import ResolvedDrafter
from specauf_jax.config import Remat
from specauf_jax.kernels.attention import NO_WINDOW, cached_attention, in_range
from specauf_jax.kernels.block_attention import block_attention, visible_ranges
from specauf_jax.models.layers import KVCache, module_of, scan_first_layers, scan_layers, stack_layers
from specauf_jax.models.rope import rope_angles
from specauf_jax.sharding import spread_rows


class DrafterModel(nnx.Module):
    """Parameters of a drafter, under the names of z-lab's checkpoints; layers are stacked, the head's stand beside."""

    def __init__(self, config: ResolvedDrafter, *, rngs: nnx.Rngs):
        D, L = config.hidden_size, len(config.target_layer_ids)
        self.fc = nnx.Linear(L * D, D, use_bias=False, kernel_init=nnx.initializers.normal(0.02), rngs=rngs)
        self.hidden_norm = nnx.RMSNorm(D, epsilon=config.rms_norm_eps, rngs=rngs)
        self.layers = stack_layers(config, rngs)
        self.norm = nnx.RMSNorm(D, epsilon=config.rms_norm_eps, rngs=rngs)
        for name, module in config.head.modules(config, rngs).items():
            setattr(self, name, module)


def init_drafter(config: ResolvedDrafter, key: jax.Array) -> dict:
    """Random float32 parameters of a drafter."""
    return nnx.to_pure_dict(nnx.state(DrafterModel(config, rngs=nnx.Rngs(key)), nnx.Param))


def drafter_shapes(config: ResolvedDrafter) -> dict:
    """The parameter tree with shapes in place of arrays."""
    return jax.eval_shape(lambda: init_drafter(config, jax.random.key(0)))


@jax.named_scope("context")
def context_keys_values(params: dict, features, positions, *, config: ResolvedDrafter) -> KVCache:
    """What every drafter layer remembers of committed positions.

    Args:
      params: as from `init_drafter`.
      features: `[B, S, L·D]`, tapped hidden states of the target.
      positions: int32 `[B, S]`, within each token's own document.

    Returns:
      KVCache with k, v `[M, B, S, G, E]` for M drafter layers.
    """
    model = module_of(DrafterModel, config, params)
    context = spread_rows(model.hidden_norm(model.fc(features)))
    angles = rope_angles(positions, config)
    _, (k, v) = scan_layers(
        lambda carry, layer, _: (carry, layer.self_attn.keys_values(context, angles)), None, model.layers
    )
    return KVCache(k=k, v=v)


@jax.named_scope("blocks")
def draft_blocks(
    params: dict,
    embeddings,
    positions,
    context: KVCache,
    start,
    stop,
    keep,
    *,
    config: ResolvedDrafter,
    remat: Remat = "none",
) -> jax.Array:
    """Hidden states of every slot of every block, ready for the LM head.

    Layers with a sliding window follow SpecForge's training mask: a slot sees itself and the window
    before it, in its block too; other layers see all of the context and both directions of the block.

    Args:
      params: as from `init_drafter`.
      embeddings: `[B, A, K, D]` of `[anchor, MASK, …]`, from the target's embedding.
      positions: int32 `[B, A, K]`: anchor's position + slot.
      context: keys and values by index in the row, `[M, B, S, G, E]`.
      start, stop: int32 `[B, A]`: the block sees the context start <= j < stop; stop is the
        anchor's own index, whose features do not exist yet when the block is drafted.
      keep: bool `[B, A]`; other blocks see nothing.
      config: resolved.
      remat: as for `scan_layers`.

    Returns:
      `[B, A, K, D]`.
    """
    model = module_of(DrafterModel, config, params)
    angles = rope_angles(positions, config)

    windows = _windows(config)

    def body(x, layer, per_layer):
        context, window = per_layer

        def attend(q, k, v):
            return block_attention(q, k, v, context.k, context.v, start, stop, keep, window), None

        x, _ = layer(x, angles, attend)
        return spread_rows(x), None

    return model.norm(scan_layers(body, spread_rows(embeddings), model.layers, (context, windows), remat)[0])


@jax.named_scope("blocks")
def draft_cached(params: dict, embeddings, positions, cache: KVCache, *, config: ResolvedDrafter) -> jax.Array:
    """As `draft_blocks`, of one block a row, whose context is all that its cache holds before the anchor.

    Args:
      params: as from `init_drafter`.
      embeddings: `[B, K, D]`.
      positions: int32 `[B, K]`, the anchor's first.
      cache: `[M, B, G, S, E]`, by position.
      config: resolved.

    Returns:
      `[B, K, D]`.
    """
    model = module_of(DrafterModel, config, params)
    angles, windows = rope_angles(positions, config), _windows(config)
    anchor, everything = positions[:, :1], jnp.ones_like(positions[:, :1], bool)
    K = positions.shape[1]

    def body(x, layer, i):
        window = None if windows is None else windows[i]
        ranges = visible_ranges(jnp.zeros_like(anchor), anchor, everything, K, window)[:, 0]
        start, stop, first, last = jnp.moveaxis(ranges, 1, 0)

        def attend(q, k, v):
            return cached_attention(q, cache.k, cache.v, i, start, stop, (k, v, in_range(first, last, K))), None

        return spread_rows(layer(x, angles, attend)[0])

    return model.norm(scan_first_layers(body, spread_rows(embeddings), model.layers, config.num_hidden_layers))


def _windows(config: ResolvedDrafter) -> jax.Array | None:
    """What each layer sees, as `block_attention` takes it; None where all see everything."""
    return None if not any(config.windows) else jnp.asarray([w or NO_WINDOW for w in config.windows])
