"""Times as users read them."""


def duration(seconds: float) -> str:
    """`1,205.30 s`, `12.02 s`, `195 ms`, `1.82 ms`, `47 us`."""
    for unit, scale in (("us", 1e6), ("ms", 1e3)):
        shown = f"{scale * seconds:.3g}"
        if abs(float(shown)) < 1000:
            return f"{shown} {unit}"
    return f"{seconds:,.2f} s"
