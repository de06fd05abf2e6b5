"""Settings of `specauf train`."""

from dataclasses import dataclass

from specauf_jax.architecture import Drafter
from specauf_jax.checks import unused
from specauf_jax.config import Hosts, Mesh, Objective, TrainOptimisation


@dataclass(frozen=True)
class Train:
    """Train a DFlash or Domino drafter against a frozen target."""

    target: str
    """Target folder in Hugging Face layout."""
    data: str
    """Folder written by `specauf prepare` or `specauf regenerate`."""
    out: str
    """Run folder: config.json, metrics.jsonl, TensorBoard events, checkpoints/ and drafter/ (z-lab layout)."""
    drafter: Drafter = Drafter()
    init_from: str | None = None
    """Drafter folder (z-lab layout) to fine-tune with a fresh optimiser; --drafter may only repeat what it says."""
    objective: Objective = Objective()
    base_objective: Objective = Objective()
    """domino: objective of the base branch; --objective is the final branch's."""
    train: TrainOptimisation = TrainOptimisation()
    mesh: Mesh = Mesh()
    hosts: Hosts = Hosts()

    def __post_init__(self):
        unused(self.base_objective, "witness", when="in base_objective, whose branch has only its own")
