"""A DFlash drafter of five layers, blocks of 8, for gpt-oss-20b: rows of 3,072 tokens, 64 a step.

    specauf train --config configs/gpt_oss_20b_dflash.py --target TARGET --data DATA --out RUN

Hardware: 16 v5e chips (v5e:4x4) or more; by `specauf compile --no-code` 7.55 GiB of each chip's 15.75 GiB there. All
rows at one time: every part of a batch gathers all experts of all layers once.
Expected time: not yet measured. 2,668 TFLOP a step: 2.12 s on 16 v5e or 0.45 s on 16 v6e chips at 40 % of their peak,
so that 20,000 steps would take 12 or 3 hours.
Expected tau: not yet measured.

The target's experts may be stored as MXFP4; they are read as bfloat16. The drafter's heads are of 128 numbers, the
target's of 64. The mask token is a reserved one.
"""

from specauf_jax.architecture import Drafter
from specauf_jax.commands.train_settings import Train
from specauf_jax.config import TrainOptimisation

config = Train(
    target="gpt-oss-20b",
    data="data/on_policy",
    out="runs/gpt_oss_20b_dflash",
    drafter=Drafter(
        block_size=8,
        num_hidden_layers=5,
        mask_token_id=200_017,
        intermediate_size=8640,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
    ),
    train=TrainOptimisation(steps=20_000, batch_size=64, dtype="bfloat16", remat="layers"),
)
