"""Checks of single values, shared by all settings; each names the field, what it holds and what it should."""

import dataclasses
import difflib
import json
import math
from typing import Any

from specauf_jax.errors import SpecaufError


def nearest(name: str, names) -> str:
    """A question about the closest of `names`, to append to a message; empty if none is close."""
    close = difflib.get_close_matches(name, list(names), 1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def positive(config, *names: str) -> None:
    """Fields above 0, or None."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise SpecaufError(f"{name} is {value}", "a number above 0", f"change {name}")


def at_least(config, least: int, *names: str) -> None:
    """Fields of at least `least`, or None."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value >= least:
            raise SpecaufError(f"{name} is {value}", f"{least} or more", f"change {name}")


def not_negative(config, *names: str) -> None:
    """Fields of at least 0, or None."""
    at_least(config, 0, *names)


def seed(config) -> None:
    """A seed that every generator takes."""
    if not 0 <= config.seed < 2**31:
        raise SpecaufError(f"seed is {config.seed}", "a whole number from 0 to 2147483647", "change seed")


def choice(config, name: str, choices) -> None:
    """A field that is one of a few words."""
    value = getattr(config, name)
    if value not in choices:
        raise SpecaufError(
            f"{name} is {value!r}{nearest(str(value), choices)}", f"one of {', '.join(choices)}", f"change {name}"
        )


def named(flag: str, arguments: tuple[str, ...], kind: str, *, taken: tuple[str, ...] = ()) -> dict[str, str]:
    """NAME=VALUE arguments by name, each name once.

    Args:
      flag: for messages, with its dashes.
      arguments: as given.
      kind: what a value is, for messages.
      taken: names that are not free.
    """
    found: dict[str, str] = {}
    for argument in arguments:
        name, _, value = argument.partition("=")
        if not (name and value):
            raise SpecaufError(f"{flag} {argument}", f"NAME={kind}", "put a name and an equals sign before it")
        if name in found or name in taken:
            raise SpecaufError(f"{flag} names {name} twice", "a name for each", "give them different names")
        found[name] = value
    return found


def template_arguments(arguments: tuple[str, ...]) -> dict[str, Any]:
    """Values of --template-args NAME=VALUE by name: JSON where they are, text otherwise."""
    found: dict[str, Any] = {}
    for name, value in named("--template-args", arguments, "VALUE").items():
        try:
            found[name] = json.loads(value)
        except (ValueError, RecursionError):
            found[name] = {"True": True, "False": False, "None": None}.get(value, value)
    return found


def unused(config, *names: str, when: str) -> None:
    """Refuse fields that nothing reads: they must hold their defaults.

    Args:
      config: settings of a dataclass.
      names: of its fields.
      when: what makes them useless, to follow their value in the message: "with --method autoregressive".
    """
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for name in names:
        value = getattr(config, name)
        if value != defaults[name]:
            raise SpecaufError(
                f"{name} is {value!r} {when}, where it has no effect",
                "only settings that something reads",
                f"leave {name} out, or set it to {defaults[name]!r}",
            )


def drafts(settings, temperature: float = 0.0) -> None:
    """`settings.verify_slots`, `tree_nodes` and `tree_temperature` must be possible.

    The clock chooses a width only where that changes nothing. A width has no meaning for a tree, a tree's temperature
    none for a chain.
    """
    positive(settings, "tree_temperature")
    if settings.tree_temperature == math.inf:
        raise SpecaufError("tree_temperature is inf", "a finite number above 0", "set it to 1, or leave it out")
    if not settings.tree_nodes:
        unused(settings, "tree_temperature", when="without tree_nodes")
    asked, sizes = settings.verify_slots, settings.tree_nodes
    several = isinstance(sizes, tuple)  # each beside the chain
    for nodes in sizes if several else () if sizes is None else (sizes,):
        if nodes < 1:
            raise SpecaufError(f"tree_nodes is {nodes}", "at least 1", "set it to 8 or more, or leave it out")
    if several and len({*sizes}) < len(sizes):
        raise SpecaufError(f"tree_nodes {sizes}", "different sizes", "name each once")
    if sizes is not None and not several and asked is not None:
        raise SpecaufError(
            f"verify_slots {asked} with tree_nodes {sizes}", "a chain of so many slots, or a tree", "leave one out"
        )
    if asked == "auto" and temperature > 0:
        raise SpecaufError(
            "verify_slots auto above temperature 0",
            "a number: what is drawn depends on it, and the clock would choose it",
            "say --verify-slots N, or leave it out",
        )
    if asked not in (None, "auto") and asked < 2:
        raise SpecaufError(f"verify_slots is {asked}", "at least 2, the anchor and one draft", "set it to 2 or more")
