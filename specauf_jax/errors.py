"""What ends a command early: bad input (found, expected, what to do), or a request to stop; and what only warns."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


class SpecaufError(Exception):
    """Bad input met at an edge (config, data, checkpoint, file); never raised inside jit.

    The command line prints it without a traceback and exits with `code`: 2, not worth another try.
    """

    code = 2

    def __init__(self, found: str, expected: str, remedy: str):
        super().__init__(f"{found}\n  expected: {expected}\n  to do:    {remedy}")
        self.found, self.expected, self.remedy = found, expected, remedy


class CannotGoOn(SpecaufError):
    """What was begun cannot be finished, nor would another try: a loss that is not finite, too little memory."""

    code = 3


class IOFailed(SpecaufError):
    """A disk or a network failed at work: another try may succeed (EX_IOERR of sysexits.h)."""

    code = 74


_WRONG_PATHS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError)


def io_error(found: str, error: OSError, expected: str, remedy: str) -> SpecaufError:
    """What an OSError means: a path that cannot be right, or a failure that another try may get over."""
    return (SpecaufError if isinstance(error, _WRONG_PATHS) else IOFailed)(found, expected, remedy)


@contextmanager
def at_work() -> Iterator[None]:
    """Inside, errors are not of the input, which was looked at before, but of a disk, a network or the work itself."""
    try:
        yield
    except SpecaufError as error:
        if type(error) is not SpecaufError:
            raise
        raise CannotGoOn(error.found, error.expected, error.remedy) from error
    except OSError as error:
        raise IOFailed(str(error), "files that can be read and written, and free space",
                       "look at the disk, then run again: it goes on from what was saved") from error  # fmt: skip


class SpecaufWarning(UserWarning):
    """What a user should know of the input; the command line prints it in yellow."""


class Stopped(Exception):
    """A training run was asked to stop and has saved its work; the command line exits with `code`."""

    def __init__(self, saved: str, code: int):
        super().__init__(saved)
        self.code = code


@dataclass(frozen=True)
class Outcome:
    """How a command ended: its exit code, what to say of it, and whether an error ended it."""

    code: int
    said: str = ""
    failed: bool = False
