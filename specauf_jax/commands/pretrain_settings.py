"""Settings of `specauf pretrain`."""

from dataclasses import dataclass

from specauf_jax.architecture import Target
from specauf_jax.config import Hosts, Mesh, Optimisation
from specauf_jax.errors import SpecaufError


@dataclass(frozen=True)
class Pretrain:
    """Train a small target on a prepared dataset."""

    data: str
    """Folder written by `specauf prepare`."""
    out: str
    """Run folder: config.json, metrics.jsonl, TensorBoard events, checkpoints/ and target/ (Hugging Face layout)."""
    target: Target = Target()
    """vocab_size is taken from the dataset's tokenizer."""
    train: Optimisation = Optimisation(learning_rate=3e-3, weight_decay=0.1)
    mesh: Mesh = Mesh()
    hosts: Hosts = Hosts()

    def __post_init__(self):
        if self.target.block.sinks:
            raise SpecaufError(f"a target of model_type {self.target.model_type}", "one without attention sinks, whose "
                               "attention has a gradient", "choose another model_type")  # fmt: skip
