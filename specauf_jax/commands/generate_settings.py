"""Settings of `specauf generate`."""

from dataclasses import dataclass
from typing import Literal

from specauf_jax.checks import drafts, positive, seed, template_arguments, unused
from specauf_jax.config import Dtype, Hosts, Mesh, Sampling, SamplingFlags, VerifySlots
from specauf_jax.errors import SpecaufError


@dataclass(frozen=True)
class Generate:
    """Write continuations of prompts, speculatively or token by token."""

    target: str
    prompts: str
    """JSONL: {"prompt": str}, {"turns": [...]} (chat template applied, turns answered one after another), or
    conversations, whose user turns are taken; compressed by gzip or not."""
    drafter: str | None = None
    """Drafter folder, for --method speculative."""
    method: Literal["speculative", "autoregressive"] = "speculative"
    template_args: tuple[str, ...] = ()
    """NAME=VALUE for the chat template, such as enable_thinking=false; none takes those of the drafter's training."""
    verify_slots: VerifySlots = None
    """Tokens that the target verifies per round, where fewer than the drafter's block holds are faster; auto measures
    which (at temperature 0); none for all."""
    tree_nodes: int | None = None
    """Nodes of a draft tree, judged in one pass of N + 1 tokens a row; none for a chain of drafts."""
    tree_temperature: float = 1.0
    """Of the drafter's distribution by which a tree's paths are chosen. Below 1 (0.5) for drafters that were trained on
    the target's distribution, at temperature 0: the target is surer there than they are."""
    max_new_tokens: int = 128
    sampling: SamplingFlags = Sampling()
    seed: int = 0
    """Of what is drawn; at temperature 0 nothing is."""
    dtype: Dtype = "float32"
    batch_size: int = 16
    """Rows that decode together; with --out."""
    out: str | None = None
    """JSONL to write; without it the text streams to the terminal, the drafter's share in colour."""
    check: bool = False
    """Also decode without the drafter and compare; exit code 1 if texts differ by more than rounding."""
    mesh: Mesh = Mesh()
    hosts: Hosts = Hosts()

    def __post_init__(self):
        positive(self, "max_new_tokens", "batch_size")
        seed(self)
        template_arguments(self.template_args)
        drafts(self, self.sampling.temperature)
        if self.method == "autoregressive":
            unused(
                self,
                "drafter",
                "check",
                "verify_slots",
                "tree_nodes",
                "tree_temperature",
                when="with --method autoregressive",
            )
        elif self.drafter is None:
            raise SpecaufError(
                "--method speculative without --drafter",
                "a drafter folder",
                "pass --drafter DIR or --method autoregressive",
            )
        if self.sampling.temperature > 0:
            unused(self, "check", when="above temperature 0, where only distributions agree")
        if self.out is None:
            unused(self, "batch_size", "check", when="without --out, where one row streams at a time")
