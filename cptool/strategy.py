"""Which variant of context-parallel attention moves the least, now."""

from dataclasses import dataclass

AUTO = "auto"


@dataclass(frozen=True)
class Choice:
    """A variant and the reason for it, in words that the command line shows."""

    variant: str
    reason: str


def choose(
    asked: str, *, new: int, cached: int, ranks: int, q_heads: int, kv_heads: int, head_dim: int, element_bytes: int
) -> Choice:
    """Picks the variant for `new` tokens (T) over `cached` ones (P) on `ranks` CP ranks (N).

    Either the KV of all tokens travels, `2 (T + P) N_KV D_H e` bytes, hidden under attention in a ring; or the queries
    travel and their float32 partials come back, `T N_H (D_H e + 4 D_H + 4)` bytes, on the critical path. This is
    equation 1 of the paper with the return of the partials counted, as its equation 5 does.
    """
    if asked != AUTO:
        return Choice(asked, "as asked")
    if ranks == 1:
        return Choice("pass-kv", "one rank, nothing travels")
    kv = 2 * (new + cached) * kv_heads * head_dim * element_bytes
    queries = new * q_heads * (head_dim * (element_bytes + 4) + 4)
    if queries < kv:
        return Choice("gather-q", f"queries and partials {_size(queries)} a layer < keys and values {_size(kv)}")
    return Choice("pass-kv", f"keys and values {_size(kv)} a layer, hidden under attention, <= queries and partials {_size(queries)}")


def _size(count: int) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} GiB"
