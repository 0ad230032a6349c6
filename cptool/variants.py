"""What is known of a variant of context-parallel attention without running it.

A variant is a choice of messages between ranks. Its record, with its cost, is registered in
`cptool.planning.cost.exchange`, which needs no torch; the function that computes it is registered
in `cptool.parallel.attention`. Nothing else lists variants by name: the command line's choices, the
strategies, the measurements and the predictions all read these records.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cptool.errors import OptionError

if TYPE_CHECKING:
    from cptool.planning.cost.exchange import AttentionCost
    from cptool.planning.cost.rates import Rates


@dataclass(frozen=True, kw_only=True)
class MessageBytes:
    """Sizes in bytes of what can travel in one layer, per rank; `ranks` is their number.

    block: K and V of the fullest rank; packed: a copy of it, where its slots are not contiguous.
    everything: K and V of all ranks. queries, partial: q of this rank's new tokens, and a partial
    result over them as it travels; running: one that kernels merge into, in float32. all_queries,
    all_partials: of the new tokens of all ranks.
    """

    ranks: int
    block: float
    packed: float
    everything: float
    queries: float
    partial: float
    running: float
    all_queries: float
    all_partials: float


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One variant of context-parallel attention.

    travels: what moves between the ranks, in words.
    section: where the paper describes it; empty if it does not.
    cost: seconds and bytes of the attention of one layer on the busiest rank.
    buffers: bytes of what attention allocates for its messages and partial results, beside its
        result, and frees at its end.
    kept: bytes of receive buffers that stay from layer to layer.
    keys_travel: K and V of other ranks arrive, so every rank must know all their positions.
    ring: blocks move from neighbour to neighbour under the attention over the one before.
    collectives: exchanges per layer in which all ranks take part at once, which nothing hides.
    baseline: measured against, never chosen by "auto".
    static: the steps of `cptool.engine.static_decode`, which cannot be requested by name.
    published: one of the two that the paper's own system runs.
    published_form: name of the variant that the paper's own system runs in place of this one; empty
        if there is none.
    """

    name: str
    travels: str
    section: str
    cost: Callable[[Rates], AttentionCost]
    buffers: Callable[[MessageBytes], float]
    keys_travel: bool = False
    ring: bool = False
    collectives: int = 0
    baseline: bool = False
    static: bool = False
    kept: Callable[[MessageBytes], float] = lambda sizes: 0.0
    published: bool = False
    published_form: str = ""


_REGISTERED: dict[str, Variant] = {}


def register(variant: Variant) -> Variant:
    """Add a variant after those registered before; ValueError for a name that is taken."""
    if variant.name in _REGISTERED:
        raise ValueError(f"variant {variant.name!r} is registered already")
    _REGISTERED[variant.name] = variant
    return variant


def records() -> tuple[Variant, ...]:
    """Return all variants, in the order that decides between equal predictions."""
    import cptool.planning.cost.exchange  # noqa: F401  registers those of this package

    return tuple(_REGISTERED.values())


def names(*, baselines: bool = False) -> tuple[str, ...]:
    """Return the variants that "auto" chooses from; with `baselines`, all that can be requested by
    name.
    """
    return tuple(v.name for v in records() if not v.static and (baselines or not v.baseline))


def find(name: str) -> Variant:
    """Return the record of a variant. Raise OptionError if there is none of that name."""
    for variant in records():
        if variant.name == name:
            return variant
    raise unknown(name)


def unknown(name: str) -> OptionError:
    """Return the error for a name that is no variant's."""
    return OptionError("variant", name, f"it must be one of {', '.join(names(baselines=True))}")
