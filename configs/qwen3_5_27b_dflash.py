"""A DFlash drafter of five layers, blocks of 8, for Qwen3.5-27B: rows of 3,072 tokens, 64 a step.

    specauf train --config configs/qwen3_5_27b_dflash.py --target TARGET --data DATA --out RUN

Hardware: 16 v5e chips (v5e:4x4) or more; by `specauf compile --no-code` 10.75 GiB of each chip's 15.75 GiB there.
Expected time: not yet measured. 13,380 TFLOP a step: 10.61 s on 16 v5e or 2.28 s on 16 v6e chips at 40 % of their peak,
so that 20,000 steps would take 59 or 13 hours.
Expected tau: not yet measured.

Qwen3.6-27B has the same architecture. Block size, taps, heads and window are those of the published drafters of this
size. The mask token is the last embedding, which texts do not have. By `specauf doctor` neither TPU engine taps such a
target yet.
"""

from specauf_jax.architecture import Drafter
from specauf_jax.commands.train_settings import Train
from specauf_jax.config import TrainOptimisation

config = Train(
    target="Qwen3.5-27B",
    data="data/on_policy",
    out="runs/qwen3_5_27b_dflash",
    drafter=Drafter(
        block_size=8,
        num_hidden_layers=5,
        mask_token_id=248_319,
        target_layer_ids=(5, 19, 33, 47, 61),
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        layer_types=("sliding_attention",) * 4 + ("full_attention",),
        sliding_window=2048,
    ),
    train=TrainOptimisation(steps=20_000, batch_size=64, accumulation=4, dtype="bfloat16", remat="layers"),
)
