"""A DFlash drafter of five layers, blocks of 16, for Qwen3-30B-A3B: rows of 3,072 tokens, 64 a step.

    specauf train --config configs/qwen3_30b_a3b_dflash.py --target TARGET --data DATA --out RUN

Hardware: 16 v5e chips (v5e:4x4) or more; by `specauf compile --no-code` 8.37 GiB of each chip's 15.75 GiB there. All
rows at one time: every part of a batch gathers all experts of all layers once.
Expected time: not yet measured. 2,988 TFLOP a step: 2.37 s on 16 v5e or 0.51 s on 16 v6e chips at 40 % of their peak,
so that 20,000 steps would take 13 or 3 hours.
Expected tau: not yet measured here. The Spec-AUF paper, which trained a DFlash drafter on answers that the target had
not written: 2.61 over six sets of prompts (`decay`: 2.40).
"""

from specauf_jax.architecture import Drafter
from specauf_jax.commands.train_settings import Train
from specauf_jax.config import TrainOptimisation

config = Train(
    target="Qwen3-30B-A3B",
    data="data/on_policy",
    out="runs/qwen3_30b_a3b_dflash",
    drafter=Drafter(block_size=16, num_hidden_layers=5, mask_token_id=151_669),
    train=TrainOptimisation(steps=20_000, batch_size=64, dtype="bfloat16", remat="layers"),
)
