"""Settings of `specauf evaluate`."""

from dataclasses import dataclass

from specauf_jax.checks import drafts, not_negative, positive, seed, template_arguments
from specauf_jax.config import Dtype, Hosts, Mesh, Sampling, SamplingFlags, VerifySlots


@dataclass(frozen=True)
class Evaluate:
    """Measure tau, acceptance, exactness and speed of a drafter on prompt sets."""

    target: str
    drafter: str
    prompts: tuple[str, ...]
    """NAME=FILE.jsonl, one or more."""
    out: str
    """JSON to write: overall, sets, meta."""
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
    max_prompts: int = 0
    """Prompts used of each set, from its start; 0 for all."""
    repeats: int = 3
    """Timed passes over each set, after one warm-up pass."""
    mesh: Mesh = Mesh()
    hosts: Hosts = Hosts()

    def __post_init__(self):
        positive(self, "max_new_tokens", "batch_size", "repeats")
        not_negative(self, "max_prompts")
        seed(self)
        template_arguments(self.template_args)
        drafts(self, self.sampling.temperature)
