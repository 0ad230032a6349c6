"""The variants of context-parallel attention: what travels between the ranks, and when.

Every rank holds some new queries and some of the keys and values. Partial results over any parts of
the keys merge exactly (paper, appendix B; `cptool.parallel.partials`), so each variant is a choice
of messages. Only q, K and V, or partials travel: `Step` gives every rank all positions.

- pass-kv: KV blocks go round a ring, hidden under attention over the previous one (algorithm 2).
- gather-kv: all KV at once, then one attention; no overlap, but one kernel call.
- pass-q: queries go round the ring, partials return to their owners on the way (algorithm 3).
- pass-q-all2all: the paper's own form of it, all partials return at the end.
- gather-q: all queries at once, one attention on the local KV, one exchange of partials.

With a window, keys that no query of another rank sees do not travel.

Partials are merged by the rank of their keys, 0 to N - 1, whatever the order of arrival: the same
ranks and variant give the same bits in every run.

The record of each variant, with its cost, is in `cptool.planning.cost.exchange`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from cptool.cache import NEVER, LayerKV
from cptool.parallel.partials import Partial, attention, merge, merge_messages, pack
from cptool.parallel.ring import Ring
from cptool.parallel.step import Scores, Step
from cptool.sharding import Placement
from cptool.variants import unknown


class AttentionFunction(Protocol):
    """The function of a variant; arguments and result are those of `attend`."""

    def __call__(
        self, q: torch.Tensor, kv: LayerKV, step: Step, *, ring: Ring, scores: Scores
    ) -> torch.Tensor: ...


FUNCTIONS: dict[str, AttentionFunction] = {}
"""The function of each variant in `cptool.variants` that is not static."""


def computes(name: str) -> Callable[[AttentionFunction], AttentionFunction]:
    """Register the decorated function as that of the variant `name`."""

    def register(function: AttentionFunction) -> AttentionFunction:
        FUNCTIONS[name] = function
        return function

    return register


def attend(
    variant: str, q: torch.Tensor, kv: LayerKV, step: Step, *, ring: Ring, scores: Scores
) -> torch.Tensor:
    """Compute attention of this rank's queries over the keys of all ranks. Collective.

    q: [Tq, Hq, D], the new tokens step.queries[step.rank]. kv: this rank's KV of the layer, with
    the new tokens stored. Returns [Tq, Hq, D] in q's dtype.

    Raises OptionError for an unknown variant, and what `attention_partial` and `Ring` raise.
    """
    if variant not in FUNCTIONS:
        raise unknown(variant)
    if ring.size == 1:
        mine = step.queries[step.rank]
        return over_local(q, mine, kv, scores=scores, out_dtype=q.dtype)[0]
    return FUNCTIONS[variant](q, kv, step, ring=ring, scores=scores)


@computes("pass-kv")
def pass_kv(
    q: torch.Tensor, kv: LayerKV, step: Step, *, ring: Ring, scores: Scores
) -> torch.Tensor:
    """Send KV blocks round a ring.

    Rank k sees sources k..N-1 and then 0..k-1. Each run ascends, so each has one running result,
    merged into by the kernel; joining the low run to the high one gives the order 0..N-1.
    """
    mine, sent = step.queries[step.rank], step.travelling(scores.window)
    low = high = None
    for source, block in ring.blocks(kv.packed(sent.rows), sent.sizes):
        if not step.has_queries[step.rank]:
            continue  # only passed on
        if source == step.rank:
            if step.key_sizes[source]:
                high = over_local(q, mine, kv, scores=scores, margin=ring.margin)
        elif not sent.sizes[source]:
            continue
        elif source > step.rank:
            high = _over_block(
                q, mine, block, sent.keys[source], scores=scores, into=high, margin=ring.margin
            )
        else:
            low = _over_block(
                q, mine, block, sent.keys[source], scores=scores, into=low, margin=ring.margin
            )
    partials = [partial for partial in (low, high) if partial is not None]
    if not partials:  # no queries, or no key that they could see
        return torch.zeros_like(q)
    return merge(partials, q.dtype)


@computes("gather-kv")
def gather_kv(
    q: torch.Tensor, kv: LayerKV, step: Step, *, ring: Ring, scores: Scores
) -> torch.Tensor:
    """Gather all KV, put it in sequence order, then compute one attention.

    The op needs ascending positions, and the ranks' chunks interleave, so one row gather puts the
    received blocks in order at the speed of memory. The wire takes several times as long, and
    sending each run of positions straight into its place would take a message for each one.
    Ranks without queries send their keys and receive none.
    """
    sent = step.travelling(scores.window)
    leaving = kv.packed(sent.rows)
    if not step.has_queries[step.rank]:
        ring.gather(leaving, sent.sizes, readers=step.has_queries)
        return torch.empty_like(q)
    keys, order, sizes, rows = step.gathered(scores.window)
    local = leaving if rows is None else kv.packed(rows)
    received = ring.buffer("received", keys.tokens, local)
    parts = received.split(sizes)
    parts[step.rank].copy_(local)
    if rows is None:
        leaving = parts[step.rank]
    ring.gather(leaving, sizes, into=parts, readers=step.has_queries)
    ordered = ring.buffer("ordered", keys.tokens, local)
    torch.index_select(received.flatten(1), 0, order, out=ordered.flatten(1))
    mine = step.queries[step.rank]
    return _over_block(q, mine, ordered, keys, scores=scores, out_dtype=q.dtype)[0]


@computes("pass-q")
def pass_q(q: torch.Tensor, kv: LayerKV, step: Step, *, ring: Ring, scores: Scores) -> torch.Tensor:
    """Send queries round a ring; each partial leaves for its owner as soon as it is computed.

    At step j rank k computes for the queries of k + j while rank k - j computes for those of k.
    """
    size, rank = ring.size, step.rank
    messages: list[torch.Tensor] = [q.new_empty(0)] * size
    pending = []
    for source, block in ring.blocks(q.contiguous(), step.query_sizes):
        message = _answer(block, kv, step, source, scores=scores, margin=ring.margin)
        if source == rank:
            messages[rank] = message
            continue
        sender = (2 * rank - source) % size
        messages[sender] = torch.empty_like(messages[rank])
        transfer = ring.send_receive(source, message, sender, messages[sender])
        pending.append((transfer, message))
    for transfer, _ in pending:
        ring.wait(transfer)
    return merge_messages(messages, q)


@computes("pass-q-all2all")
def pass_q_all2all(
    q: torch.Tensor, kv: LayerKV, step: Step, *, ring: Ring, scores: Scores
) -> torch.Tensor:
    """Send queries round a ring, then exchange all partials, which nothing hides (algorithm 3).

    Gives the bits of `pass_q`: a baseline for what returning partials early gains.
    """
    outgoing: list[torch.Tensor] = [q.new_empty(0)] * ring.size
    for source, block in ring.blocks(q.contiguous(), step.query_sizes):
        outgoing[source] = _answer(block, kv, step, source, scores=scores, margin=ring.margin)
    return merge_messages(_exchange(outgoing, step, ring), q)


@computes("gather-q")
def gather_q(
    q: torch.Tensor, kv: LayerKV, step: Step, *, ring: Ring, scores: Scores
) -> torch.Tensor:
    """Gather all queries, compute one attention on the local KV, exchange partials once.

    Two exposed transfers per layer, of few bytes where queries are few: the choice for decode.
    """
    queries, order = step.all_queries
    gathered = torch.cat(ring.gather(q.contiguous(), step.query_sizes))
    gathered = gathered.index_select(0, order)
    out, lse = over_local(gathered, queries, kv, scores=scores, out_dtype=step.partial_dtype)
    outgoing = [
        pack(out.index_select(0, rows), None if lse is None else lse.index_select(0, rows))
        if len(rows)
        else q.new_empty(0)
        for rows in step.rows
    ]
    return merge_messages(_exchange(outgoing, step, ring), q)


def over_local(
    q: torch.Tensor,
    queries: Placement,
    kv: LayerKV,
    *,
    scores: Scores,
    out_dtype: torch.dtype | None = None,
    margin: int = 0,
) -> Partial:
    """Compute attention of q over this rank's own keys, those of a shared prefix first.

    margin: multiprocessors to leave to transfers under way.
    """
    k, v, k_pos, cu_k = kv.local
    prefix = None
    if kv.prefix is not None:
        prefix = _over_prefix(q, queries, kv.prefix, scores=scores, margin=margin)
    out, lse = attention(
        q,
        queries,
        (k, v),
        Placement(k_pos, cu_k),
        scores=scores,
        into=prefix,
        out_dtype=out_dtype if prefix is None else None,
        margin=margin,
    )
    return out if out_dtype is None else out.to(out_dtype), lse


def _over_prefix(
    q: torch.Tensor, queries: Placement, prefix: LayerKV, *, scores: Scores, margin: int
) -> Partial:
    """Compute attention of q over what its sequences share: to the kernel, the queries of all that
    share a sequence are one sequence's, so that they read its keys together.

    They see all of it, wherever they are beyond its end, but for a window: then they are put in
    order of their positions.
    """
    shared_by = queries.batch // (len(prefix.cu_k) - 1)
    ends = queries.cu_seqlens[::shared_by].contiguous()
    if scores.window is None:
        together = Placement(torch.full_like(queries.positions, NEVER - 1), ends)
        return over_local(q, together, prefix, scores=scores, margin=margin)
    number = torch.arange(queries.tokens, dtype=ends.dtype, device=q.device)
    group = torch.searchsorted(ends[1:], number, right=True)
    order = ((group << 32) + queries.positions).argsort()
    together = Placement(queries.positions[order], ends)
    out, lse = over_local(q[order], together, prefix, scores=scores, margin=margin)
    back = order.argsort()
    return out[back], None if lse is None else lse[back]


def _over_block(
    q: torch.Tensor,
    queries: Placement,
    block: torch.Tensor,
    keys: Placement,
    *,
    scores: Scores,
    into: Partial | None = None,
    out_dtype: torch.dtype | None = None,
    margin: int = 0,
) -> Partial:
    """Compute attention of q over a received block [Tk, 2, Hkv, D]: K at index 0, V at index 1."""
    kv = (block[:, 0], block[:, 1])
    return attention(
        q, queries, kv, keys, scores=scores, into=into, out_dtype=out_dtype, margin=margin
    )


def _answer(
    block: torch.Tensor, kv: LayerKV, step: Step, source: int, *, scores: Scores, margin: int
) -> torch.Tensor:
    """Return the message to rank `source` over its queries `block`, empty if it has none."""
    if not step.has_queries[source]:
        return block.new_empty(0)
    queries, dtype = step.queries[source], step.partial_dtype
    partial = over_local(block, queries, kv, scores=scores, out_dtype=dtype, margin=margin)
    return pack(*partial)


def _exchange(outgoing: list[torch.Tensor], step: Step, ring: Ring) -> list[torch.Tensor]:
    """Send outgoing[r] to rank r; return every rank's partial of this rank's queries."""
    return ring.exchange(outgoing, [outgoing[step.rank].numel()] * ring.size)
