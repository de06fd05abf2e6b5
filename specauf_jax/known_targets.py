"""Published targets, for what needs no weights."""

import dataclasses

from specauf_jax.architecture import Target
from specauf_jax.parts import Experts, Hybrid, RopeScaling

_QWEN3 = Target(vocab_size=151_936, hidden_size=4096, intermediate_size=12_288, num_hidden_layers=36,
                num_attention_heads=32, num_key_value_heads=8, head_dim=128, rope_theta=1e6,
                max_position_embeddings=40_960, tie_word_embeddings=False)  # fmt: skip
_QWEN3_5 = dataclasses.replace(
    _QWEN3,
    model_type="qwen3_5",
    vocab_size=248_320,
    num_hidden_layers=32,
    num_key_value_heads=4,
    head_dim=256,
    rope_theta=1e7,
    max_position_embeddings=262_144,
    hybrid=Hybrid(4, 16, 32, 128, 128, 4, 0.25),
)
KNOWN_TARGETS = {
    "Qwen3-4B": dataclasses.replace(_QWEN3, hidden_size=2560, intermediate_size=9728, tie_word_embeddings=True),
    "Qwen3-8B": _QWEN3,
    "Qwen3-32B": dataclasses.replace(
        _QWEN3, hidden_size=5120, intermediate_size=25_600, num_hidden_layers=64, num_attention_heads=64
    ),
    "Qwen3-30B-A3B": dataclasses.replace(
        _QWEN3,
        model_type="qwen3_moe",
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=48,
        num_key_value_heads=4,
        experts=Experts(128, 8, 768, True),
    ),
    "Qwen3.5-9B": dataclasses.replace(_QWEN3_5, num_hidden_layers=32, num_attention_heads=16),
    "Qwen3.5-27B": dataclasses.replace(
        _QWEN3_5,
        hidden_size=5120,
        intermediate_size=17_408,
        num_hidden_layers=64,
        num_attention_heads=24,
        hybrid=Hybrid(4, 16, 48, 128, 128, 4, 0.25),
    ),
    "Qwen3.5-35B-A3B": dataclasses.replace(
        _QWEN3_5,
        model_type="qwen3_5_moe",
        hidden_size=2048,
        intermediate_size=4608,  # it has no dense MLP: what a token meets
        num_hidden_layers=40,
        num_attention_heads=16,
        num_key_value_heads=2,
        experts=Experts(256, 8, 512, True, 512),
    ),
    "gpt-oss-20b": Target(
        model_type="gpt_oss",
        vocab_size=201_088,
        hidden_size=2880,
        intermediate_size=2880,
        num_hidden_layers=24,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=64,
        rms_norm_eps=1e-5,
        rope_theta=150_000.0,
        rope_scaling=RopeScaling("yarn", 32.0, 4096, truncate=False),
        max_position_embeddings=131_072,
        tie_word_embeddings=False,
        experts=Experts(32, 4, 2880, True, swiglu_limit=7.0),
        layer_types=("sliding_attention", "full_attention") * 12,
        sliding_window=128,
    ),
}
"""Architectures of published targets, for what needs no weights (their config.json on Hugging Face)."""
