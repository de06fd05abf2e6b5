"""A DFlash drafter of five layers, blocks of 16, for Qwen3-4B: rows of 3,072 tokens, 64 a step.

    specauf train --config configs/qwen3_4b_dflash.py --target TARGET --data DATA --out RUN

Hardware: 16 v5e chips (v5e:4x4) or more; by `specauf compile` 6.01 GiB of each chip's 15.75 GiB there, and 1.5 to 2.1 s
a step (64 to 71 % of their peak); with `--train.accumulation 1` 0.48 to 0.65 s on 16 v6e.
Expected time: not yet measured. 20,000 steps would take 8 to 11 hours on 16 v5e, 3 to 4 on 16 v6e by these figures.
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
