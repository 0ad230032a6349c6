"""Context-parallel attention for models of one's own: `cptool.ring_attention`, and its layout.

No cache, no world of cptool's and no model: tensors and a process group of `torch.distributed`. The
ranks of the group share the tokens of a batch of sequences in the balanced layout of
`cptool.sharding`, and each computes the attention of its own tokens over those of all.

    import torch
    import torch.distributed as dist

    import cptool

    dist.init_process_group("gloo")  # "cpu:gloo,cuda:nccl" on GPUs; torchrun starts the ranks
    lengths = [1000, 37]  # a batch of two sequences, the same list on every rank
    tokens = torch.arange(sum(lengths)) % 50  # the whole batch, one sequence after the other

    mine = cptool.shard(tokens, lengths)  # this rank's tokens
    positions = cptool.shard_positions(lengths)  # where they stand, for rotary embeddings

    torch.manual_seed(0)
    embedding = torch.nn.Embedding(50, 4 * 64 + 2 * 2 * 64)
    with torch.no_grad():  # there is no backward
        q, k, v = embedding(mine).split([4 * 64, 2 * 64, 2 * 64], dim=-1)
        out = cptool.ring_attention(
            q.unflatten(-1, (4, 64)), k.unflatten(-1, (2, 64)), v.unflatten(-1, (2, 64)), lengths
        )
        whole = cptool.unshard(out, lengths)  # [1037, 4, 64] on every rank
    dist.destroy_process_group()
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from cptool.cache import LayerKV
from cptool.errors import OptionError, UserError
from cptool.ops.attention import attention_partial
from cptool.ops.checks import refuse_gradients
from cptool.parallel.attention import attend
from cptool.parallel.groups import check_alike, group_of, quickest, ring_for
from cptool.parallel.step import Scores, Step
from cptool.sharding import Placement, balanced
from cptool.variants import names, unknown

Lengths = int | Sequence[int] | torch.Tensor
"""Tokens of each sequence of the whole batch, the same on all ranks; an int is one sequence."""


def ring_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: Lengths,
    group: dist.ProcessGroup | None = None,
    *,
    causal: bool = True,
    scale: float | None = None,
    variant: str = "auto",
) -> torch.Tensor:
    """Compute scaled dot-product attention over sequences that the ranks of `group` share.

    The result is that of ``torch.nn.functional.scaled_dot_product_attention`` over the whole
    sequences, of which every rank gives and gets the tokens that `shard` deals to it. Collective:
    every rank calls it, those without tokens too.

    Args:
        q: ``[T_local, Hq, D]``, the queries of this rank's tokens: float32, bfloat16 or float16; D
            a multiple of 8, at most 256; the innermost dimension contiguous.
        k, v: ``[T_local, Hkv, D]`` in q's dtype, ``Hq % Hkv == 0``; query head h reads KV head
            ``h // (Hq // Hkv)``.
        lengths: tokens of each sequence of the whole batch, the same on all ranks; an int is one
            sequence. From offsets ``cu_seqlens`` it is ``cu_seqlens.diff().tolist()``.
        group: the ranks that share the sequences; by default torch's default group, or this process
            alone if `torch.distributed` is not initialised.
        causal: a token sees those before it and itself; otherwise all of its sequence.
        scale: factor of the scores, by default ``D ** -0.5``.
        variant: what travels: "pass-kv", "gather-kv", "pass-q" or "gather-q"; "auto" takes the one
            that is predicted to be fastest for these shapes.

    Returns:
        ``[T_local, Hq, D]`` in q's dtype. The same ranks and variant give the same bits each time.

    Raises:
        UserError: a tensor requires a gradient while gradients are recorded (there is no backward);
            a rank's tensors do not fit `lengths`; the ranks' arguments differ.
        ValueError: shapes, dtypes or devices do not fit together, as for `attention_partial`.
    """
    refuse_gradients("ring_attention", q=q, k=k, v=v)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    process_group, deal = group_of(group), _deal_of(lengths, group)
    _check_tokens(deal, q=q, k=k, v=v)
    if variant not in ("auto", *names(baselines=True)):
        raise unknown(variant)
    step = deal.step(q.device, causal=causal)
    mine, keys = step.queries[deal.rank], step.keys[deal.rank]
    if process_group is None or deal.size == 1:
        positions = (mine.positions, keys.positions, mine.cu_seqlens, keys.cu_seqlens)
        return attention_partial(q, k, v, *positions, scale=scale, out_dtype=q.dtype)[0]
    ring = ring_for(process_group, q.device)
    variant = check_alike(
        ring,
        lengths=deal.lengths,
        heads=(q.shape[1], *k.shape[1:]),
        dtype=q.dtype,
        causal=causal,
        variant=variant,
        choose=lambda: quickest(q, k, deal.lengths, deal.size),
    )
    slab = torch.stack([k, v], dim=1)
    kv = LayerKV(slab=slab, k_pos=keys.positions, cu_k=keys.cu_seqlens)
    return attend(variant, q, kv, step, ring=ring, scores=Scores(scale))


def shard(
    x: torch.Tensor, lengths: Lengths, group: dist.ProcessGroup | None = None
) -> torch.Tensor:
    """Return this rank's tokens of `x` ``[T, ...]``, the whole batch, one sequence after the other.

    Each sequence is cut into 2N chunks, of which rank i gets chunks i and 2N-1-i, without padding:
    ranks differ by at most one token and have the same causal work. A rank may get none. Nothing is
    sent, and gradients pass.

    lengths, group: as in `ring_attention`. Raises UserError if `x` has another number of tokens.
    """
    deal = _deal_of(lengths, group)
    if x.dim() < 1 or x.shape[0] != sum(deal.lengths):
        raise OptionError(
            "x",
            f"of shape {list(x.shape)}",
            f"it must hold all {sum(deal.lengths)} tokens of `lengths` in its first dimension",
        )
    return x.index_select(0, deal.indices.to(x.device))


def unshard(
    x: torch.Tensor, lengths: Lengths, group: dist.ProcessGroup | None = None
) -> torch.Tensor:
    """Return the whole batch ``[T, ...]`` on every rank from the shards `x` ``[T_local, ...]``.

    The inverse of `shard`, for tensors of any dtype. Collective. Raises UserError if `x` is not of
    this rank's number of tokens, or requires a gradient while gradients are recorded.
    """
    refuse_gradients("unshard", x=x)
    process_group, deal = group_of(group), _deal_of(lengths, group)
    if x.dim() < 1 or x.shape[0] != deal.tokens:
        raise OptionError(
            "x",
            f"of shape {list(x.shape)}",
            f"it must hold this rank's {deal.tokens} of the {sum(deal.lengths)} tokens in its "
            "first dimension",
        )
    if process_group is None or process_group.size() == 1:
        return x.clone()
    ring = ring_for(process_group, x.device)
    check_alike(ring, lengths=deal.lengths, heads=tuple(x.shape[1:]), dtype=x.dtype)
    parts = ring.gather(x.contiguous(), deal.sizes)
    return torch.cat(parts).index_select(0, deal.order.to(x.device))


def shard_positions(
    lengths: Lengths,
    group: dist.ProcessGroup | None = None,
    *,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Return int64 ``[T_local]``: the position of each of this rank's tokens in its sequence.

    What rotary embeddings need. lengths, group: as in `ring_attention`. device: of the result, by
    default the CPU.
    """
    deal = _deal_of(lengths, group)
    return deal.placements[deal.rank].positions.to(device or "cpu", torch.int64)


def _check_tokens(deal: _Deal, **tensors: torch.Tensor) -> None:
    """Raise UserError unless each tensor holds this rank's tokens."""
    for name, tensor in tensors.items():
        if tensor.dim() != 3 or tensor.shape[0] != deal.tokens:
            raise OptionError(
                name,
                f"of shape {list(tensor.shape)}",
                f"rank {deal.rank} of {deal.size} has {deal.tokens} of the {sum(deal.lengths)} "
                f"tokens, so it must be [{deal.tokens}, heads, head_dim]",
                "cptool.shard deals the tokens",
            )


@dataclass(frozen=True)
class _Deal:
    """Which rank has which tokens of a batch; all that follows from the lengths alone."""

    lengths: tuple[int, ...]
    rank: int
    size: int

    @functools.cached_property
    def placements(self) -> tuple[Placement, ...]:
        return balanced(self.lengths, self.size).placements()

    @functools.cached_property
    def sizes(self) -> list[int]:
        return [placement.tokens for placement in self.placements]

    @property
    def tokens(self) -> int:
        """Tokens of this rank."""
        return self.sizes[self.rank]

    @functools.cached_property
    def indices(self) -> torch.Tensor:
        """int64 [T_local]: where this rank's tokens lie in the whole batch."""
        return balanced(self.lengths, self.size).indices(self.rank)

    @functools.cached_property
    def order(self) -> torch.Tensor:
        """int64 [T]: where the batch's tokens lie in the ranks' tokens in rank order."""
        layout = balanced(self.lengths, self.size)
        return torch.cat([layout.indices(rank) for rank in range(self.size)]).argsort()

    @functools.cached_property
    def _steps(self) -> dict[tuple[torch.device, bool], Step]:
        return {}

    def step(self, device: torch.device, *, causal: bool) -> Step:
        """Return the step of a forward; without `causal`, every query stands at its sequence's end,
        where it sees all keys.
        """
        if (device, causal) not in self._steps:
            keys = tuple(placement.to(device) for placement in self.placements)
            queries = keys
            if not causal:
                last = torch.tensor(self.lengths, dtype=torch.int32, device=device) - 1
                queries = tuple(
                    replace(p, positions=last.repeat_interleave(p.cu_seqlens.diff())) for p in keys
                )
            self._steps[device, causal] = Step(self.rank, queries, keys)
        return self._steps[device, causal]


# All layers of a forward share one; a few more for batches that take turns.
_deal = functools.lru_cache(maxsize=8)(_Deal)


def _deal_of(lengths: Lengths, group: dist.ProcessGroup | None) -> _Deal:
    process_group = group_of(group)
    rank, size = (process_group.rank(), process_group.size()) if process_group else (0, 1)
    return _deal(_counts(lengths), rank, size)


def _counts(lengths: Lengths) -> tuple[int, ...]:
    """Return `lengths` as a tuple. Raise UserError unless they are counts of tokens."""
    if isinstance(lengths, torch.Tensor):
        lengths = lengths.tolist()
    counts = (lengths,) if isinstance(lengths, int) else tuple(lengths)
    if not all(isinstance(count, int) and count >= 0 for count in counts):
        raise UserError(f"`lengths` {list(counts)}: they must be numbers of tokens, 0 or more")
    return counts
