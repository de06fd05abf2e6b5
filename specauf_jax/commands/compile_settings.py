"""Settings of `specauf compile`."""

from dataclasses import dataclass
from typing import Literal

from specauf_jax.checks import at_least, not_negative, positive
from specauf_jax.config import Mesh
from specauf_jax.errors import SpecaufError

COSTLIEST = 20  # operations in the JSON


@dataclass(frozen=True)
class Compile:
    """Compile a recipe's train step and decode round for a TPU topology, without a TPU. Exit code 1: no room."""

    config: str
    """--config RECIPE.py of `specauf train`; its target: a folder with config.json, or a name such as Qwen3-8B."""
    topology: str
    """Such as v5e:4x4, v5p:2x2x4, v6e:4x4 or tpu7x:2x2x4; counts chips, of which a tpu7x has two devices."""
    slices: int = 1
    """Slices of that topology; the axis `replica` runs over them."""
    mesh: Mesh = Mesh(replica=0, fsdp=0, tensor=0)
    """Axes that are not 0 take the place of the recipe's."""
    batch_size: int | None = None
    """Rows per optimiser step over the whole mesh; None takes the recipe's."""
    accumulation: int | None = None
    """Parts that a batch is cut into; None takes the recipe's."""
    sequence_length: int = 3072
    """S: tokens per packed row."""
    decode_batch_size: int = 64
    """Rows that decode together; more where the mesh spreads rows wider."""
    decode_length: int = 4096
    """Tokens of each row that decodes, prompt and continuation; its caches have room for them."""
    tree_nodes: int | None = None
    """Nodes of a draft tree that the decode round judges; none for a chain."""
    only: Literal["train", "decode"] | None = None
    """One of the two programs; none for both."""
    code: bool = True
    """Generate code too, which takes most of the time; without it no seconds, and too few temporaries."""
    operations: int = 5
    """Costliest operations that are shown, up to 20; the JSON has 20."""
    out: str | None = None
    """JSON to write: fits, peak_bytes, hbm_bytes, and what each of train and decode needs."""

    def __post_init__(self):
        positive(self, "slices", "sequence_length", "batch_size", "accumulation", "decode_batch_size", "tree_nodes")
        at_least(self, 2, "decode_length")
        not_negative(self, "operations")
        if self.operations > COSTLIEST:
            raise SpecaufError(f"--operations {self.operations}", f"at most {COSTLIEST}", "ask for fewer")
