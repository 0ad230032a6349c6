"""Decode with nothing but static memory: every step is the same kernels over the same addresses.

A step of a few tokens is bound by launches on the host and by latencies of the links, so both are
made few. Every rank computes the new tokens of all sequences, which costs no more than one rank's
share of them, for the time of a linear layer is that of reading its weights. So no queries travel:
each rank attends to the KV it holds, one all-gather of partials follows, and every rank merges them
in rank order. The KV of a new token is kept by one rank, the others write it to a slot that no
query sees. Tokens, positions and slots lie on the device, so a CUDA graph of the step replays at
any length of the context (`cptool.engine.graphs`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from cptool.cache import NEVER, KVCache
from cptool.engine.graphs import Recorded
from cptool.model.llama import Llama
from cptool.ops.attention import attention_partial
from cptool.parallel.attention import merge_messages, pack
from cptool.parallel.ring import Ring
from cptool.sharding import Held, Placement, level, owner

NOWHERE = -1
"""Position of a query that sees no key."""

Observe = Callable[[int, Placement, torch.Tensor, torch.Tensor], None]


class StaticDecode:
    """Steps of one token for some or all of `sequences`, whose KV lies in `cache`.

    held: counts of all ranks; they are followed here. `steps` of them are possible, for which room
    is made in the cache at once. After the last one, `taken` is what every rank has been given.

    no_graph: why a CUDA graph cannot hold a step, where it cannot. observe: is given the layer, the
    queries' placement, q and out of every attention, which no graph can hold. reason: why steps are
    not replayed from a graph; None if they are.
    """

    def __init__(
        self,
        model: Llama,
        ring: Ring,
        cache: KVCache,
        sequences: Sequence[int],
        held: Held,
        steps: int,
        partial_dtype: torch.dtype = torch.float32,
        no_graph: str | None = None,
        observe: Observe | None = None,
    ) -> None:
        self.model, self.ring, self.cache = model, ring, cache
        self.observe = observe
        self.sequences = tuple(sequences)
        self.partial_dtype = partial_dtype
        self._turn = 0
        self._reserve(held, steps)
        slots = cache.slots()
        self._place, self._slab = cache.place, slots.slab
        device, batch, rows = self._slab.device, cache.batch, len(self.sequences)
        self._device = device
        self._k_pos = slots.positions
        self._cu_k = torch.tensor(slots.offsets, dtype=torch.int32, device=device)
        asking = torch.zeros(batch + 1, dtype=torch.int32)
        asking[torch.tensor(self.sequences) + 1] = 1
        self._cu_q = asking.cumsum(0, dtype=torch.int32).to(device)
        # Token, position, slot and what its position becomes, of each row: one copy a step.
        self._inputs = torch.zeros(4, rows, dtype=torch.int64, device=device)
        self._staged = torch.zeros(4, rows, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._sent = torch.cuda.Event() if device.type == "cuda" else None
        self._begin(held, slots.offsets)
        self._stage({}, {})
        self._step: Callable[[], torch.Tensor] = self._compute
        self.reason = no_graph if observe is None else "somebody looks inside"
        if self.reason is None:
            self._step = Recorded(self._compute, device)
            self.reason = self._step.reason

    def reopen(self, sequences: Sequence[int], held: Held, steps: int) -> bool:
        """Makes ready for `steps` more after the cache was used otherwise; False if another
        StaticDecode is needed, because memory moved or too few of the sequences go on.
        """
        if not set(sequences) <= set(self.sequences) or 2 * len(sequences) <= len(self.sequences):
            return False
        self._reserve(held, steps)
        if self.moved:
            return False
        slots = self.cache.slots()
        self._k_pos.copy_(slots.positions)
        self._begin(held, slots.offsets)
        return True

    @property
    def moved(self) -> bool:
        """Whether the cache has left the memory that the steps write to."""
        return self.cache.place != self._place

    @torch.inference_mode()
    def step(self, tokens: dict[int, int], positions: dict[int, int]) -> dict[int, torch.Tensor]:
        """Computes token `tokens[b]` at `positions[b]` of each sequence b; what follows it, float32
        [vocabulary], in memory that the next step overwrites.
        """
        self._stage(tokens, positions)
        self._turn += 1
        logits = self._step()
        return {b: logits[row] for row, b in enumerate(self.sequences) if b in tokens}

    def taken(self) -> tuple[Placement, ...]:
        """The new tokens that each rank has been given since `__init__` or `reopen`."""
        return tuple(
            Placement.of([torch.tensor(row, dtype=torch.int32) for row in rows])
            for rows in self._given
        )

    def _reserve(self, held: Held, steps: int) -> None:
        """Room for the tokens to come, and for a slot of each sequence that no query ever sees."""
        most = list(held[self.ring.rank])
        for sequence in self.sequences:
            rising = level([row[sequence] for row in held], steps)
            most[sequence] = max(most[sequence], rising)
        self.cache.reserve([tokens + 1 for tokens in most])
        self.remaining = steps

    def _begin(self, held: Held, offsets: tuple[int, ...]) -> None:
        self.held = [list(row) for row in held]
        self._given: list[list[list[int]]] = [[[] for _ in row] for row in held]
        self._firsts, self._unseen = offsets[:-1], [end - 1 for end in offsets[1:]]

    def _stage(self, tokens: dict[int, int], positions: dict[int, int]) -> None:
        """Puts a step's numbers on the device; sequences without a token ask and keep nothing."""
        if self._sent is not None:
            self._sent.synchronize()  # the last copy still reads what is written here
        columns = []
        for b in self.sequences:
            slot, mark = self._unseen[b], NEVER
            if b in tokens:
                keeper = owner(self.held, b, self._turn)
                if keeper == self.ring.rank:
                    slot, mark = self._firsts[b] + self.held[keeper][b], positions[b]
                self.held[keeper][b] += 1
                self._given[keeper][b].append(positions[b])
            columns.append((tokens.get(b, 0), positions.get(b, NOWHERE), slot, mark))
        self.remaining -= bool(tokens)
        self._staged.copy_(torch.tensor(columns, dtype=torch.int64).T)
        self._inputs.copy_(self._staged, non_blocking=True)
        if self._sent is not None:
            self._sent.record()

    @torch.inference_mode()
    def _compute(self) -> torch.Tensor:
        """The logits of every row, float32 [rows, vocabulary]."""
        tokens, positions, slots, marks = self._inputs.unbind()
        q_pos = positions.to(torch.int32)
        self._k_pos.index_copy_(0, slots, marks.to(torch.int32))
        scale = self.model.config.head_dim**-0.5
        alone = self.ring.size == 1

        def attention(
            layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
        ) -> torch.Tensor:
            keys, values = self._slab[layer].unbind(1)
            keys.index_copy_(0, slots, k)
            values.index_copy_(0, slots, v)
            out, lse = attention_partial(
                q,
                keys,
                values,
                q_pos,
                self._k_pos,
                self._cu_q,
                self._cu_k,
                scale,
                out_dtype=q.dtype if alone else self.partial_dtype,
            )
            if not alone:
                out = merge_messages(self.ring.all_gather(pack(out, lse)), q)
            if self.observe is not None:
                self.observe(layer, Placement(q_pos, self._cu_q), q, out)
            return out

        return self.model.logits(self.model(tokens, q_pos, attention))
