"""What a kind of targets says of its files."""

from collections.abc import Callable
from dataclasses import dataclass

from specauf_jax.architecture import ModelType, Target

SEES = "ForConditionalGeneration"  # ends the name of a model whose language part, in text_config, is one of several


def as_usual(values: dict, config: Target) -> dict:
    """config.json of a kind that has nothing of its own."""
    return values


@dataclass(frozen=True)
class Family:
    """One kind."""

    model_type: ModelType
    title: str
    """Its name for people."""
    architectures: dict[str, str]
    """Names in config.json → the model_type beside; the first is written."""
    read: Callable[[dict, str], tuple[dict, dict]]
    """(config.json or its text_config, its name for messages) → the same with the common keys in their usual form, and
    fields of `Target` that only this kind has. Raises SpecaufError for what is not computed here."""
    write: Callable[[dict, Target], dict] = as_usual
    """(config.json with the common keys, architecture) → config.json."""
    keys: tuple[str, ...] = ()
    """Those that `read` looks at, beside the common ones."""
    bodies: tuple[str, ...] = ("model.",)
    """What may stand before all tensors' names but the head's; the first is written."""
    unread: tuple[str, ...] = ()
    """Beginnings of names of tensors that are no part of the language model."""
    mxfp4: bool = False
    """Whether experts may be stored so."""
