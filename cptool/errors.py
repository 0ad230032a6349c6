"""Errors that are told in one line."""


class UserError(ValueError):
    """A mistake in what the user gave: one line that says the value, the rule and the remedy.

    The command line prints it and exits with code 2; nothing was changed.
    """


class RunError(RuntimeError):
    """A failure while running, told in one line that is all there is to know: no traceback."""
