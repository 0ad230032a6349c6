"""Choosing the variant of context-parallel attention and the number of active ranks.

A choice depends on its arguments alone, so ranks that share a profile choose alike.
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache

from cptool.model.config import LlamaConfig
from cptool.planning.cost.exchange import PASS_KV, PASS_Q
from cptool.planning.cost.forward import Forward
from cptool.planning.cost.layer import predict
from cptool.planning.hardware import HardwareProfile
from cptool.units import duration
from cptool.variants import names

AUTO = "auto"
STATIC_ROWS = 128
"""The most sequences for the steps of `cptool.engine.static_decode`: for so few, a step's linear
layers take as long as reading their weights, so that every rank may compute all new tokens."""
EQUAL = 0.01
"""Variants whose predicted times differ by less than this part are called equal."""
RULES = ("predicted", "algorithm1", "algorithm5", "fitted")

SHORT = 4096
"""The most new tokens that fewer than all ranks may share; others found the break-even near 8K."""


@dataclass(frozen=True)
class Choice:
    """A variant, the number of ranks that share the new tokens, and the reason shown to the user.

    predicted_s: seconds per layer on the busiest rank, with a layer's part of a forward's fixed
        costs.
    """

    variant: str
    active: int
    reason: str
    predicted_s: float


def choose(
    asked: str, forward: Forward, profile: HardwareProfile, rule: str = "predicted"
) -> Choice:
    """Choose the variant for `forward`, and how many ranks share its new tokens.

    asked: a variant, which is then used, or "auto".
    forward: its number of active ranks is not read.
    rule: "predicted" takes the variant and the number of active ranks that `cptool.planning.cost`
        predicts to be fastest. The others choose between pass-kv and pass-q, on all ranks, by the
        paper's `algorithm1`, `algorithm5` (section 3.4 and appendix C) or `fitted` rule
        (appendix D).

    Raises ValueError for another rule, or for "fitted" with a profile that has no coefficients.
    """
    if rule not in RULES:
        raise ValueError(f"rule is {rule!r}; it must be one of {', '.join(RULES)}")
    # Decode chooses at every step, for one more cached token each time.
    rounded = replace(
        forward,
        new=_rounded(forward.new),
        cached=_rounded(forward.cached),
        batch=_rounded(forward.batch),
        active=forward.ranks,
    )
    return _choose(asked, rounded, profile, rule)


def _rounded(count: int) -> int:
    """Round up to five significant bits: within 7%, and few values over a whole decode."""
    unit = 1 << max(0, count.bit_length() - 5)
    return -(-count // unit) * unit


@lru_cache(maxsize=1024)
def _choose(asked: str, forward: Forward, profile: HardwareProfile, rule: str) -> Choice:
    ranks = forward.ranks

    def seconds(variant: str, active: int) -> float:
        shared = replace(forward, active=active)
        start = profile.start(variant, ranks, shared.sources) / forward.config.num_hidden_layers
        return predict(variant, shared, profile).seconds + start

    if asked != AUTO:
        return Choice(asked, ranks, "as asked", seconds(asked, ranks))
    if ranks == 1:
        return Choice(PASS_KV.name, 1, "one rank, nothing travels", seconds(PASS_KV.name, 1))
    if rule == "predicted":
        times = [
            (seconds(variant, active), order, variant, active)
            for active in _candidates(forward.new, ranks)
            for order, variant in enumerate(names())
        ]
        best = min(times)
        return Choice(best[2], best[3], _comparison(best, times, ranks), best[0])
    if rule == "fitted":
        if profile.rule is None:
            raise ValueError("profile has no coefficients of the fitted rule; calibrate it first")
        keys_travel = fitted(forward.new, forward.cached, profile.rule) > 0
        reason = "fitted rule"
    else:
        algorithm = algorithm1 if rule == "algorithm1" else algorithm5
        keys_travel = algorithm(
            forward.new,
            forward.cached,
            ranks=ranks,
            heads=forward.config.num_attention_heads,
            kv_heads=forward.config.num_key_value_heads,
            element_bytes=forward.element,
            flops=profile.attention_flops[forward.dtype],
            bandwidth=profile.link(ranks * forward.tp).bandwidth,
        )
        reason = f"algorithm {rule[-1]}"
    variant = PASS_KV.name if keys_travel else PASS_Q.name
    reason += f", miss rate {miss_rate(forward.new, forward.cached):.3g}"
    return Choice(variant, ranks, reason, seconds(variant, ranks))


def miss_rate(new: int, cached: int) -> float:
    """Return T / (T + P)."""
    return new / (new + cached)


def algorithm1(
    new: int,
    cached: int,
    *,
    ranks: int,
    heads: int,
    kv_heads: int,
    element_bytes: int,
    flops: float,
    bandwidth: float,
) -> bool:
    """Return whether keys and values travel by the paper's algorithm 1 (section 3.4).

    They do where attention hides them, `T >= N C N_KV e / (2 N_H BW)` (equation 2), or where they
    are the smaller message, `T / (T + P) >= 2 N_KV / N_H` (equation 1).

    flops: C per rank, in FLOP/s. bandwidth: BW, in B/s.
    """
    hidden = new >= ranks * flops * kv_heads * element_bytes / (2 * heads * bandwidth)
    return hidden or miss_rate(new, cached) >= 2 * kv_heads / heads


def algorithm5(
    new: int,
    cached: int,
    *,
    ranks: int,
    heads: int,
    kv_heads: int,
    element_bytes: int,
    flops: float,
    bandwidth: float,
) -> bool:
    """Return whether keys and values travel by the paper's algorithm 5 (appendix C).

    The exposed return of the partials lowers the miss rate at which queries stop paying by
    `4 T BW / (N C e)` (equation 5). The arguments are those of `algorithm1`.
    """
    hidden = new >= ranks * flops * kv_heads * element_bytes / (2 * heads * bandwidth)
    returned = 4 * new * bandwidth / (ranks * flops * element_bytes)
    return hidden or miss_rate(new, cached) >= 2 * kv_heads / heads - returned


def fitted(new: int, cached: int, rule: tuple[float, float, float]) -> float:
    """Return h(T, P) = alpha log T + beta log(T / (T + P)) + gamma, natural logs (appendix D).

    Keys and values travel where it is positive.
    """
    alpha, beta, gamma = rule
    return alpha * math.log(new) + beta * math.log(miss_rate(new, cached)) + gamma


def fit_rule(
    config: LlamaConfig, dtype: str, ranks: int, profile: HardwareProfile
) -> tuple[float, float, float]:
    """Fit (alpha, beta, gamma) such that h approximates log(time of pass-q / time of pass-kv).

    Weighted least squares over a grid of T and miss rates. The nearer the two predicted times, the
    larger the weight, because only the sign of h matters.
    """
    sums = [[0.0] * 4 for _ in range(3)]
    for exponent in range(4, 18):
        for miss in (0.003, 0.01, 0.03, 0.06, 0.12, 0.25, 0.5, 1.0):
            new = 2**exponent
            forward = Forward(
                config=config,
                dtype=dtype,
                new=new,
                cached=round(new / miss) - new,
                ranks=ranks,
                active=ranks,
            )
            keys, queries = (
                predict(v, forward, profile).seconds for v in (PASS_KV.name, PASS_Q.name)
            )
            difference = math.log(queries / keys)
            row = (math.log(new), math.log(miss_rate(new, forward.cached)), 1.0, difference)
            weight = 1 / (0.01 + difference**2)
            for i in range(3):
                for j in range(4):
                    sums[i][j] += weight * row[i] * row[j]
    return _solved(sums)


def _solved(rows: list[list[float]]) -> tuple[float, float, float]:
    """Solve three linear equations [A | b], A positive definite, by elimination."""
    for i in range(3):
        rows[i] = [value / rows[i][i] for value in rows[i]]
        for j in range(3):
            if j != i:
                factor = rows[j][i]
                rows[j] = [a - factor * b for a, b in zip(rows[j], rows[i], strict=True)]
    return rows[0][3], rows[1][3], rows[2][3]


def _candidates(new: int, ranks: int) -> list[int]:
    """Return the numbers of active ranks worth a prediction: all and, for a short prompt, halves.

    A long prompt needs all ranks for their memory alone.
    """
    counts = [ranks]
    while new <= SHORT and counts[-1] > 1:
        counts.append(counts[-1] // 2)
    return [count for count in counts if count == ranks or count < new]


def _comparison(
    best: tuple[float, int, str, int], times: list[tuple[float, int, str, int]], ranks: int
) -> str:
    """Return the seconds of the best of `times` beside those of the next variant.

    times: (seconds, order, variant, active ranks).
    """
    few = f" on {best[3]} of {ranks} ranks" if best[3] < ranks else ""
    fastest: dict[str, float] = {}
    for spent, _, name, _ in sorted(times):
        fastest.setdefault(name, spent)
    _, *others = fastest.items()
    equal = [name for name, spent in others if spent <= (1 + EQUAL) * best[0]]
    if equal:
        compared = f"{' and '.join(equal)} equal within {EQUAL:.0%}"
    else:
        compared = f"next {others[0][0]} {duration(others[0][1])}"
    return f"{duration(best[0])} per layer{few}, {compared}"
