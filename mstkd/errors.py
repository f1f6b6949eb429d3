"""The errors that end a command with one line instead of a traceback."""


class UserError(Exception):
    """Bad input. The message is one line that names the thing, the place and the fix; commands exit with code 2."""

    exit_code = 2


class TrainingError(Exception):
    """Training cannot go on, though nothing the user typed is wrong; one line, exit code 1."""

    exit_code = 1


class CasesFailedError(Exception):
    """Some of many cases could not be handled, the others are done; one line, exit code 1."""

    exit_code = 1


class FailedElsewhereError(Exception):
    """Another rank failed and says why; this one only ends, with the same exit code."""

    def __init__(self, rank: int, exit_code: int):
        super().__init__(f"rank {rank} failed and says why")
        self.exit_code = exit_code
