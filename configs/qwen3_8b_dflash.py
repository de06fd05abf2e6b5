"""A DFlash drafter of five layers, blocks of 16, for Qwen3-8B: rows of 3,072 tokens, 64 a step.

    specauf train --config configs/qwen3_8b_dflash.py --target TARGET --data DATA --out RUN

Hardware: 16 v5e chips (v5e:4x4) or more; by `specauf compile` 9.00 GiB of each chip's 15.75 GiB there, and 2.6 to 3.4 s
a step (69 to 74 % of their peak). With more memory, `--train.accumulation 1` gathers parameters once a step: 0.77 to
0.99 s on 16 v6e, 0.31 to 0.37 s on 16 tpu7x chips.
Expected time: not yet measured. 20,000 steps would take 15 to 19 hours on 16 v5e, 4 to 6 on 16 v6e by these figures.
Expected tau: not yet measured here. The Spec-AUF paper, which trained a DFlash drafter on answers that the target had
not written: 2.61 over six sets of prompts (`decay`: 2.40).
"""

from specauf_jax.architecture import Drafter
from specauf_jax.commands.train_settings import Train
from specauf_jax.config import TrainOptimisation

config = Train(
    target="Qwen3-8B",
    data="data/on_policy",
    out="runs/qwen3_8b_dflash",
    drafter=Drafter(block_size=16, num_hidden_layers=5, mask_token_id=151_669),
    train=TrainOptimisation(
        steps=20_000, batch_size=64, accumulation=2, slot_chunk=512, dtype="bfloat16", remat="layers"
    ),
)
