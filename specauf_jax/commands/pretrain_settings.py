"""Settings of `specauf pretrain`."""

from dataclasses import dataclass

from specauf_jax.architecture import Target
from specauf_jax.config import Hosts, Mesh, Optimisation


@dataclass(frozen=True)
class Pretrain:
    """Train a small Qwen3-architecture target on a prepared dataset."""

    data: str
    """Folder written by `specauf prepare`."""
    out: str
    """Run folder: config.json, metrics.jsonl, TensorBoard events, checkpoints/ and target/ (Hugging Face layout)."""
    target: Target = Target()
    """vocab_size is taken from the dataset's tokenizer."""
    train: Optimisation = Optimisation(learning_rate=3e-3, weight_decay=0.1)
    mesh: Mesh = Mesh()
    hosts: Hosts = Hosts()
