"""Settings of `specauf benchmark`."""

from dataclasses import dataclass

from specauf_jax.checks import at_least, drafts, positive, template_arguments, unused
from specauf_jax.config import Dtype, Hosts, Mesh, VerifySlots
from specauf_jax.errors import SpecaufError


@dataclass(frozen=True)
class Benchmark:
    """Measure speed and latency of decoding: the target alone, prompt lookup, drafters, at several batch sizes.

    Greedy; every method in turn within each repeat, so that a machine's moods hit all alike.
    """

    target: str
    """Target folder in Hugging Face layout."""
    prompts: str
    """JSONL as for `specauf generate`; of several turns the first."""
    out: str
    """JSON to write: decoding, meta."""
    template_args: tuple[str, ...] = ()
    """NAME=VALUE for the chat template, such as enable_thinking=false."""
    drafters: tuple[str, ...] = ()
    """NAME=DIR: drafter folders."""
    verify_slots: VerifySlots = None
    """Tokens that the target verifies per round, where fewer than the drafter's block holds are faster; auto measures
    which (at temperature 0); none for all."""
    tree_nodes: tuple[int, ...] = ()
    """Sizes of draft trees, each measured beside the chain of every drafter as NAME/tree N."""
    tree_temperature: float = 1.0
    """Of the drafter's distribution by which a tree's paths are chosen. Below 1 (0.5) for drafters that were trained on
    the target's distribution, at temperature 0: the target is surer there than they are."""
    batch_sizes: tuple[int, ...] = (1, 4, 16, 64)
    """Rows that decode together."""
    max_prompts: int = 16
    """Prompts at each batch size, from the file's start, or a batch if that is more; a short file is used again."""
    max_new_tokens: int = 128
    repeats: int = 5
    """Timed passes of every method, after one to warm up."""
    lookup_block_size: int = 8
    """Prompt lookup: tokens verified per round."""
    lookup_ngram: int = 3
    """Prompt lookup: most tokens that an earlier place must share with the end of the text."""
    dtype: Dtype = "float32"
    mesh: Mesh = Mesh()
    hosts: Hosts = Hosts()

    def __post_init__(self):
        positive(self, "max_prompts", "max_new_tokens", "repeats", "lookup_ngram")
        at_least(self, 2, "lookup_block_size")
        template_arguments(self.template_args)
        drafts(self)
        if self.tree_nodes and not self.drafters:
            unused(self, "tree_nodes", when="without --drafters")
        if not self.batch_sizes or min(self.batch_sizes) < 1 or len({*self.batch_sizes}) < len(self.batch_sizes):
            raise SpecaufError(f"batch_sizes {self.batch_sizes}", "different counts of rows", "pass 1 4 16 64")
