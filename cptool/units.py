"""Times, sizes and counts as users read them."""


def duration(seconds: float) -> str:
    """`1,205.30 s`, `12.02 s`, `195 ms`, `1.82 ms`, `47 us`."""
    for unit, scale in (("us", 1e6), ("ms", 1e3)):
        shown = f"{scale * seconds:.3g}"
        if abs(float(shown)) < 1000:
            return f"{shown} {unit}"
    return f"{seconds:,.2f} s"


def size(count: float) -> str:
    """`700 B`, `1.5 MB`, `2 TB`: a number of bytes."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB" if count < 1000 else f"{count:,.0f} TB"


def some(count: int, noun: str) -> str:
    """`1 token`, `2,000 tokens`."""
    return f"{count:,} {noun}{'s' * (count != 1)}"
