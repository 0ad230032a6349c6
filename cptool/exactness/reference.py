"""Attention with all scores in memory, which exact answers are compared with."""

import torch


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_pos: torch.Tensor,
    k_pos: torch.Tensor,
    scale: float,
    *,
    window: int | None = None,
    cap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute attention of one sequence with all scores in memory, in the dtype of q: `(out [Tq,
    Hq, D], lse [Tq, Hq])`. window, cap: as in `cptool.ops.attention.attention_partial`.
    """
    group = q.shape[1] // k.shape[1]
    keys, values = (x.repeat_interleave(group, dim=1).transpose(0, 1) for x in (k, v))
    scores = q.transpose(0, 1) @ keys.transpose(1, 2) * scale
    if cap is not None:
        scores = (scores / cap).tanh() * cap
    hidden = k_pos > q_pos[:, None]
    if window is not None:
        hidden |= k_pos.to(torch.int64) <= q_pos[:, None] - window
    scores = scores.masked_fill(hidden, -torch.inf)
    lse = scores.logsumexp(-1)
    weights = torch.where(lse.isinf()[..., None], 0, (scores - lse[..., None]).exp())
    return (weights @ values).transpose(0, 1), lse.transpose(0, 1)
