"""Keys and values in memory: what one rank holds of every sequence, in every layer.

Positions identify the slots, so a rank may hold any tokens of any sequence. Each layer is one
token-major slab `[slots, 2, kv_heads, head_dim]` (K at index 0, V at index 1), so that K and V of a
token travel in one message and a single sequence's message is a view. Sequence b owns a run of
slots; the tokens it holds come first, then slack for growth, whose position is `NEVER`: no query
can see it, and kernels skip it by its position alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from cptool.host import large_pages
from cptool.sharding import Placement, concat

NEVER = 2**31 - 1
"""Position of a slot that holds nothing: beyond every query."""


def nothing_held(batch: int, device: torch.device | str) -> Placement:
    """Return what a rank holds of `batch` sequences before the first token."""
    return Placement.of([torch.empty(0, dtype=torch.int32)] * batch).to(device)


def truncated(held: Placement, limits: Sequence[int]) -> Placement:
    """Return the tokens of `held` whose position is less than `limits[b]`, a prefix of each
    sequence because positions ascend.
    """
    return Placement.of(
        [
            row[: int((row < limit).sum())]
            for row, limit in zip(held.sequences(), limits, strict=True)
        ]
    ).to(held.positions.device)


class Slab(Protocol):
    """Memory for K and V. tensor: `[layers, slots, 2, kv_heads, head_dim]`, each layer contiguous.

    visit: called before a layer's first `slots` slots are read or written.
    grow: called for room for more slots; returns whether `tensor` has it now, with what it held.
    streamed: how many of the last layers lie in a file.
    """

    tensor: torch.Tensor
    streamed: int

    def visit(self, layer: int, slots: int) -> None: ...

    def grow(self, slots: int) -> bool: ...


class MemorySlab:
    """All of it in memory."""

    streamed = 0

    def __init__(
        self, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str
    ) -> None:
        self.tensor = large_pages.empty(shape, dtype, device)

    def visit(self, layer: int, slots: int) -> None:
        """Do nothing: every layer is at hand."""

    def grow(self, slots: int) -> bool:
        """Return False: more needs a new tensor."""
        return False


Allocate = Callable[[Sequence[int], torch.dtype, torch.device], Slab]
"""Makes a slab of a shape."""


@dataclass(frozen=True)
class Slots:
    """slab `[layers, slots, 2, kv_heads, head_dim]`; positions int32 `[slots]`, `NEVER` in slack.

    Sequence b's slots are offsets[b] up to offsets[b + 1], of which what is held comes first.
    """

    slab: torch.Tensor
    offsets: tuple[int, ...]
    positions: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class LayerKV:
    """Keys and values of one layer of a cache, as attention reads them.

    `local` is `(k, v, k_pos, cu_k)`: k and v `[slots, kv_heads, head_dim]` strided views of the
    slab, k_pos int32 `[slots]` with `NEVER` in slack slots, cu_k int32 `[batch + 1]`.

    prefix: keys and values that come before, if sequences share them (`KVCache.begin_with`).
    """

    slab: torch.Tensor
    k_pos: torch.Tensor
    cu_k: torch.Tensor
    held_slots: torch.Tensor | None = None
    prefix: LayerKV | None = None

    @property
    def local(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """K, V, positions and sequence offsets, as `attention_partial` takes them."""
        return self.slab[:, 0], self.slab[:, 1], self.k_pos, self.cu_k

    def packed(self, rows: torch.Tensor | None = None) -> torch.Tensor:
        """Return K and V of the tokens held, or of those at indices `rows` among them, `[tokens, 2,
        kv_heads, head_dim]`, contiguous.

        A view if they are all and there is no slack. Raises ValueError if there is a prefix, which
        it would lack.
        """
        if self.prefix is not None:
            raise ValueError("keys with a shared prefix cannot be sent; send queries to them")
        slots = self.held_slots
        if rows is not None:
            slots = rows if slots is None else slots[rows]
        return self.slab if slots is None else self.slab.index_select(0, slots)


class KVCache:
    """The KV of `batch` sequences on this rank, for `layers` layers of `kv_heads` heads of
    `head_dim`.

    Tokens are appended in two steps: `extend` makes room and records the positions once a forward,
    `store` writes one layer's K and V.

    prefix: the cache that holds the beginning of every sequence, if they share it; everything else
        here counts only what follows.
    allocate: makes its memory, each time that it grows.
    """

    def __init__(
        self,
        *,
        layers: int,
        kv_heads: int,
        head_dim: int,
        batch: int,
        dtype: torch.dtype,
        device: torch.device | str,
        allocate: Allocate = MemorySlab,
    ) -> None:
        self.batch = batch
        self.held = nothing_held(batch, device)
        self.prefix: KVCache | None = None
        self._shape = (2, kv_heads, head_dim)
        self._allocate = allocate
        self._memory: Slab = MemorySlab((layers, 0, *self._shape), dtype, device)
        self._offsets = [0] * (batch + 1)
        self._new: slice | torch.Tensor = slice(0, 0)
        self._held_slots: torch.Tensor | None = None
        self._index()

    @property
    def _slab(self) -> torch.Tensor:
        return self._memory.tensor

    @property
    def layers(self) -> int:
        """Number of layers."""
        return self._slab.shape[0]

    @property
    def shape(self) -> tuple[int, int, int]:
        """K and V of one token in one layer: (2, kv_heads, head_dim)."""
        return self._shape

    @property
    def dtype(self) -> torch.dtype:
        """Type of the elements of K and V."""
        return self._slab.dtype

    @property
    def device(self) -> torch.device:
        """Where K and V lie."""
        return self._slab.device

    @property
    def lengths(self) -> list[int]:
        """Number of tokens held per sequence."""
        return self.held.cu_seqlens.diff().tolist()

    @property
    def nbytes(self) -> int:
        """Bytes allocated, slack included."""
        return self._slab.nbytes

    @property
    def nbytes_in_file(self) -> int:
        """Bytes of KV that lie in a file and not in memory, those of a prefix included."""
        own = self.nbytes // self.layers * self._memory.streamed
        return own + (self.prefix.nbytes_in_file if self.prefix is not None else 0)

    def begin_with(self, prefix: KVCache) -> None:
        """Let what this cache will hold follow the sequences of `prefix`, which is not copied.

        Each is shared by as many sequences in succession: of 2 and a batch of 6, the first by the
        sequences 0 to 2. `prefix` must not change while this cache is in use.
        """
        if self.batch % prefix.batch:
            raise ValueError(f"a batch of {self.batch} cannot share {prefix.batch} sequences")
        self.prefix = prefix

    def reserve(self, lengths: Sequence[int]) -> None:
        """Make room for `lengths[b]` tokens in all of each sequence b, and keep what is held."""
        have = [stop - start for start, stop in itertools.pairwise(self._offsets)]
        if all(want <= room for want, room in zip(lengths, have, strict=True)):
            return
        room = [max(want, kept) for want, kept in zip(lengths, have, strict=True)]
        offsets = [0]
        for slots in room:
            offsets.append(offsets[-1] + slots)
        if offsets[:-1] == self._offsets[:-1] and self._memory.grow(offsets[-1]):
            self._offsets = offsets
            self._index()
            return
        shape = (self.layers, offsets[-1], *self._shape)
        old, grown = self._memory, self._allocate(shape, self.dtype, self.device)
        for layer in range(self.layers if any(self.lengths) else 0):
            old.visit(layer, self._offsets[-1])
            grown.visit(layer, offsets[-1])
            for b, held in enumerate(self.lengths):
                start, new = self._offsets[b], offsets[b]
                kept = old.tensor[layer, start : start + held]
                grown.tensor[layer, new : new + held] = kept
        self._memory, self._offsets = grown, offsets
        self._index()

    def extend(self, new: Placement) -> None:
        """Append the positions of new tokens; `store` then writes their K and V layer by layer."""
        held, added = self.lengths, new.cu_seqlens.diff().tolist()
        total = [h + a for h, a in zip(held, added, strict=True)]
        room = [stop - start for start, stop in itertools.pairwise(self._offsets)]
        # Growing by a quarter keeps the copies of a long decode at a constant share of the work.
        self.reserve(
            [
                t if t <= r or h == 0 else t + t // 4
                for t, r, h in zip(total, room, held, strict=True)
            ]
        )
        firsts = [offset + h for offset, h in zip(self._offsets, held, strict=False)]
        self.held = concat(self.held, new)
        runs = [slice(first, first + a) for first, a in zip(firsts, added, strict=True) if a]
        if len(runs) <= 1:
            self._new = runs[0] if runs else slice(0, 0)
        else:
            self._new = torch.cat([torch.arange(r.start, r.stop) for r in runs]).to(
                self._slab.device
            )
        self._index()

    def truncate(self, limits: Sequence[int]) -> None:
        """Drop the tokens of sequence b at position `limits[b]` and beyond; their slots become
        slack.
        """
        self.held = truncated(self.held, limits)
        self._index()

    def store(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Write K and V `[new tokens, kv_heads, head_dim]` of the tokens of the last `extend`."""
        self._memory.visit(layer, self._slots)
        slab = self._slab[layer]
        slab[self._new, 0] = k.to(slab.dtype)
        slab[self._new, 1] = v.to(slab.dtype)

    def layer(self, layer: int) -> LayerKV:
        """Return the keys and values of one layer, which stay valid until the next `extend`."""
        self._memory.visit(layer, self._slots)
        return LayerKV(
            slab=self._slab[layer, : self._slots],
            k_pos=self._k_pos,
            cu_k=self._cu_k,
            held_slots=self._held_slots,
            prefix=None if self.prefix is None else self.prefix.layer(layer),
        )

    @property
    def place(self) -> tuple:
        """Equal as long as every slot stays where it is."""
        return self._slab.data_ptr(), self._slab.shape, tuple(self._offsets)

    def slots(self) -> Slots:
        """Return all memory as it lies now, to write tokens to where `extend` will find them."""
        positions = torch.full(
            (self._offsets[-1],), NEVER, dtype=torch.int32, device=self._slab.device
        )
        for start, row in zip(self._offsets, self.held.sequences(), strict=False):
            positions[start : start + len(row)] = row
        return Slots(self._slab, tuple(self._offsets), positions)

    def tokens_from(self, layer: int, sequence: int, first: int) -> torch.Tensor:
        """Return K and V of the sequence's tokens from index `first` on, `[tokens, 2, kv_heads,
        head_dim]`, a view.
        """
        self._memory.visit(layer, self._slots)
        start, held = self._offsets[sequence], self.lengths[sequence]
        return self._slab[layer, start + first : start + held]

    def _index(self) -> None:
        """Compute what the views of all layers share: positions and offsets of slots, and which
        slots are held.
        """
        device, held = self._slab.device, self.lengths
        if self.batch == 1:  # slack lies at the end alone, so the exact view is a slice
            self._slots, self._held_slots = held[0], None
            self._k_pos, self._cu_k = self.held.positions, self.held.cu_seqlens
            return
        self._slots = self._offsets[-1]
        self._cu_k = torch.tensor(self._offsets, dtype=torch.int32, device=device)
        if sum(held) == self._slots:
            self._k_pos, self._held_slots = self.held.positions, None
            return
        starts = torch.tensor(self._offsets[:-1]).repeat_interleave(torch.tensor(held))
        within = torch.arange(sum(held)) - self.held.cu_seqlens[:-1].cpu().repeat_interleave(
            torch.tensor(held)
        )
        self._held_slots = (starts + within).to(device)
        self._k_pos = torch.full((self._slots,), NEVER, dtype=torch.int32, device=device)
        self._k_pos[self._held_slots] = self.held.positions
