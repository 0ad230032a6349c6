"""Errors that are the user's to mend."""


class UserError(ValueError):
    """A mistake in what the user gave: one line that says the value, the rule and the remedy.

    The command line prints it and exits with code 2; nothing was changed.
    """
