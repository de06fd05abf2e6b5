"""A DFlash2 drafter of five layers, blocks of 16, for Qwen3-8B: rows of 3,072 tokens, 64 a step.

    specauf train --config configs/qwen3_8b_dflash2.py --target TARGET --data DATA --out RUN
    … --init-from DFLASH    # on the body of a trained DFlash drafter of the same shape

Hardware: 16 v5e chips (v5e:4x4) or more; by `specauf compile --no-code` 5.53 GiB of each chip's 15.75 GiB there.
Expected time: not yet measured. 5,160 TFLOP a step: 4.09 s on 16 v5e or 0.88 s on 16 v6e chips at 40 % of their peak,
so that 20,000 steps would take 23 or 5 hours.
Expected tau: not yet measured.

The body's own logits train under `auf`, the selector under `decay`: as on Domino's final branch, what the selector does
behind a miss of its own still teaches it.
"""

from specauf_jax.architecture import Drafter
from specauf_jax.commands.train_settings import Train
from specauf_jax.config import Objective, TrainOptimisation

config = Train(
    target="Qwen3-8B",
    data="data/on_policy",
    out="runs/qwen3_8b_dflash2",
    drafter=Drafter(block_size=16, num_hidden_layers=5, mask_token_id=151_669, projector_type="dflash2"),
    objective=Objective("decay"),
    base_objective=Objective("auf"),
    train=TrainOptimisation(steps=20_000, batch_size=64, accumulation=4, dtype="bfloat16", remat="layers"),
)
