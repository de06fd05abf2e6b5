"""Settings of `specauf train`."""

from dataclasses import dataclass

from specauf_jax.architecture import Drafter
from specauf_jax.checks import unused
from specauf_jax.config import Hosts, Mesh, Objective, TrainOptimisation, one_after_another
from specauf_jax.errors import SpecaufError


@dataclass(frozen=True)
class Train:
    """Train a DFlash, Domino, DSpark or DFlash2 drafter against a frozen target."""

    target: str
    """Target folder in Hugging Face layout."""
    data: str
    """Folder written by `specauf prepare` or `specauf regenerate`."""
    out: str
    """Run folder: config.json, metrics.jsonl, TensorBoard events, checkpoints/ and drafter/ (z-lab layout)."""
    drafter: Drafter = Drafter()
    init_from: str | None = None
    """Drafter folder to fine-tune with a fresh optimiser; --drafter may only repeat what it says."""
    objective: Objective = Objective()
    objectives: str | None = None
    """One objective after another, each from a share of the steps on, such as decay@0,auf@0.8. The one that --objective
    names takes its settings from there; the others share its loss."""
    base_objective: Objective = Objective()
    """domino, dspark, dflash2: objective of the base branch; --objective is the final branch's."""
    train: TrainOptimisation = TrainOptimisation()
    mesh: Mesh = Mesh()
    hosts: Hosts = Hosts()

    def __post_init__(self):
        unused(self.base_objective, "witness", when="in base_objective, whose branch has only its own")
        firsts, names = zip(*((first, objective.name) for first, objective in self.stages), strict=True)
        if self.train.steps and (len({*firsts}) < len(firsts) or firsts[-1] >= self.train.steps):
            raise SpecaufError(
                f"objectives {self.objectives} of {self.train.steps} steps begin behind {', '.join(map(str, firsts))}",
                "a step at least for each",
                "change the shares, or raise --train.steps",
            )
        base = self.base_objective
        for _, objective in self.stages:
            tells = base.soft and base.temperature == objective.temperature
            if objective.name == "survival" and objective.witness == "base" and not tells:
                raise SpecaufError(
                    "objective survival with witness base, and a base objective that tells of no acceptance",
                    "a base_objective of survival or a soft loss, at the same temperature",
                    "change --base-objective, or --objective.witness",
                )
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
        return one_after_another(self.objectives, self.objective, self.train.steps)
