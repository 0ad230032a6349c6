"""Examples at the end of a command's help."""


def examples(*lines: str) -> str:
    """Return command lines as the `epilog` of a click command, each on lines of its own."""
    return "\n  ".join(("\b\nExamples:", *lines))
