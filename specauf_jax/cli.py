"""The command line: `specauf COMMAND [--config RECIPE.py] [--field value …]`.

Only the settings are imported before arguments are read, so that help comes at once; each command's
body, and JAX with it, is imported when it runs.
"""

import dataclasses
import importlib
import logging
import sys
import warnings
from collections.abc import Callable

import tyro
from rich.console import Console

from specauf_jax.checks import nearest
from specauf_jax.commands.benchmark_settings import Benchmark
from specauf_jax.commands.benchmark_train_settings import BenchmarkTrain
from specauf_jax.commands.compile_settings import Compile
from specauf_jax.commands.doctor_settings import Doctor
from specauf_jax.commands.evaluate_settings import Evaluate
from specauf_jax.commands.export_settings import Export
from specauf_jax.commands.generate_settings import Generate
from specauf_jax.commands.prepare_settings import Prepare
from specauf_jax.commands.pretrain_settings import Pretrain
from specauf_jax.commands.regenerate_settings import Regenerate
from specauf_jax.commands.report_settings import Report
from specauf_jax.commands.train_settings import Train
from specauf_jax.errors import SpecaufError, SpecaufWarning, Stopped
from specauf_jax.recipes import read_recipe

COMMANDS = {
    "prepare": (Prepare, "prepare"),
    "pretrain": (Pretrain, "pretrain"),
    "regenerate": (Regenerate, "regenerate"),
    "train": (Train, "train"),
    "generate": (Generate, "generate"),
    "evaluate": (Evaluate, "evaluate"),
    "benchmark": (Benchmark, "benchmark"),
    "benchmark-train": (BenchmarkTrain, "benchmark_train"),
    "export": (Export, "export"),
    "doctor": (Doctor, "doctor"),
    "compile": (Compile, "compile_recipe"),
    "report": (Report, "write_report"),
}
"""Name → its settings, and the function that does it, in the module of `specauf_jax.commands` with that name."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 2 bad input, 130 interrupted.

    1 is a command's own no: `doctor` found an error, `compile` found no room, another host was lost.
    """
    with warnings.catch_warnings():
        show = warnings.showwarning
        warnings.showwarning = lambda message, category, *where: (
            _tell(f"warning: {message}", "yellow") if category is SpecaufWarning else show(message, category, *where)
        )
        return _reported(lambda: _main(sys.argv[1:] if arguments is None else arguments))


def _main(arguments: list[str]) -> int:
    # A log has no width of its own: 80 columns, as if it were a terminal's, would cut the widest tables.
    console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 120)
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax tells of every step it takes
    if not arguments or arguments[0] in ("-h", "--help"):
        console.print(_overview(), highlight=False, markup=False, soft_wrap=True)
        return 0 if arguments else 2
    if arguments[0] not in COMMANDS:
        raise SpecaufError(
            f"unknown command {arguments[0]!r}{nearest(arguments[0], COMMANDS)}",
            ", ".join(COMMANDS),
            "see specauf --help",
        )
    settings, function = COMMANDS[arguments[0]]
    parsed = _parse(settings, arguments[0], arguments[1:])

    def run(console=console):
        module = importlib.import_module(f"specauf_jax.commands.{arguments[0].replace('-', '_')}")
        return getattr(module, function)(parsed, console)

    if not hasattr(parsed, "hosts"):
        return run()
    from specauf_jax.distributed import is_primary, joined

    with joined(parsed.hosts):  # which waits for the others at its end, so that errors are told inside it
        return _reported(run if is_primary() else lambda: run(Console(quiet=True)))


def _reported(work: Callable[[], object]) -> int:
    """What `work` returns if it is an exit code, else 0; of an error, what it means to the user."""
    try:
        result = work()
    except Stopped as stopped:
        _tell(f"{stopped}; the same command goes on from there", "yellow")
        return stopped.code
    except SpecaufError as error:
        _tell(str(error))
        return 2
    except OSError as error:  # whatever the disk or the network did where no better message was found
        _tell(str(SpecaufError(str(error), "files that can be read and written, and free space",
                               "check the path and the space left; what was saved before is whole")))  # fmt: skip
        return 2
    except KeyboardInterrupt:
        _tell("interrupted; the same command goes on from what was saved")
        return 130
    return result if isinstance(result, int) else 0


def _tell(text: str, style: str = "red") -> None:
    console = Console(stderr=True)
    console.print(f"specauf: {text}", style=style, highlight=False, markup=False, soft_wrap=True)


def _parse(settings: type, command: str, arguments: list[str]):
    """Command-line arguments over a recipe over the defaults."""
    default, is_field = None, any(field.name == "config" for field in dataclasses.fields(settings))
    arguments = [part for a in arguments for part in (a.split("=", 1) if a.startswith("--config=") else [a])]
    if "--config" in arguments and not is_field:
        at = arguments.index("--config")
        if at + 1 == len(arguments):
            raise SpecaufError("--config without a file", "--config RECIPE.py", "name the recipe")
        default = read_recipe(settings, arguments[at + 1])
        arguments = arguments[:at] + arguments[at + 2 :]
    description = str(settings.__doc__)
    if not is_field:
        description += "\n\n--config RECIPE.py takes its values from a recipe first."
    return tyro.cli(settings, prog=f"specauf {command}", args=arguments, default=default, description=description)


def _overview() -> str:
    lines = [f"  {name:<15} {str(settings.__doc__).splitlines()[0]}" for name, (settings, *_) in COMMANDS.items()]
    return "\n".join(
        [
            "specauf COMMAND [--config RECIPE.py] [--field value …]",
            "",
            *lines,
            "",
            "specauf COMMAND --help lists a command's settings.",
        ]
    )
