"""Partial results of attention: how one is computed, merged and sent, whichever kind it is.

A partial of softmax attention is `(out, lse)`. One of SiLU attention is `(out, None)`: partials add
up, and nothing else has to travel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cptool.ops.attention import attention_partial, merge_partials
from cptool.ops.silu_attention import silu_attention_partial
from cptool.parallel.step import Scores
from cptool.sharding import Placement

Partial = tuple[torch.Tensor, torch.Tensor | None]


def attention(
    q: torch.Tensor,
    queries: Placement,
    kv: tuple[torch.Tensor, torch.Tensor],
    keys: Placement,
    *,
    scores: Scores,
    into: Partial | None = None,
    out_dtype: torch.dtype | None = None,
    margin: int = 0,
) -> Partial:
    """Compute the attention of q over keys and values, `kv`, as `attention_partial` does.

    into: a running float32 partial, merged into in place; out_dtype is that of a new one.
    margin: multiprocessors that softmax attention leaves to transfers under way.
    """
    call = (q, *kv, queries.positions, keys.positions, queries.cu_seqlens, keys.cu_seqlens)
    if scores.max_len is not None:
        out = silu_attention_partial(
            *call,
            scale=scores.scale,
            max_len=scores.max_len,
            into=None if into is None else into[0],
            out_dtype=out_dtype,
            window=scores.window,
        )
        return out, None
    running = None
    if into is not None:
        assert into[1] is not None
        running = into[0], into[1]
    return attention_partial(
        *call,
        scale=scores.scale,
        into=running,
        out_dtype=out_dtype,
        window=scores.window,
        cap=scores.cap,
        sm_margin=margin,
    )


def merge(partials: Sequence[Partial], dtype: torch.dtype) -> torch.Tensor:
    """Merge partials in the order given. Return out in `dtype`."""
    outs = [out for out, _ in partials]
    lses = [lse for _, lse in partials if lse is not None]
    if lses:
        return merge_partials(outs, lses, dtype)[0]
    total = outs[0].to(torch.float32)
    for out in outs[1:]:
        total = total + out
    return total.to(dtype)


def pack(out: torch.Tensor, lse: torch.Tensor | None) -> torch.Tensor:
    """Return a partial as one message in out's dtype: out [T, H, D], then lse [T, H] as bits."""
    if lse is None:
        return out.flatten()
    return torch.cat([out.flatten(), lse.view(out.dtype).flatten()])


def merge_messages(messages: Sequence[torch.Tensor], q: torch.Tensor) -> torch.Tensor:
    """Merge packed partials of q's tokens in the order given. Return [T, H, D] in q's dtype."""
    if not q.shape[0]:
        return torch.empty_like(q)
    return merge([_unpack(message, q) for message in messages], q.dtype)


def _unpack(message: torch.Tensor, q: torch.Tensor) -> Partial:
    out, rest = message[: q.numel()].view(q.shape), message[q.numel() :]
    return out, rest.view(torch.float32).view(q.shape[:2]) if len(rest) else None
