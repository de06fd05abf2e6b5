"""`specauf` and `python -m specauf_jax`."""

import sys

from specauf_jax.signals import INTERRUPTED, interruptible


def run() -> int:
    """The command line as a process; Ctrl-C ends it from its first moment on."""
    with interruptible():
        try:
            from specauf_jax.cli import main

            return main()
        except KeyboardInterrupt:
            return INTERRUPTED


if __name__ == "__main__":
    sys.exit(run())
