"""Settings of `specauf convert`."""

from dataclasses import dataclass

from specauf_jax.config import Dtype


@dataclass(frozen=True)
class Convert:
    """Make a target's Hugging Face folder of a GGUF file, so that drafters learn from the weights that are served."""

    gguf: str
    """GGUF file of a Llama, Qwen2, Qwen3 or Gemma 3, in any quantisation; of a split one, any part."""
    out: str
    """Target folder to write."""
    dtype: Dtype = "float32"
    """Of the weights written."""
