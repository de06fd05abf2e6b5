"""Settings from files: recipes, which are Python, and what runs have stored of theirs, which is JSON."""

import dataclasses
import runpy
import typing
from pathlib import Path
from typing import Literal

from specauf_jax.checks import nearest
from specauf_jax.errors import SpecaufError


def read_recipe(settings: type, path: str):
    """The `config` that a recipe, a Python file, defines; of class `settings`."""
    if not Path(path).is_file():
        raise SpecaufError(f"{path} does not exist", "a recipe, such as configs/tiny_cpu.py", "check the path")
    try:
        recipe = runpy.run_path(path).get("config")
    except SpecaufError:
        raise
    except Exception as error:  # a recipe is a program
        raise SpecaufError(
            f"{path} cannot be run: {type(error).__name__}: {error}",
            "a recipe, such as configs/tiny_cpu.py",
            "correct it",
        ) from error
    if not isinstance(recipe, settings):
        raise SpecaufError(
            f"{path} defines config = {type(recipe).__name__}",
            f"config = {settings.__name__}(…)",
            f"use a recipe for `specauf {settings.__name__.lower()}`",
        )
    return recipe


def flatten(tree: dict, prefix: str = "") -> dict:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    flat: dict = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def from_dict(cls, values: dict, where: str):
    """The inverse of `dataclasses.asdict`; unknown keys and wrong types are refused by name.

    Args:
      cls: a dataclass of this module.
      values: as read from JSON.
      where: the file's name, for messages.
    """
    if not isinstance(values, dict):
        raise SpecaufError(f"{where} is {values!r}", f"the fields of {cls.__name__}", "correct the value")
    hints = typing.get_type_hints(cls)
    hints = {field.name: hints[field.name] for field in dataclasses.fields(cls)}
    for key in values:
        if key not in hints:
            raise SpecaufError(
                f"{where}: unknown field {key!r} of {cls.__name__}{nearest(key, hints)}",
                "a field of this version",
                "remove or rename the field",
            )
    return cls(**{key: _coerce(hints[key], value, f"{where}: {key}") for key, value in values.items()})


def _coerce(hint, value, where: str):
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, where)
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, type(int | None)) else (hint,)
    for option in options:
        if dataclasses.is_dataclass(option) and isinstance(value, dict):
            return from_dict(option, value, where)
        if typing.get_origin(option) is tuple and isinstance(value, list | tuple):
            return tuple(value)
        if typing.get_origin(option) is Literal and value in typing.get_args(option):
            return value
        if option is float and type(value) is int:
            return float(value)
        if isinstance(option, type) and type(value) is option:
            return value
    raise SpecaufError(f"{where} is {value!r}", f"{hint}", "correct the value")
