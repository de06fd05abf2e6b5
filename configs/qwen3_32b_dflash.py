"""A DFlash drafter of five layers, blocks of 16, for Qwen3-32B: rows of 3,072 tokens, 64 a step.

    specauf train --config configs/qwen3_32b_dflash.py --target TARGET --data DATA --out RUN

Hardware: 16 v5e chips (v5e:4x4) or more; by `specauf compile` 13.72 GiB of each chip's 15.75 GiB there, and 8.4 to
10.4 s a step (68 to 79 % of their peak); with `--train.accumulation 1` 2.2 to 2.6 s on 16 v6e.
Expected time: not yet measured. 20,000 steps would take 47 to 58 hours on 16 v5e, 12 to 14 on 16 v6e by these figures.
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
