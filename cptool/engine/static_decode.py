"""Decode with nothing but static memory: every step is the same kernels over the same addresses.

A step of a few tokens is bound by kernel launches and by the latency of the links, so it makes few
of either. Every rank computes the new tokens of all sequences, which takes no longer than one
rank's part of them, because the time of a linear layer is that of reading its weights. So no
queries travel: each rank attends to the KV it holds, one all-gather of partials follows, and every
rank merges them in rank order. One rank keeps the KV of a new token; the others write it to a slot
that no query sees. Tokens, positions and slots lie on the device, so a CUDA graph of the step
replays at any length of the context (`cptool.engine.graphs`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from cptool.cache import NEVER, KVCache, LayerKV
from cptool.engine.graphs import Recorded
from cptool.engine.holdings import Holdings
from cptool.model.llama import Llama
from cptool.parallel.attention import over_local
from cptool.parallel.partials import merge_messages, pack
from cptool.parallel.ring import Ring
from cptool.parallel.step import Scores
from cptool.sharding import Placement

NOWHERE = -1
"""Position of a query that sees no key."""

Observer = Callable[[int, Placement, torch.Tensor, torch.Tensor], None]
"""Called with the layer, the queries' placement, q and out of every attention."""


@dataclass(frozen=True, kw_only=True)
class StepContext:
    """What the steps read and write.

    partial_dtype: dtype in which partial outputs travel.
    no_graph: why a CUDA graph cannot hold a step; None if it can.
    """

    model: Llama
    ring: Ring
    cache: KVCache
    holdings: Holdings
    partial_dtype: torch.dtype
    no_graph: str | None = None


class StaticDecode:
    """At most `steps` steps of one token for some or all of `sequences`.

    The cache gets room for them at once. Each step deals its tokens in the context's `holdings`;
    after the last one, the caller settles these and extends the cache by this rank's share.

    observer: called after every attention; no graph can hold it.
    reason: why steps are not replayed from a graph; None if they are.
    """

    def __init__(
        self,
        context: StepContext,
        sequences: Sequence[int],
        steps: int,
        observer: Observer | None = None,
    ) -> None:
        self.context, self.observer = context, observer
        self.sequences = tuple(sequences)
        cache, ring = context.cache, context.ring
        self._reserve(steps)
        slots = cache.slots()
        self._place, self._slab = cache.place, slots.slab
        device, rows = self._slab.device, len(self.sequences)
        self._rank = ring.rank
        self._k_pos = slots.positions
        self._cu_k = torch.tensor(slots.offsets, dtype=torch.int32, device=device)
        queries = torch.zeros(cache.batch + 1, dtype=torch.int32)
        queries[torch.tensor(self.sequences) + 1] = 1
        self._cu_q = queries.cumsum(0, dtype=torch.int32).to(device)
        # Token, position, slot and what its position becomes, of each row: one copy per step.
        self._inputs = torch.zeros(4, rows, dtype=torch.int64, device=device)
        on_gpu = device.type == "cuda"
        self._host_inputs = torch.zeros(4, rows, dtype=torch.int64, pin_memory=on_gpu)
        self._sent = torch.cuda.Event() if on_gpu else None
        self._begin(slots.offsets)
        self._send({}, {})
        self._step: Callable[[], torch.Tensor] = self._compute
        self.reason = context.no_graph if observer is None else "an observer is attached"
        if self.reason is None:
            self._step = Recorded(self._compute, device)
            self.reason = self._step.reason

    def reopen(self, sequences: Sequence[int], steps: int) -> bool:
        """Prepare for `steps` more after the cache was used otherwise.

        Return False if another StaticDecode is needed, because memory moved or too few of the
        sequences go on.
        """
        if not set(sequences) <= set(self.sequences) or 2 * len(sequences) <= len(self.sequences):
            return False
        self._reserve(steps)
        if self.moved:
            return False
        slots = self.context.cache.slots()
        self._k_pos.copy_(slots.positions)
        self._begin(slots.offsets)
        return True

    @property
    def moved(self) -> bool:
        """Whether the cache has left the memory that the steps write to."""
        return self.context.cache.place != self._place

    @torch.inference_mode()
    def step(self, tokens: dict[int, int], positions: dict[int, int]) -> dict[int, torch.Tensor]:
        """Compute token `tokens[b]` at `positions[b]` of each sequence b.

        Return the logits of what follows it, float32 [vocabulary], in memory that the next step
        overwrites.
        """
        self._send(tokens, positions)
        self.remaining -= 1
        logits = self._step()
        return {b: logits[row] for row, b in enumerate(self.sequences) if b in tokens}

    def _reserve(self, steps: int) -> None:
        """Make room for the tokens to come and, in each sequence, one slot that no query sees."""
        room = self.context.holdings.room(self.context.ring.rank, self.sequences, steps)
        self.context.cache.reserve([tokens + 1 for tokens in room])
        self.remaining = steps

    def _begin(self, offsets: tuple[int, ...]) -> None:
        self._firsts, self._unseen = offsets[:-1], [end - 1 for end in offsets[1:]]

    def _send(self, tokens: dict[int, int], positions: dict[int, int]) -> None:
        """Copy a step's numbers to the device; rows without a token query and keep nothing."""
        if self._sent is not None:
            self._sent.synchronize()  # the last copy still reads what is written here
        holdings = self.context.holdings
        owners = holdings.deal({b: positions[b] for b in self.sequences if b in tokens})
        columns = []
        for b in self.sequences:
            slot, mark = self._unseen[b], NEVER
            if owners.get(b) == self._rank:
                slot = self._firsts[b] + holdings.counts[self._rank][b] - 1
                mark = positions[b]
            columns.append((tokens.get(b, 0), positions.get(b, NOWHERE), slot, mark))
        self._host_inputs.copy_(torch.tensor(columns, dtype=torch.int64).T)
        self._inputs.copy_(self._host_inputs, non_blocking=True)
        if self._sent is not None:
            self._sent.record()

    @torch.inference_mode()
    def _compute(self) -> torch.Tensor:
        """Return the logits of every row, float32 [rows, vocabulary]."""
        tokens, positions, slots, marks = self._inputs.unbind()
        q_pos = positions.to(torch.int32)
        self._k_pos.index_copy_(0, slots, marks.to(torch.int32))
        model, ring, cache = self.context.model, self.context.ring, self.context.cache
        config, alone = model.config, ring.size == 1
        queries = Placement(q_pos, self._cu_q)

        def attention(
            layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
        ) -> torch.Tensor:
            keys, values = self._slab[layer].unbind(1)
            keys.index_copy_(0, slots, k.to(keys.dtype))
            values.index_copy_(0, slots, v.to(values.dtype))
            kv = LayerKV(
                slab=self._slab[layer],
                k_pos=self._k_pos,
                cu_k=self._cu_k,
                prefix=None if cache.prefix is None else cache.prefix.layer(layer),
            )
            out, lse = over_local(
                q,
                queries,
                kv,
                scores=Scores.of(config, layer),
                out_dtype=q.dtype if alone else self.context.partial_dtype,
            )
            if not alone:
                out = merge_messages(ring.all_gather(pack(out, lse)), q)
            if self.observer is not None:
                self.observer(layer, queries, q, out)
            return out

        return model.logits(model(tokens, q_pos, attention))
