"""What ends a command early: bad input (found, expected, what to do), or a request to stop; and what only warns."""


class SpecaufError(Exception):
    """Bad input met at an edge (config, data, checkpoint, file); never raised inside jit.

    The command line prints it without a traceback and exits with 2.
    """

    def __init__(self, found: str, expected: str, remedy: str):
        super().__init__(f"{found}\n  expected: {expected}\n  to do:    {remedy}")
        self.found, self.expected, self.remedy = found, expected, remedy


class SpecaufWarning(UserWarning):
    """What a user should know of the input; the command line prints it in yellow."""


class Stopped(Exception):
    """A training run was asked to stop and has saved its work; the command line exits with `code`."""

    def __init__(self, saved: str, code: int):
        super().__init__(saved)
        self.code = code
