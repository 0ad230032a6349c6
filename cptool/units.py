"""Times, sizes, rates and counts as users read them: three significant digits, units that fit."""

import math

# A unit, the unit of the rest, the seconds of each, and how many of the first make a larger one.
_LONG = (
    ("min", "s", 60, 1, 60),
    ("h", "min", 3600, 60, 24),
    ("d", "h", 86400, 3600, math.inf),
)


def three(value: float) -> str:
    """Return a number with three significant digits and no exponent: `0.152`, `87.7`, `1,210`."""
    if value == 0:
        return "0"
    if abs(value) < 1e-4:
        return f"{value:.2e}"
    shown = f"{value:.3g}"
    return f"{float(shown):,.0f}" if abs(float(shown)) >= 100 else shown


def duration(seconds: float) -> str:
    """Return seconds as `47 us`, `1.82 ms`, `87.7 s`, `20 min 5 s`, `2 h 7 min` or `3 d 15 h`."""
    for unit, scale in (("us", 1e6), ("ms", 1e3), ("s", 1)):
        limit = 100 if unit == "s" else 1000
        if abs(float(f"{scale * seconds:.3g}")) < limit:
            return f"{three(scale * seconds)} {unit}"
    sign, left = ("-" if seconds < 0 else ""), abs(seconds)
    for large, small, length, part, most in _LONG:
        whole, rest = divmod(round(left / part), length // part)
        if whole < most:
            return f"{sign}{whole:,} {large}" + (f" {rest} {small}" if rest else "")
    raise ValueError(f"{seconds} s is not a finite duration")


def size(count: float) -> str:
    """Return a number of bytes as `700 B`, `1.5 MB` or `2 TB`; a kB is 1,000 bytes."""
    return _scaled(count, ("B", "kB", "MB", "GB", "TB"))


def byte_rate(bytes_per_s: float) -> str:
    """Return bytes per second as `7.39 GB/s`."""
    return f"{size(bytes_per_s)}/s"


def flop_rate(flops: float) -> str:
    """Return FLOP per second as `40 GFLOP/s` or `1.52 TFLOP/s`."""
    return _scaled(flops, ("FLOP/s", "kFLOP/s", "MFLOP/s", "GFLOP/s", "TFLOP/s", "PFLOP/s"))


def token_rate(tokens_per_s: float) -> str:
    """Return tokens per second as `403 tokens/s` or `1.5 tokens/s`."""
    return f"{three(tokens_per_s)} tokens/s"


def percent(fraction: float | None) -> str:
    """Return a fraction as `0.4%`, `63%` or `34 times`, "" for None."""
    if fraction is None:
        return ""
    if fraction >= 9.995:  # never 1000%
        return f"{three(fraction)} times"
    return f"{three(100 * fraction) if abs(fraction) < 0.01 else f'{100 * fraction:.0f}'}%"


def some(count: int, noun: str) -> str:
    """Return a count and its noun, as `1 token` or `2,000 tokens`."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def _scaled(value: float, units: tuple[str, ...]) -> str:
    """Return the value in the unit, each 1,000 times the one before, that leaves it below 1,000."""
    *smaller, last = units
    for unit in smaller:
        if abs(float(f"{value:.3g}")) < 1000:
            return f"{three(value)} {unit}"
        value /= 1000
    return f"{three(value)} {last}"
