"""Settings of `specauf benchmark-train`."""

from dataclasses import dataclass

from specauf_jax.checks import positive
from specauf_jax.config import Hosts, Mesh, ObjectiveName
from specauf_jax.errors import SpecaufError


@dataclass(frozen=True)
class BenchmarkTrain:
    """Measure the speed of training: whole steps, several objectives in turn, and the parts of a step."""

    config: str
    """--config RECIPE.py of `specauf train`. Its target may be Qwen3-4B, Qwen3-8B or Qwen3-32B, with random weights.
    Without its data, rows are full of random tokens."""
    out: str
    """JSON to write: training, meta."""
    drafter: str | None = None
    """Drafter folder, whose weights the step starts from: they decide how many slots `auf` needs. None
    takes the recipe's `init_from`, or random weights."""
    objectives: tuple[ObjectiveName, ...] = ("auf", "decay")
    """One after another within each repeat. The recipe's own (of several one after another that of --objective)
    keeps its settings, the others share its loss."""
    repeats: int = 5
    """Timed steps of every objective, after those that warm up."""
    sequence_length: int = 3072
    """S: tokens per row of random tokens."""
    mesh: Mesh = Mesh(replica=0, fsdp=0, tensor=0)
    """Axes that are not 0 take the place of the recipe's."""
    hosts: Hosts = Hosts()

    def __post_init__(self):
        positive(self, "repeats", "sequence_length")
        if not self.objectives or len({*self.objectives}) < len(self.objectives):
            raise SpecaufError(f"objectives {self.objectives}", "one or more different ones", "pass auf decay")
