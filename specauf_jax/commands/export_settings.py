"""Settings of `specauf export`."""

from dataclasses import dataclass
from typing import Literal

from specauf_jax.checks import unused
from specauf_jax.config import Dtype
from specauf_jax.errors import SpecaufError


@dataclass(frozen=True)
class Export:
    """Write a drafter for other systems, from a training run or a drafter folder.

    Give exactly one source: --run or --drafter.
    """

    out: str
    """Drafter folder to write."""
    run: str | None = None
    """Run folder of `specauf train`."""
    step: Literal["last", "best"] | int = "last"
    """Checkpoint of the run to take."""
    drafter: str | None = None
    """Drafter folder in any of these layouts."""
    layout: Literal["zlab", "specforge", "speculators"] = "zlab"
    """zlab: SGLang, vLLM, tpu-inference, sglang-jax. specforge: the same, but Domino and DSpark under the
    architectures that SpecForge trains. speculators: DFlash, DSpark and DFlash2 with its own keys; names the target."""
    dtype: Dtype = "float32"
    """Of the file."""
    target: str | None = None
    """Target folder, for --layout speculators; None takes the run's."""

    def __post_init__(self):
        if (self.run is None) == (self.drafter is None):
            raise SpecaufError(
                "both --run and --drafter" if self.run else "neither --run nor --drafter",
                "one source",
                "pass the run folder of `specauf train`, or a drafter folder",
            )
        if self.run is None:
            unused(self, "step", when="with --drafter")
        if self.layout != "speculators":
            unused(self, "target", when=f"with --layout {self.layout}, which names no target")
