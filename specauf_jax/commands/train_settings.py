"""Settings of `specauf train`."""

from dataclasses import dataclass

from specauf_jax.architecture import Drafter
from specauf_jax.checks import unused
from specauf_jax.config import Hosts, Mesh, Objective, TrainOptimisation, one_after_another
from specauf_jax.errors import SpecaufError


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
    objectives: str | None = None
    """One objective after another, each from a share of the steps on, such as decay@0,auf@0.8. The one that --objective
    names takes its settings from there; the others share its loss."""
    base_objective: Objective = Objective()
    """domino: objective of the base branch; --objective is the final branch's."""
    train: TrainOptimisation = TrainOptimisation()
    mesh: Mesh = Mesh()
    hosts: Hosts = Hosts()

    def __post_init__(self):
        unused(self.base_objective, "witness", when="in base_objective, whose branch has only its own")
        names = [objective.name for _, objective in self.stages]
        if self.objectives and self.objective != Objective() and self.objective.name not in names:
            raise SpecaufError(
                f"objective.name {self.objective.name} with objectives {self.objectives}",
                "settings of one of these",
                "correct --objective.name",
            )

    @property
    def stages(self) -> list[tuple[int, Objective]]:
        """Objectives one after another, each with the number of steps before it."""
        if self.objectives is None:
            return [(0, self.objective)]
        stages = one_after_another(self.objectives, self.objective)
        return [(round(share * self.train.steps), objective) for share, objective in stages]
