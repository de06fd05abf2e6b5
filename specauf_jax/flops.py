"""Analytic model of floating-point operations: 2 a multiply-add, what the method needs and no more.

Attention counts what is visible on average in rows without packing; recomputation is not counted.
"""

from specauf_jax.architecture import ResolvedDrafter, Target

PEAK_FLOPS = {
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU7x": 1153e12,  # half a chip, which JAX counts as a device
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}
"""Dense bfloat16 FLOP/s of one device by JAX's name for its kind, from the makers' data sheets."""


def step_flops(
    drafter: ResolvedDrafter, target: Target, *, rows: int, sequence_length: int, num_anchors: int, soft: bool = False
) -> dict[str, float]:
    """Floating-point operations of one optimiser step over the whole mesh, by part.

    Args:
      drafter: resolved.
      target: the frozen target; only its layers up to the highest tap run, all of them for soft losses.
      rows, sequence_length, num_anchors: B, S, A of the step.
      soft: the loss compares with the target's distribution, whose logits are a product of their own.

    Returns:
      target, experts (those of its layers, where it has some), context, blocks, attention, lm_head, and what the head
      adds.
    """
    S, A, K = sequence_length, num_anchors, drafter.block_size
    D, L, M, V = target.hidden_size, len(drafter.target_layer_ids), drafter.num_hidden_layers, target.vocab_size
    layers_run = target.num_hidden_layers if soft else max(drafter.target_layer_ids) + 1
    N = drafter.num_labels
    heads = drafter.num_attention_heads * drafter.head_dim
    groups = drafter.num_key_value_heads * drafter.head_dim
    visible = S / 2 + K  # of an anchor's slots, on average
    parts = {
        "target": _target_layers(target, layers_run, S, S / 2, spread=True),
        # Keys and values: forward, and backward to weights and inputs; fc: its inputs are frozen.
        "context": 2 * 2 * S * L * D * D + 3 * M * 2 * S * 2 * D * groups,
        "blocks": 3 * M * 2 * A * K * _layer_weights(drafter),
        "attention": 3 * M * 4 * A * K * visible * heads,
        "lm_head": (3 if soft else 2) * 2 * A * N * D * V,  # frozen: no gradient of its weights
    }
    parts |= _experts(target, layers_run * S)
    parts |= {name: 3 * A * N * count for name, count in drafter.head.draft_flops(drafter).items()}
    return {name: float(rows * count) for name, count in parts.items()}


def needed_flops(parts: dict[str, float], head_share: float) -> dict[str, float]:
    """`step_flops` as target and drafter, of a step whose LM head sees this share of the slots (`active_ratio`)."""
    target = parts["target"] + parts.get("experts", 0.0)
    drafter = sum(count for name, count in parts.items() if name not in ("target", "experts", "lm_head"))
    return {"target": target, "drafter": drafter + head_share * parts["lm_head"]}


def pretrain_flops(target: Target, *, rows: int, sequence_length: int) -> dict[str, float]:
    """Floating-point operations of one step that trains the target itself: forward, and twice that backward."""
    S = sequence_length
    layers = _target_layers(target, target.num_hidden_layers, S, S / 2, spread=True)
    layers += sum(_experts(target, target.num_hidden_layers * S).values())
    return {"target": 3.0 * rows * layers, "lm_head": 3.0 * rows * 2 * S * target.hidden_size * target.vocab_size}


def round_flops(
    drafter: ResolvedDrafter, target: Target, *, rows: int, context: int, nodes: int | None = None
) -> dict[str, float]:
    """Floating-point operations of one decode round over the whole mesh, by part.

    Args:
      drafter: resolved.
      target: all of whose layers read the block.
      rows: B, that decode together.
      context: positions that every slot sees before its block.
      nodes: N of a draft tree; None for a chain.

    Returns:
      as `step_flops`.
    """
    K, D, V, L = drafter.block_size, target.hidden_size, target.vocab_size, len(drafter.target_layer_ids)
    W = K if nodes is None else nodes + 1  # tokens that the target reads
    groups = drafter.num_key_value_heads * drafter.head_dim
    seen = context + (K / 2 if nodes is None else W)
    parts = {
        "target": _target_layers(target, target.num_hidden_layers, W, seen),
        "context": 2 * K * L * D * D + drafter.num_hidden_layers * 2 * K * 2 * D * groups,
        "blocks": drafter.num_hidden_layers * 2 * K * _layer_weights(drafter),
        "attention": drafter.num_hidden_layers * 4 * K * (context + K) * drafter.num_attention_heads * drafter.head_dim,
        "lm_head": 2 * (K - 1 + W) * D * V,  # of K-1 drafts, and of the target's judgement
    }
    parts |= _experts(target, target.num_hidden_layers * W)
    parts |= {name: (K - 1) * (nodes or 1) * count for name, count in drafter.head.draft_flops(drafter).items()}
    return {name: float(rows * count) for name, count in parts.items()}


def _target_layers(target: Target, count: int, tokens: int, visible: float, spread: bool = False) -> float:
    """Of the first `count` layers, but for experts, over tokens that see so many positions each, or (spread) on
    average, from none to twice as many."""
    linear = count - count // target.period if target.hybrid else 0
    score = 4 * tokens * target.num_attention_heads * target.head_dim

    def seen(window: int | None) -> float:
        if window is None or window >= (2 * visible if spread else visible):
            return visible
        return window - window**2 / (4 * visible) if spread else window

    found: float = (count - linear) * 2 * tokens * _layer_weights(target)
    found += score * sum(map(seen, target.windows[linear:count]))
    if target.hybrid:
        D, (H, Dk, Dv) = target.hidden_size, target.hybrid.state
        weights = D * (target.hybrid.channels + 2 * H * Dv + 2 * H) + _mlp_weights(target)
        weights += target.hybrid.linear_conv_kernel_dim * target.hybrid.channels
        found += linear * tokens * (2 * weights + 6 * H * Dk * Dv)  # a state is read twice and written once
    return found


def _layer_weights(config: Target | ResolvedDrafter) -> int:
    """Matrix entries that a token meets in one decoder layer with attention, but for its experts'."""
    D, E = config.hidden_size, config.head_dim
    queries = 2 + config.block.gated  # with the output, and gates
    attention = queries * D * config.num_attention_heads * E + 2 * D * config.num_key_value_heads * E
    taps, group = config.convolution or (0, 1)
    return attention + _mlp_weights(config) + 2 * D * 2 * taps * (D // group)


def _mlp_weights(config: Target | ResolvedDrafter) -> int:
    """Of an MLP; or of router and shared expert, where there are experts."""
    if config.experts is None:
        return 3 * config.hidden_size * config.intermediate_size
    shared = config.experts.shared_expert_intermediate_size
    return config.hidden_size * (config.experts.num_experts + (3 * shared + 1 if shared else 0))


def _experts(target: Target, tokens: int) -> dict[str, int]:
    """Of the experts that so many tokens of a layer meet, where there are some."""
    if target.experts is None:
        return {}
    met = target.experts.num_experts_per_tok * target.experts.moe_intermediate_size
    return {"experts": tokens * 2 * 3 * target.hidden_size * met}
