"""A DFlash drafter of five layers, blocks of 16, for Qwen3-32B: rows of 3,072 tokens, 64 a step.

    specauf train --config configs/qwen3_32b_dflash.py --target TARGET --data DATA --out RUN

Hardware: see the README's table of what fits. Not yet run on a TPU.
"""

from specauf_jax.architecture import Drafter
from specauf_jax.commands.train_settings import Train
from specauf_jax.config import TrainOptimisation

config = Train(
    target="Qwen3-32B",
    data="data/on_policy",
    out="runs/qwen3_32b_dflash",
    drafter=Drafter(block_size=16, num_hidden_layers=5, mask_token_id=151_669),
    train=TrainOptimisation(steps=20_000, batch_size=64, accumulation=4, dtype="bfloat16", remat="layers"),
)
