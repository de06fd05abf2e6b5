"""Settings of `specauf regenerate`."""

from dataclasses import dataclass

from specauf_jax.checks import drafts, not_negative, positive, seed, template_arguments, unused
from specauf_jax.config import Dtype, Hosts, Mesh, Sampling, SamplingFlags, VerifySlots


@dataclass(frozen=True)
class Regenerate:
    """Replace the responses of a dataset by the target's own, so that labels are on-policy."""

    data: str
    """Folder written by `specauf prepare`."""
    target: str
    """Target folder in Hugging Face layout."""
    out: str
    """Folder to write, with the same layout as --data."""
    drafter: str | None = None
    """Drafter folder, to decode speculatively: the same answers at temperature 0, sooner."""
    verify_slots: VerifySlots = None
    """Tokens that the target verifies per round, where fewer than the drafter's block holds are faster; auto measures
    which (at temperature 0); none for all."""
    tree_nodes: int | None = None
    """Nodes of a draft tree, judged in one pass of N + 1 tokens a row; none for a chain of drafts."""
    tree_temperature: float = 1.0
    """Of the drafter's distribution by which a tree's paths are chosen. Below 1 (0.5) for drafters that were trained on
    the target's distribution, at temperature 0: the target is surer there than they are."""
    documents: int = 0
    """Documents to regenerate, spread evenly over the dataset; 0 for all."""
    prompt_length: int = 64
    """Tokens kept at the start of a document without any unsupervised prefix."""
    template_args: tuple[str, ...] = ()
    """NAME=VALUE that the data's chat template should have been rendered with; its prompts stay as they are."""
    max_new_tokens: int = 96
    batch_size: int = 64
    sampling: SamplingFlags = Sampling()
    seed: int = 0
    """Of what is drawn; at temperature 0 nothing is."""
    dtype: Dtype = "float32"
    mesh: Mesh = Mesh()
    hosts: Hosts = Hosts()

    def __post_init__(self):
        positive(self, "prompt_length", "max_new_tokens", "batch_size")
        not_negative(self, "documents")
        seed(self)
        template_arguments(self.template_args)
        drafts(self, self.sampling.temperature)
        if self.drafter is None:
            unused(self, "verify_slots", "tree_nodes", "tree_temperature", when="without --drafter")
