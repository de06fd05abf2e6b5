"""`specauf` and `python -m specauf_jax`."""

import os
import sys

from specauf_jax.errors import IOFailed
from specauf_jax.signals import INTERRUPTED, interruptible


def run() -> int:
    """The command line as a process; Ctrl-C ends it from its first moment on."""
    _open_streams()
    with interruptible():
        try:
            from specauf_jax.cli import main

            code = main()
        except KeyboardInterrupt:
            code = INTERRUPTED
    if code == IOFailed.code:  # what runs at Python's end would write once more, and complain at length
        os._exit(code)
    return code


def _open_streams() -> None:
    """Give a process that was started without a standard stream an empty one, or its next file would take the place."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 (for as long as the process)


if __name__ == "__main__":
    sys.exit(run())
