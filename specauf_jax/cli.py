"""The command line: `specauf COMMAND [--config RECIPE.py] [--field value …]`.

Only the settings are imported before arguments are read, so that help comes at once; each command's
body, and JAX with it, is imported when it runs.
"""

import contextlib
import dataclasses
import functools
import importlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Callable

import tyro
from rich.console import Console

from specauf_jax.checks import nearest
from specauf_jax.commands.benchmark_settings import Benchmark
from specauf_jax.commands.benchmark_train_settings import BenchmarkTrain
from specauf_jax.commands.compile_settings import Compile
from specauf_jax.commands.convert_settings import Convert
from specauf_jax.commands.doctor_settings import Doctor
from specauf_jax.commands.evaluate_settings import Evaluate
from specauf_jax.commands.export_settings import Export
from specauf_jax.commands.generate_settings import Generate
from specauf_jax.commands.prepare_settings import Prepare
from specauf_jax.commands.pretrain_settings import Pretrain
from specauf_jax.commands.regenerate_settings import Regenerate
from specauf_jax.commands.report_settings import Report
from specauf_jax.commands.synthesize_settings import Synthesize
from specauf_jax.commands.train_settings import Train
from specauf_jax.errors import CannotGoOn, Outcome, SpecaufError, SpecaufWarning, Stopped, io_error
from specauf_jax.machine import check_platform, choose_platform
from specauf_jax.recipes import read_recipe
from specauf_jax.signals import INTERRUPTED

COMMANDS = {
    "convert": (Convert, "convert"),
    "prepare": (Prepare, "prepare"),
    "pretrain": (Pretrain, "pretrain"),
    "regenerate": (Regenerate, "regenerate"),
    "synthesize": (Synthesize, "synthesize"),
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
    """Run one command; returns the exit code.

    0: done. 1: a command's own no (`doctor` found an error, `compile` no room, `generate --check` a difference), or
    another host was lost. 2: input refused before the work. 3: the work cannot go on (a loss that is not finite,
    too little memory). 74: a disk or a network failed at work. 130: interrupted. 141: nobody reads the output any more.
    Launchers start 74 again, and never 2 and 3.
    """
    for stream in (sys.stdout, sys.stderr):  # a terminal that does not know a character gets "?"
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    with warnings.catch_warnings():
        show = warnings.showwarning
        warnings.showwarning = lambda message, category, *where: (
            _tell(f"warning: {message}", "yellow") if category is SpecaufWarning else show(message, category, *where)
        )
        try:
            outcome = _outcome(lambda: _main(sys.argv[1:] if arguments is None else arguments))
            sys.stdout.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python flushes again, and complains
            return 141
    if outcome.said:
        _tell(outcome.said, "red" if outcome.failed else "yellow")
    return outcome.code


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise  # as everybody else's BrokenPipeError; rich would exit with 1


def _tell(text: str, style: str) -> None:
    console = _Console(stderr=True, emoji=False)
    with contextlib.suppress(OSError):  # nobody reads it: the exit code still tells
        console.print(f"specauf: {text}", style=style, highlight=False, markup=False, soft_wrap=True)


def _main(arguments: list[str]) -> object:
    # A log has no width of its own: 80 columns, as if it were a terminal's, would cut the widest tables.
    console = _Console(soft_wrap=True, width=None if sys.stdout.isatty() else 120, markup=False, emoji=False)
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax tells of every step, and of errors that it raises too
    if not arguments or arguments[0] in ("-h", "--help"):
        console.print(_overview(), highlight=False, soft_wrap=True)
        return 0 if arguments else 2
    if arguments[0] not in COMMANDS:
        raise SpecaufError(
            f"unknown command {arguments[0]!r}{nearest(arguments[0], COMMANDS)}",
            ", ".join(COMMANDS),
            "see specauf --help",
        )
    choose_platform()
    settings, function = COMMANDS[arguments[0]]
    parsed = _parse(settings, arguments[0], arguments[1:])

    module = importlib.import_module(f"specauf_jax.commands.{arguments[0].replace('-', '_')}")
    run = functools.partial(getattr(module, function), parsed)
    if not hasattr(parsed, "hosts"):
        if "jax" in sys.modules:
            check_platform()
        return run(console)
    from specauf_jax.distributed import is_primary, together

    def as_one_of_all():
        check_platform()
        return run(console if is_primary() else Console(quiet=True))

    return together(parsed.hosts, lambda: _outcome(as_one_of_all))


def _outcome(work: Callable[[], object]) -> Outcome:
    """How `work` ended; what it returns is the outcome, or an exit code, or nothing worth a word."""
    try:
        result = work()
    except Stopped as stopped:
        return Outcome(stopped.code, f"{stopped}; the same command goes on from there")
    except SpecaufError as error:
        return Outcome(error.code, str(error), failed=True)
    except BrokenPipeError:
        raise
    except RuntimeError as error:
        if not any(said in str(error) for said in ("RESOURCE_EXHAUSTED", "Out of memory")):
            raise
        refusal = CannotGoOn(str(error).splitlines()[0], "work that fits the devices' memory",
                             "take a smaller batch, shorter texts, bfloat16 or more devices")  # fmt: skip
        return Outcome(refusal.code, str(refusal), failed=True)
    except OSError as error:  # whatever the disk or the network did where no better message was found
        failure = io_error(str(error), error, "files that can be read and written, and free space",
                           "check the path and the space left; what was saved before is whole")  # fmt: skip
        return Outcome(failure.code, str(failure), failed=True)
    except KeyboardInterrupt:
        return Outcome(INTERRUPTED, "interrupted; the same command goes on from what was saved", failed=True)
    if isinstance(result, Outcome):
        return result
    return Outcome(result if isinstance(result, int) else 0)


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
