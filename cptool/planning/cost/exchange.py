"""The variants of context-parallel attention: the record of each, with its cost.

A cost is that of one layer on the busiest rank, from what the variant's code in
`cptool.parallel.attention` computes and sends. The records come last, in the order that decides
between equal predictions.
"""

from __future__ import annotations

from dataclasses import dataclass

from cptool.planning.cost.forward import Forward
from cptool.planning.cost.rates import Rates
from cptool.planning.hardware import HardwareProfile
from cptool.variants import MessageBytes, Variant, find, register


@dataclass(kw_only=True)
class AttentionCost:
    """Seconds and bytes so far; see `cptool.planning.cost.forward.Prediction`."""

    attention_s: float = 0.0
    merge_s: float = 0.0
    exposed_s: float = 0.0
    overhead_s: float = 0.0
    hidden_s: float = 0.0
    bytes: float = 0.0

    @property
    def now(self) -> float:
        """Seconds since the first step began."""
        return self.attention_s + self.merge_s + self.exposed_s + self.overhead_s

    def wait(self, exposed: float, whole: float) -> None:
        """Add a transfer of `whole` seconds, of which compute does not hide `exposed`."""
        self.exposed_s += exposed
        self.hidden_s += max(0.0, whole - exposed)


def attention_cost(variant: str, rates: Rates) -> AttentionCost:
    """Return the cost of a variant by name. Raise OptionError if there is none of that name."""
    forward, record = rates.forward, find(variant)
    cost = _alone(rates) if forward.ranks == 1 else record.cost(rates)
    if not forward.decoding:
        cost.overhead_s += waiting(forward, rates.profile)
    return cost


def waiting(forward: Forward, profile: HardwareProfile) -> float:
    """Return the seconds per layer of a prefill that neither compute nor transfers explain."""
    together = forward.ranks * profile.wait_s if forward.ranks > 1 else 0.0
    return together + forward.cached_keys * profile.cached_key_s


def _alone(rates: Rates) -> AttentionCost:
    forward = rates.forward
    return AttentionCost(attention_s=rates.attention(forward.pairs, forward.keys, forward.queries))


def _pass_kv(rates: Rates) -> AttentionCost:
    """Return the cost of pass-kv.

    A step lasts as long as the longer of its attention and its transfer (paper, section 3.3).
    """
    forward, crowd, cost = rates.forward, rates.crowd(rates.forward.sources), AttentionCost()
    block = forward.sent_keys * forward.kv_width * forward.kv_element
    for step in range(forward.ranks):
        fresh = step < forward.sources
        pairs = forward.cached_pairs + fresh * forward.new_pairs
        new_keys = forward.sent_new_keys if step else forward.queries
        keys = forward.cached_keys + fresh * new_keys
        spent = crowd * rates.attention(pairs, keys, forward.queries, received=step > 0)
        running = crowd * _running(rates) if step else 0.0
        cost.attention_s += spent
        cost.merge_s += running
        if step < forward.ranks - 1:
            latency, moving = rates.message(block)
            cost.wait(rates.exposed(spent + running, latency, moving), latency + moving)
    cost.merge_s += crowd * _merged(rates, 2, _local_partial(forward))
    cost.bytes = (forward.ranks - 1) * block
    return cost


def _gather_kv(rates: Rates) -> AttentionCost:
    """Return the cost of gather-kv: ranks without queries send their keys and receive none."""
    forward, sources = rates.forward, rates.forward.sources
    width = forward.kv_width * forward.kv_element
    tokens = float(forward.cached + forward.new)
    if forward.window is not None:
        tokens = forward.ranks * forward.cached_keys + sources * forward.sent_new_keys
    everything = tokens * width
    own = forward.sent_keys * width
    # This rank's own block is copied in, and all blocks are sorted by position. The order itself is
    # computed once for all layers.
    ordering = rates.touch(2 * own + 2 * everything, calls=2)
    ordering += tokens * rates.profile.position_s / forward.config.num_hidden_layers
    whole = rates.attention(forward.pairs, tokens, forward.queries, received=True)
    sent = (sources - 1) * own
    if sources < forward.ranks:
        sent = max(sent, sources * forward.cached_keys * width)
    givers = forward.ranks if forward.cached else sources
    return AttentionCost(
        attention_s=rates.crowd(sources) * whole,
        merge_s=rates.crowd(sources) * ordering,
        exposed_s=rates.collective(max(everything - own, sent), givers - 1, receivers=sources)
        if givers > 1
        else 0.0,
        bytes=sent,
    )


def _pass_q(rates: Rates, early: bool = True) -> AttentionCost:
    """Return the cost of pass-q.

    early: partials return while queries go round the ring, and only the last one is late; otherwise
    all return at the end.
    """
    forward, cost = rates.forward, AttentionCost()
    ranks, sources = forward.ranks, forward.sources
    crowd = rates.crowd(ranks if forward.cached else sources)
    block = forward.queries * forward.query_width * forward.element
    partial = forward.partial(forward.queries)
    arrived = 0.0  # when the partials sent so far reach their owners
    for step in range(ranks):
        # Other ranks have no queries, but pass queries on; the last one that computes for this rank
        # begins only once the queries have arrived there.
        spent = packed = 0.0
        if step < sources or step == ranks - 1:
            pairs = forward.cached_pairs + forward.new_pairs
            spent = crowd * rates.attention(pairs, forward.queried_keys, forward.queries)
            packed = crowd * rates.touch(2 * partial)
        cost.attention_s += spent
        cost.merge_s += packed
        if step < ranks - 1:
            # A rank without queries of its own has nothing to do until some arrive.
            cover = spent + packed if sources == ranks else 0.0
            latency, moving = rates.message(block)
            cost.wait(rates.exposed(cover, latency, moving), latency + moving)
        if step:
            latency, moving = rates.message(partial)
            arrived = max(cost.now, arrived) + latency + moving
    if early:
        whole = (ranks - 1) * sum(rates.message(partial))
        late = max(0.0, arrived - cost.now)
        cost.wait(max(late, rates.profile.transfer_steals * whole), whole)
    else:
        cost.exposed_s += rates.collective((ranks - 1) * partial, ranks - 1)
    cost.merge_s += crowd * _merged(rates, ranks)
    cost.bytes = (ranks - 1) * block + (sources - 1) * partial
    return cost


def _pass_q_all2all(rates: Rates) -> AttentionCost:
    return _pass_q(rates, early=False)


def _gather_q(rates: Rates) -> AttentionCost:
    forward, ranks, sources = rates.forward, rates.forward.ranks, rates.forward.sources
    crowd = rates.crowd(ranks if forward.cached else sources)
    asked = sources * forward.queries * forward.query_width * forward.element
    partials = forward.partial(sources * forward.queries)
    pairs = sources * (forward.cached_pairs + forward.new_pairs)
    spent = rates.attention(pairs, forward.keys, sources * forward.queries)
    # Nothing is launched for ranks without queries.
    copied = rates.touch(4 * asked, calls=2) + rates.touch(4 * partials, calls=3 * sources)
    mine = asked / sources
    queries_out = (ranks - 1) * mine
    # Idle ranks return partials of all queries, and each active one receives from all others.
    answers = max((ranks - 1) * partials / sources, partials if ranks > sources else 0.0)
    return AttentionCost(
        attention_s=crowd * spent,
        merge_s=crowd * (copied + _merged(rates, ranks)),
        exposed_s=rates.collective(max(queries_out, asked - mine), ranks - 1)
        + rates.collective(answers, ranks - 1),
        bytes=queries_out + (sources - 1) * partials / sources,
    )


def _all_q(rates: Rates) -> AttentionCost:
    """Return the cost of a static decode step.

    Every rank has all queries, and one all-gather returns the partials.
    """
    forward, ranks = rates.forward, rates.forward.ranks
    partial = forward.partial(forward.new)
    pairs = forward.new * forward.cached_keys / forward.batch + forward.new
    spent = rates.attention(pairs, forward.keys, forward.new)
    written = forward.new * forward.query_width * forward.element
    copied = rates.touch(2 * partial) + rates.touch(ranks * partial + written)
    return AttentionCost(
        attention_s=rates.crowd(ranks) * spent,
        merge_s=rates.crowd(ranks) * copied,
        exposed_s=rates.collective((ranks - 1) * partial, ranks - 1),
        bytes=(ranks - 1) * partial,
    )


def _running(rates: Rates) -> float:
    """Return the seconds to read and write the running float32 result that a kernel merges into."""
    return rates.touch(2 * _local_partial(rates.forward), calls=0)


def _local_partial(forward: Forward) -> float:
    """Return the bytes of a partial of this rank's queries that stays here: float32."""
    return forward.queries * (forward.query_width + forward.heads) * 4


def _merged(rates: Rates, partials: int, each: float | None = None) -> float:
    """Return the seconds to merge partials of this rank's queries: read all, write the result.

    each: bytes of one partial; by default, of one as it travels.
    """
    forward = rates.forward
    each = forward.partial(forward.queries) if each is None else each
    written = forward.queries * forward.query_width * forward.element
    return rates.touch(partials * each + written)


def _ring_buffers(block: float, ranks: int) -> float:
    """Return the bytes of the buffers that a ring receives blocks in."""
    return min(2, ranks - 1) * block


def _query_buffers(sizes: MessageBytes) -> float:
    """Return the bytes of the contiguous copy of q that is sent first, and of the partials that
    are sent and received, this rank's own among them.
    """
    return sizes.queries + (2 * sizes.ranks - 1) * sizes.partial


def _gather_q_buffers(sizes: MessageBytes) -> float:
    """Return the bytes of all queries in order, of the partials over them as they are computed and
    as they are sent, and of those received; the queries as they arrived are gone by then.
    """
    partials = 2 * sizes.all_partials + sizes.ranks * sizes.partial
    return sizes.all_queries + max(partials, sizes.queries + sizes.all_queries)


PASS_KV = register(
    Variant(
        name="pass-kv",
        travels="blocks of K and V, round a ring",
        section="3.2, algorithm 2",
        cost=_pass_kv,
        buffers=lambda sizes: sizes.packed + 2 * sizes.running,
        kept=lambda sizes: _ring_buffers(sizes.block, sizes.ranks),
        keys_travel=True,
        ring=True,
        published=True,
    )
)
GATHER_KV = register(
    Variant(
        name="gather-kv",
        travels="K and V of all ranks at once",
        section="",
        cost=_gather_kv,
        buffers=lambda sizes: sizes.packed,
        kept=lambda sizes: 2 * sizes.everything,
        keys_travel=True,
        collectives=1,
    )
)
PASS_Q = register(
    Variant(
        name="pass-q",
        travels="queries, round a ring; each partial result returns as soon as it is computed",
        section="",
        cost=_pass_q,
        buffers=_query_buffers,
        kept=lambda sizes: _ring_buffers(sizes.queries, sizes.ranks),
        ring=True,
        published_form="pass-q-all2all",
    )
)
GATHER_Q = register(
    Variant(
        name="gather-q",
        travels="queries of all ranks at once, then all partial results",
        section="",
        cost=_gather_q,
        buffers=_gather_q_buffers,
        collectives=2,
    )
)
PASS_Q_ALL2ALL = register(
    Variant(
        name="pass-q-all2all",
        travels="queries, round a ring; all partial results return at its end",
        section="3.3, algorithm 3",
        cost=_pass_q_all2all,
        buffers=_query_buffers,
        kept=lambda sizes: _ring_buffers(sizes.queries, sizes.ranks),
        ring=True,
        collectives=1,
        baseline=True,
        published=True,
    )
)
ALL_Q = register(
    Variant(
        name="all-q",
        travels="partial results: every rank computes the queries of all",
        section="",
        cost=_all_q,
        buffers=_query_buffers,
        collectives=1,
        static=True,
    )
)
