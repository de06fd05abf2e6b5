"""What ends a command early: bad input (what was found, what was expected, what to do), or a request to stop."""


class SpecaufError(Exception):
    """Bad input met at an edge (config, data, checkpoint, file); never raised inside jit.

    The command line prints it without a traceback and exits with 2.
    """

    def __init__(self, found: str, expected: str, remedy: str):
        super().__init__(f"{found}\n  expected: {expected}\n  to do:    {remedy}")
        self.found, self.expected, self.remedy = found, expected, remedy


class Stopped(Exception):
    """A training run was asked to stop and has saved its work; the command line exits with `code`."""

    def __init__(self, saved: str, code: int):
        super().__init__(saved)
        self.code = code
