"""A DFlash drafter of five layers, blocks of 16, for Qwen3-32B: rows of 3,072 tokens, 64 a step.

    specauf train --config configs/qwen3_32b_dflash.py --target TARGET --data DATA --out RUN

Hardware: 16 v5e chips (v5e:4x4) or more; by `specauf compile` 11.77 GiB of each chip's 15.75 GiB there.
Expected time: not yet measured. 22,264 TFLOP a step: 17.66 s on 16 v5e or 3.79 s on 16 v6e chips at 40 % of their peak,
so that 20,000 steps would take 98 or 21 hours.
Expected tau: not yet measured.
"""

from specauf_jax.architecture import Drafter
from specauf_jax.commands.train_settings import Train
from specauf_jax.config import TrainOptimisation

config = Train(
    target="Qwen3-32B",
    data="data/on_policy",
    out="runs/qwen3_32b_dflash",
    drafter=Drafter(block_size=16, num_hidden_layers=5, mask_token_id=151_669),
    train=TrainOptimisation(
        steps=20_000, batch_size=64, accumulation=4, slot_chunk=512, dtype="bfloat16", remat="layers"
    ),
)
