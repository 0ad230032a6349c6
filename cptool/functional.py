"""Context-parallel attention for models of one's own: `cptool.ring_attention`,
`cptool.hstu_attention`, and their layout.

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

import torch
import torch.distributed as dist

from cptool.cache import LayerKV
from cptool.errors import OptionError
from cptool.ops.attention import attention_partial
from cptool.ops.checks import (
    check_max_len,
    check_scale,
    check_scores,
    check_values,
    refuse_gradients,
)
from cptool.ops.silu_attention import silu_attention_partial
from cptool.parallel.attention import attend
from cptool.parallel.deals import Deal, Lengths, deal_of
from cptool.parallel.groups import check_alike, group_of, quickest, ring_for
from cptool.parallel.ring import Ring
from cptool.parallel.step import Scores
from cptool.variants import names, unknown


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
            even, at most 256; the innermost dimension contiguous.
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
    check_scale(scale)
    process_group, deal = group_of(group), deal_of(lengths, group)
    deal.check_tokens(q=q, k=k, v=v)
    check_values(k, v)
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
        dtypes=(q.dtype, k.dtype),
        causal=causal,
        variant=variant,
        choose=lambda: quickest(q, k, deal.lengths, deal.size),
    )
    slab = torch.stack([k, v], dim=1)
    kv = LayerKV(slab=slab, k_pos=keys.positions, cu_k=keys.cu_seqlens)
    return attend(variant, q, kv, step, ring=ring, scores=Scores(scale))


def hstu_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: Lengths,
    group: dist.ProcessGroup | None = None,
    *,
    max_len: int,
    targets: Lengths | None = None,
    window: int | None = None,
    scale: float | None = None,
    variant: str = "auto",
) -> torch.Tensor:
    """Compute the SiLU attention of HSTU over sequences that the ranks of `group` share.

        out_i = sum_j silu(scale * q_i k_j) v_j / max_len

    over the tokens j that token i sees: those before it and itself. Collective, as
    `ring_attention`, whose q, k, v, lengths, group, scale and variant these are.

    Args:
        max_len: what the weights are divided by: the length of the longest sequence that the model
            is made for, not of this batch.
        targets: how many of the last tokens of each sequence are targets, the same on all ranks: a
            target stands at the end of the history before them, and sees what a token there would
            see of it, and itself, but no other target. By default there are none.
        window: how many positions a token sees, its own the last (the published ``max_attn_len``
            plus 1); None for all.

    Returns:
        ``[T_local, Hq, D]`` in q's dtype, in which targets round twice.

    Raises:
        UserError, ValueError: as for `ring_attention` and `silu_attention_partial`.
    """
    refuse_gradients("hstu_attention", q=q, k=k, v=v)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    check_max_len(max_len)
    check_scores(window, None)
    check_scale(scale)
    scores = Scores(scale, window, max_len=max_len)
    process_group, deal = group_of(group), deal_of(lengths, group, targets)
    deal.check_tokens(q=q, k=k, v=v)
    check_values(k, v)
    if variant not in ("auto", *names(baselines=True)):
        raise unknown(variant)
    ring = Ring()
    if process_group is not None and deal.size > 1:
        ring = ring_for(process_group, q.device)
        variant = check_alike(
            ring,
            lengths=deal.lengths,
            heads=(q.shape[1], *k.shape[1:]),
            dtypes=(q.dtype, k.dtype),
            hstu=(deal.targets, scores),
            variant=variant,
            choose=lambda: quickest(q, k, deal.lengths, deal.size),
        )
    elif variant == "auto":
        variant = names()[0]
    step, rows = deal.step(q.device), deal.history_rows(q.device)
    slab = torch.stack([k, v] if rows is None else [k[rows], v[rows]], dim=1)
    keys = step.keys[deal.rank]
    kv = LayerKV(slab=slab, k_pos=keys.positions, cu_k=keys.cu_seqlens)
    out = attend(variant, q, kv, step, ring=ring, scores=scores)
    return _with_themselves(out, q, (k, v), deal=deal, scores=scores) if any(deal.targets) else out


def _with_themselves(
    out: torch.Tensor,
    q: torch.Tensor,
    kv: tuple[torch.Tensor, torch.Tensor],
    *,
    deal: Deal,
    scores: Scores,
) -> torch.Tensor:
    """Add to the targets of `out` what they see of themselves: each a sequence of one token."""
    targets = deal.target_rows(q.device)
    ends = torch.arange(len(targets) + 1, dtype=torch.int32, device=q.device)
    total = out[targets].to(torch.float32)
    positions = torch.zeros_like(ends[1:])
    silu_attention_partial(
        q[targets],
        kv[0][targets],
        kv[1][targets],
        q_pos=positions,
        k_pos=positions,
        cu_q=ends,
        cu_k=ends,
        scale=scores.scale,
        max_len=scores.max_len or 1,
        into=total,
    )
    out[targets] = total.to(out.dtype)
    return out


def shard(
    x: torch.Tensor, lengths: Lengths, group: dist.ProcessGroup | None = None
) -> torch.Tensor:
    """Return this rank's tokens of `x` ``[T, ...]``, the whole batch, one sequence after the other.

    Each sequence is cut into 2N chunks, of which rank i gets chunks i and 2N-1-i, without padding:
    ranks differ by at most one token and have the same causal work. A rank may get none. Nothing is
    sent, and gradients pass.

    lengths, group: as in `ring_attention`. Raises UserError if `x` has another number of tokens.
    """
    deal = deal_of(lengths, group)
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
    process_group, deal = group_of(group), deal_of(lengths, group)
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
    check_alike(ring, lengths=deal.lengths, heads=tuple(x.shape[1:]), dtypes=(x.dtype,))
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
    deal = deal_of(lengths, group)
    return deal.placements[deal.rank].positions.to(device or "cpu", torch.int64)
