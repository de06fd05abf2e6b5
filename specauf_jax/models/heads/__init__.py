"""The drafters' heads, one file each: whatever class of a file here is called HEAD can be trained, served and saved."""

import dataclasses
import functools
import importlib
import json
import pkgutil

from specauf_jax.architecture import Head
from specauf_jax.checks import nearest
from specauf_jax.errors import SpecaufError
from specauf_jax.recipes import from_dict


@functools.cache
def head_types() -> dict[str, type[Head]]:
    """Projector type → class, of all files of this folder."""
    modules = [importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)]
    return {module.HEAD.projector_type: module.HEAD for module in modules}


def head_type(projector_type: str) -> type[Head]:
    """The class of a projector type.

    Raises:
      SpecaufError: there is none.
    """
    types = head_types()
    if projector_type not in types:
        raise SpecaufError(
            f"projector_type {projector_type!r}{nearest(projector_type, types)}",
            f"one of {', '.join(sorted(types))}",
            "set --drafter.projector-type",
        )
    return types[projector_type]


def make_head(projector_type: str, settings: tuple[str, ...] = ()) -> Head:
    """A head from NAME=VALUE settings.

    Raises:
      SpecaufError: naming the setting that it does not have, or that is of another type.
    """
    values = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not (name and equals and value) or name in values:
            raise SpecaufError(f"drafter.head {setting!r}", "NAME=VALUE, each name once", "correct --drafter.head")
        values[name] = _parsed(value)
    head = from_dict(head_type(projector_type), values, "drafter.head")
    if idle := [name for name in head.unread if name in values]:
        raise SpecaufError(f"drafter.head {idle[0]}={values[idle[0]]}, where it has no effect",
                           "only settings that something reads", f"leave {idle[0]} out")  # fmt: skip
    return head


def head_settings(head: Head) -> dict:
    """Names and values of a head's settings."""
    return {field.name: getattr(head, field.name) for field in dataclasses.fields(head)}


def _parsed(value: str):
    """A number, true or false; else the text itself."""
    try:
        return json.loads(value.lower() if value in ("True", "False") else value)
    except ValueError:
        return value
