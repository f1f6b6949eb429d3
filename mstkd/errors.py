"""The one error a user is meant to read."""


class UserError(Exception):
    """Bad input. The message is one line that names the thing, the place and the fix; commands exit with code 2."""
