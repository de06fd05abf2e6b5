"""Settings of `specauf synthesize`."""

from dataclasses import dataclass

from specauf_jax.checks import at_least, not_negative, positive, seed, template_arguments
from specauf_jax.config import Dtype, Hosts, Mesh, Sampling, SamplingFlags


@dataclass(frozen=True)
class Synthesize:
    """Let the target write conversations, the user's turns too: on-policy labels without any prompts (Magpie).

    The target gets what its chat template puts before a user's turn, writes that turn, and answers it.
    """

    target: str
    """Target folder in Hugging Face layout, with a chat template."""
    conversations: int
    """Different conversations to keep for training."""
    out: str
    """Folder to write: dataset/, tokenizer/, prompts/, conversations.jsonl, manifest.json."""
    turns: int = 1
    """The user's turns of each, at most; one where the chat template rewrites earlier answers."""
    heldout_prompts: int = 48
    """Conversations more, of which only the user's turns are kept, as prompts to evaluate on."""
    user_temperature: float = 1.0
    """Of the user's turns."""
    user_top_p: float = 0.95
    """Of the user's turns."""
    max_user_tokens: int = 160
    """A longer turn of the user drops its conversation."""
    max_new_tokens: int = 192
    """Of each answer."""
    sampling: SamplingFlags = Sampling()
    """Of the answers."""
    template_args: tuple[str, ...] = ()
    """NAME=VALUE for the chat template, such as enable_thinking=false; stored with the data."""
    sequence_length: int = 2048
    """S: tokens per packed row, at least 16; conversations end with their row."""
    batch_size: int = 64
    """Rows that decode together."""
    seed: int = 0
    dtype: Dtype = "float32"
    mesh: Mesh = Mesh()
    hosts: Hosts = Hosts()

    def __post_init__(self):
        positive(self, "conversations", "turns", "max_user_tokens", "max_new_tokens", "batch_size", "user_temperature")
        at_least(self, 16, "sequence_length")
        not_negative(self, "heldout_prompts")
        seed(self)
        template_arguments(self.template_args)
        Sampling(self.user_temperature, top_p=self.user_top_p)
