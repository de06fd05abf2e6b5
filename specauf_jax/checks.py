"""Checks of single values, shared by all settings; each names the field, what it holds and what it should."""

import dataclasses
import difflib

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


def not_negative(config, *names: str) -> None:
    """Fields of at least 0."""
    for name in names:
        value = getattr(config, name)
        if not value >= 0:
            raise SpecaufError(f"{name} is {value}", "0 or more", f"change {name}")


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
