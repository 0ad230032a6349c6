"""Times, sizes and counts as users read them."""


def duration(seconds: float) -> str:
    """Return seconds as `1,205.30 s`, `12.02 s`, `195 ms`, `1.82 ms` or `47 us`."""
    for unit, scale in (("us", 1e6), ("ms", 1e3)):
        shown = f"{scale * seconds:.3g}"
        if abs(float(shown)) < 1000:
            return f"{shown} {unit}"
    return f"{seconds:,.2f} s"


def size(count: float) -> str:
    """Return a number of bytes as `700 B`, `1.5 MB` or `2 TB`."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB" if count < 1000 else f"{count:,.0f} TB"


def some(count: int, noun: str) -> str:
    """Return a count and its noun, as `1 token` or `2,000 tokens`."""
    return f"{count:,} {noun}{'s' * (count != 1)}"
