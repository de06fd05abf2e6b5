"""Settings of `specauf generate`."""

from dataclasses import dataclass
from typing import Literal

from specauf_jax.checks import positive, seed
from specauf_jax.config import Dtype, Hosts, Mesh, Sampling, SamplingFlags


@dataclass(frozen=True)
class Generate:
    """Write continuations of prompts, speculatively or token by token."""

    target: str
    prompts: str
    """JSONL: {"prompt": str} or {"turns": [...]} (chat template applied, turns answered one after another)."""
    drafter: str | None = None
    """Drafter folder in z-lab layout; not needed for --method autoregressive."""
    method: Literal["speculative", "autoregressive"] = "speculative"
    max_new_tokens: int = 128
    sampling: SamplingFlags = Sampling()
    seed: int = 0
    dtype: Dtype = "float32"
    batch_size: int = 16
    out: str | None = None
    """JSONL to write; without it the text streams to the terminal, the drafter's share in colour."""
    mesh: Mesh = Mesh()
    hosts: Hosts = Hosts()

    def __post_init__(self):
        positive(self, "max_new_tokens", "batch_size")
        seed(self)
