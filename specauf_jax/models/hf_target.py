"""config.json ↔ targets, in Hugging Face layout.

Nothing is guessed: sizes and the RoPE base must be written in the file, and what this project would compute
differently (another activation, biases, a quantised file) is refused.
"""

from specauf_jax.architecture import Target
from specauf_jax.errors import SpecaufError
from specauf_jax.models.families import FAMILIES, family_of
from specauf_jax.models.families.family import SEES
from specauf_jax.models.hf_keys import check_keys
from specauf_jax.models.hf_values import (
    SIZES,
    architecture_of,
    build,
    flag,
    object_of,
    refuse,
    shared_fields,
    shared_json,
)
from specauf_jax.parts import BLOCKS

TARGET_ARCHITECTURES = {name: family.model_type for family in FAMILIES.values() for name in family.architectures}
"""Names in config.json → model_type of `Target`."""
_KEYS = (
    *(*SIZES, "rms_norm_eps", "hidden_act", "rope_theta", "rope_scaling", "rope_parameters"),
    *("original_max_position_embeddings", "layer_types", "sliding_window", "use_sliding_window"),
    *("attention_bias", "mlp_bias", "quantization_config", "tie_word_embeddings", "is_causal"),
)


def target_keys(architecture: str | None = None) -> tuple[str, ...]:
    """Keys of a target's config.json that are read here, in its text_config where it has one."""
    family = family_of(architecture or "")
    return (*_KEYS, *(family.keys if family else ()))


def read_target(values: dict, where: str) -> Target:
    """The architecture that a target's config.json describes.

    Args:
      values: as parsed.
      where: the file's name, for messages.

    Raises:
      SpecaufError: naming the key that is missing, wrong or not supported.
    """
    architecture = architecture_of(values, where)
    family = family_of(architecture)
    if family is None:
        raise SpecaufError(
            f"{where}: architecture {architecture!r}",
            f"one of {', '.join(TARGET_ARCHITECTURES)}",
            f"use a checkpoint of {', '.join(family.title for family in FAMILIES.values())}",
        )
    wanted = family.architectures[architecture]
    if values.get("model_type", wanted) != wanted:
        raise SpecaufError(
            f"{where}: model_type {values['model_type']!r} under {architecture}", f"{wanted!r}", "correct the file"
        )
    if architecture.endswith(SEES):
        values, where = _text_of(values, where), f"{where}: text_config"
    biases = () if BLOCKS[family.model_type].qkv_bias else ("attention_bias",)
    refuse(values, where, *biases, "mlp_bias", *(() if family.mxfp4 else ("quantization_config",)))
    check_keys(values, where, target_keys(architecture))
    values, fields = family.read(values, where)
    if values.get("is_causal") not in (None, True):
        raise SpecaufError(f"{where}: is_causal is {values['is_causal']!r}", "true", "use a causal language model")
    tied = flag(values, where, "tie_word_embeddings")
    shared = shared_fields(values, where)
    return build(Target, where, **shared, model_type=family.model_type, tie_word_embeddings=tied, **fields)


def text_config(values: dict) -> dict:
    """A sound config.json without what it says of other parts than the language model."""
    [architecture] = values["architectures"]
    return values["text_config"] | {"architectures": [architecture]} if architecture.endswith(SEES) else values


def _text_of(values: dict, where: str) -> dict:
    """The language model's part of a file of a model that sees, too; its other parts are not read."""
    text = object_of(values, where, "text_config")
    tied = [place["tie_word_embeddings"] for place in (values, text) if place.get("tie_word_embeddings") is not None]
    if tied and any(value != tied[0] for value in tied):
        raise SpecaufError(f"{where}: tie_word_embeddings is {tied[0]!r}, in text_config {tied[1]!r}", "one value",
                           "correct the file")  # fmt: skip
    refuse(values, where, "quantization_config")
    if text.get("model_type") not in (None, f"{values.get('model_type')}_text"):
        raise SpecaufError(f"{where}: text_config is of model_type {text['model_type']!r}",
                           f"'{values.get('model_type')}_text'", "use another model")  # fmt: skip
    return text | ({"tie_word_embeddings": tied[0]} if tied else {})


def write_target(config: Target, eos_token_id: int | None = None) -> dict:
    """config.json of a target, in Hugging Face layout."""
    family = FAMILIES[config.model_type]
    architecture, kind = next(iter(family.architectures.items()))
    return family.write(shared_json(config, kind), config) | {
        "architectures": [architecture],
        "tie_word_embeddings": config.tie_word_embeddings,
        "eos_token_id": eos_token_id,
    }
