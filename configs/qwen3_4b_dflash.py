"""A DFlash drafter of five layers, blocks of 16, for Qwen3-4B: rows of 3,072 tokens, 64 a step.

    specauf train --config configs/qwen3_4b_dflash.py --target TARGET --data DATA --out RUN

Hardware: 16 v5e chips (v5e:4x4) or more; by `specauf compile --no-code` 4.51 GiB of each chip's 15.75 GiB there.
Expected time: not yet measured. 4,126 TFLOP a step: 3.27 s on 16 v5e or 0.70 s on 16 v6e chips at 40 % of their peak,
so that 20,000 steps would take 18 or 4 hours.
Expected tau: not yet measured.
"""

from specauf_jax.architecture import Drafter
from specauf_jax.commands.train_settings import Train
from specauf_jax.config import TrainOptimisation

config = Train(
    target="Qwen3-4B",
    data="data/on_policy",
    out="runs/qwen3_4b_dflash",
    drafter=Drafter(block_size=16, num_hidden_layers=5, mask_token_id=151_669),
    train=TrainOptimisation(
        steps=20_000, batch_size=64, accumulation=2, slot_chunk=512, dtype="bfloat16", remat="layers"
    ),
)
