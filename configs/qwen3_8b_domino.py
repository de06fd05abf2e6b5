"""A Domino drafter of five layers, blocks of 16, for Qwen3-8B: rows of 3,072 tokens, 64 a step.

    specauf train --config configs/qwen3_8b_domino.py --target TARGET --data DATA --out RUN

Hardware: 16 v5e chips (v5e:4x4) or more; by `specauf compile --no-code` 5.14 GiB of each chip's 15.75 GiB there.
Expected time: not yet measured. 5,221 TFLOP a step: 4.14 s on 16 v5e or 0.89 s on 16 v6e chips at 40 % of their peak,
so that 20,000 steps would take 23 or 5 hours.
Expected tau: not yet measured here. The Spec-AUF paper, which trained a Domino drafter on answers that the target had
not written: 2.68 over six sets of prompts (`decay` for both branches: 2.56).

The objectives are B-AUF+D: `auf_decay` on the base branch, `decay` on the final one, which sees every slot. Cutting the
final branch at its own failures (the default, F-AUF) is worse: 4.03 against 4.40 on the quickstart's target.
"""

from specauf_jax.architecture import Drafter
from specauf_jax.commands.train_settings import Train
from specauf_jax.config import Objective, TrainOptimisation

config = Train(
    target="Qwen3-8B",
    data="data/on_policy",
    out="runs/qwen3_8b_domino",
    drafter=Drafter(block_size=16, num_hidden_layers=5, mask_token_id=151_669, projector_type="domino"),
    objective=Objective("decay"),
    base_objective=Objective("auf_decay"),
    train=TrainOptimisation(steps=20_000, batch_size=64, accumulation=4, dtype="bfloat16", remat="layers"),
)
