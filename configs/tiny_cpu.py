"""The quickstart's drafter: one layer, blocks of 8, against a target of 1.1 M parameters, with `auf`.

    specauf train --config configs/tiny_cpu.py --target runs/quickstart/target --data runs/quickstart/data --out RUN

Hardware: one CPU core. Expected time: about a minute. Expected tau: 3.2 to 3.4 over the quickstart's four domains
(with `--objective.name decay` 2.4 to 3.0).
"""

from specauf_jax.architecture import Drafter
from specauf_jax.commands.train_settings import Train
from specauf_jax.config import TrainOptimisation

config = Train(
    target="runs/quickstart/target",
    data="runs/quickstart/data",
    out="runs/quickstart/train_auf",
    drafter=Drafter(block_size=8, num_hidden_layers=1),
    train=TrainOptimisation(
        steps=800,
        batch_size=8,
        num_anchors=12,
        learning_rate=5e-3,
        warmup_ratio=0.05,
        checkpoint_every=200,
        decode_every=200,
    ),
)
