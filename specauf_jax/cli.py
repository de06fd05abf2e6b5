"""The command line: `specauf COMMAND [--config RECIPE.py] [--field value …]`.

Only the settings are imported before arguments are read, so that help comes at once; each command's
body, and JAX with it, is imported when it runs.
"""

import dataclasses
import importlib
import logging
import sys

import tyro
from rich.console import Console

from specauf_jax import config
from specauf_jax.checks import nearest
from specauf_jax.errors import SpecaufError

COMMANDS = {
    "prepare": (config.Prepare, "specauf_jax.data.prepare", "prepare"),
    "pretrain": (config.Pretrain, "specauf_jax.commands.pretrain", "pretrain"),
    "regenerate": (config.Regenerate, "specauf_jax.commands.regenerate", "regenerate"),
    "train": (config.Train, "specauf_jax.commands.train", "train"),
    "generate": (config.Generate, "specauf_jax.commands.generate", "generate"),
    "evaluate": (config.Evaluate, "specauf_jax.commands.evaluate", "evaluate"),
    "export": (config.Export, "specauf_jax.commands.export", "export"),
    "doctor": (config.Doctor, "specauf_jax.commands.doctor", "doctor"),
    "compile": (config.Compile, "specauf_jax.commands.compile", "compile_step"),
    "report": (config.Report, "specauf_jax.evaluation.report", "write_report"),
}
"""Name → its settings, and the module and function that does it."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 2 bad input, 130 interrupted.

    1 is a command's own no: `doctor` found an error, `compile` found no room.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    console = Console(soft_wrap=True)
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax tells of every step it takes
    if not arguments or arguments[0] in ("-h", "--help"):
        console.print(_overview(), highlight=False, markup=False, soft_wrap=True)
        return 0 if arguments else 2
    try:
        if arguments[0] not in COMMANDS:
            raise SpecaufError(
                f"unknown command {arguments[0]!r}{nearest(arguments[0], COMMANDS)}",
                ", ".join(COMMANDS),
                "see specauf --help",
            )
        settings, module, function = COMMANDS[arguments[0]]
        parsed = _parse(settings, arguments[0], arguments[1:])
        result = getattr(importlib.import_module(module), function)(parsed, console)
    except SpecaufError as error:
        Console(stderr=True).print(f"specauf: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        return 2
    except OSError as error:  # whatever the disk or the network did where no better message was found
        trouble = SpecaufError(str(error), "files that can be read and written, and free space",
                               "check the path and the space left; what was saved before is whole")  # fmt: skip
        Console(stderr=True).print(f"specauf: {trouble}", style="red", highlight=False, markup=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        Console(stderr=True).print("specauf: interrupted; the same command goes on from what was saved")
        return 130
    return result if isinstance(result, int) else 0


def _parse(settings: type, command: str, arguments: list[str]):
    """Command-line arguments over a recipe over the defaults."""
    default, is_field = None, any(field.name == "config" for field in dataclasses.fields(settings))
    if "--config" in arguments and not is_field:
        at = arguments.index("--config")
        if at + 1 == len(arguments):
            raise SpecaufError("--config without a file", "--config RECIPE.py", "name the recipe")
        default = config.read_recipe(settings, arguments[at + 1])
        arguments = arguments[:at] + arguments[at + 2 :]
    description = settings.__doc__
    if not is_field:
        description += "\n\n--config RECIPE.py takes its values from a recipe first."
    return tyro.cli(settings, prog=f"specauf {command}", args=arguments, default=default, description=description)


def _overview() -> str:
    lines = [f"  {name:<11} {settings.__doc__.splitlines()[0]}" for name, (settings, *_) in COMMANDS.items()]
    return "\n".join(
        [
            "specauf COMMAND [--config RECIPE.py] [--field value …]",
            "",
            *lines,
            "",
            "specauf COMMAND --help lists a command's settings.",
        ]
    )
