"""Settings of `specauf doctor`."""

from dataclasses import dataclass

from specauf_jax.checks import not_negative, positive, template_arguments, unused
from specauf_jax.config import Dtype


@dataclass(frozen=True)
class Doctor:
    """Check a drafter folder against its target, by reading and by decoding; exit code 1 on an error."""

    target: str
    """Target folder in Hugging Face layout."""
    drafter: str
    """Drafter folder in z-lab or SpecForge layout."""
    prompts: str | None = None
    """JSONL as for `specauf generate`, best like those of the drafter's use; None takes 16 built-in texts."""
    template_args: tuple[str, ...] = ()
    """NAME=VALUE for the chat template, such as enable_thinking=false; none takes those of the drafter's training."""
    max_prompts: int = 32
    """Prompts decoded under every reading of the folder; 0 only reads the files."""
    max_new_tokens: int = 48
    single_ids: bool = True
    """Also decode with each target layer id off by one, not only with all of them."""
    batch_size: int = 16
    dtype: Dtype = "float32"
    out: str | None = None
    """JSON to write: findings, measured, engines, summary, meta."""

    def __post_init__(self):
        positive(self, "max_new_tokens", "batch_size")
        not_negative(self, "max_prompts")
        template_arguments(self.template_args)
        if not self.max_prompts:
            decoding = ("prompts", "template_args", "max_new_tokens", "single_ids", "batch_size", "dtype")
            unused(self, *decoding, when="with --max-prompts 0, where nothing is decoded")
