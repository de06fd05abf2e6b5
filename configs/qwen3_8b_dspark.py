"""A DSpark drafter of five layers, blocks of 8, for Qwen3-8B: rows of 3,072 tokens, 64 a step.

    specauf train --config configs/qwen3_8b_dspark.py --target TARGET --data DATA --out RUN

Hardware: 16 v5e chips (v5e:4x4) or more; by `specauf compile --no-code` 5.20 GiB of each chip's 15.75 GiB there.
Expected time: not yet measured. 5,682 TFLOP a step: 4.51 s on 16 v5e or 0.97 s on 16 v6e chips at 40 % of their peak,
so that 20,000 steps would take 25 or 5 hours.
Expected tau: not yet measured.

The objective is DSpark's own (arXiv 2607.05147): 0.1 of the label's cross-entropy and 0.9 of the L1 distance to the
target's distribution, which is 1.8 of the total variation, earlier slots counting more; and the confidence head's loss
beside. Labels are shifted, as in the public drafters, so that vLLM and sglang-jax serve what comes out.
"""

from specauf_jax.architecture import Drafter
from specauf_jax.commands.train_settings import Train
from specauf_jax.config import Objective, TrainOptimisation

config = Train(
    target="Qwen3-8B",
    data="data/on_policy",
    out="runs/qwen3_8b_dspark",
    drafter=Drafter(block_size=8, num_hidden_layers=5, mask_token_id=151_669, projector_type="dspark"),
    objective=Objective("decay", "ce=0.1,tv=1.8"),
    train=TrainOptimisation(steps=20_000, batch_size=64, accumulation=4, dtype="bfloat16", remat="layers"),
)
