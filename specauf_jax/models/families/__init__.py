"""Kinds of targets, a file each: what their config.json holds, and which tensors' names the general rule does not give.

What their layers compute stands in `specauf_jax.parts.BLOCKS`. A new kind is a file here, and an entry there.
"""

from specauf_jax.models.families import dense, gemma3, gpt_oss, hybrid, moe
from specauf_jax.models.families.family import Family

FAMILIES: dict[str, Family] = {
    family.model_type: family for file in (dense, moe, hybrid, gemma3, gpt_oss) for family in file.FAMILIES
}
"""By model_type of `specauf_jax.architecture.Target`."""


def family_of(architecture: str) -> Family | None:
    """By a name in config.json's architectures."""
    return next((family for family in FAMILIES.values() if architecture in family.architectures), None)
