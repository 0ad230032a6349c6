"""Attention in the plainest way: all scores in memory, then their softmax, then the values.

It is the first row of `cptool bench levers`, and nothing else: one rank, one sequence.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from cptool.engine.engine import Engine
from cptool.engine.reading import Reading
from cptool.model.config import LlamaConfig
from cptool.parallel.step import Scores, Step


class NaiveEngine(Engine):
    """An engine whose attention has all scores in memory at once, computed by torch alone."""

    def _attention(self, step: Step, variant: str, reading: Reading | None) -> Callable:
        config, (queries,) = self.model.config, step.queries

        def attention(
            layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
        ) -> torch.Tensor:
            self.cache.store(layer, k, v)
            keys, values, k_pos, _ = self.cache.layer(layer).local
            return naive_attention(
                q,
                keys.to(q.dtype),
                values.to(q.dtype),
                q_pos=queries.positions,
                k_pos=k_pos,
                scores=Scores.of(config, layer),
            )

        return attention


def naive_bytes(config: LlamaConfig, tokens: int, element: int) -> int:
    """Return what `naive_attention` allocates for a prompt of so many tokens: the scores, their
    softmax in float32, which of them are hidden, and K and V once for each query head.

    element: bytes of a number of the model's dtype.
    """
    heads = config.num_attention_heads
    scores = tokens * tokens * (heads * (element + 4) + 1)
    return scores + 2 * heads * config.head_dim * tokens * element


def naive_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    q_pos: torch.Tensor,
    k_pos: torch.Tensor,
    scores: Scores,
) -> torch.Tensor:
    """Return softmax(scale q k^T) v over the keys that each query sees, [Tq, Hq, D].

    q [Tq, Hq, D]; k, v [Tk, Hkv, D]; positions int32, those of a key that nobody sees above all.
    """
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1).transpose(0, 1) for x in (k, v))
    weights = (q.transpose(0, 1) @ k.transpose(1, 2)).mul_(scores.scale)
    if scores.cap is not None:
        weights = weights.div_(scores.cap).tanh_().mul_(scores.cap)
    hidden = k_pos[None, :] > q_pos[:, None]
    if scores.window is not None:
        hidden |= k_pos[None, :] <= q_pos[:, None] - scores.window
    weights = weights.masked_fill_(hidden, -torch.inf).softmax(-1, dtype=torch.float32)
    return (weights.to(v.dtype) @ v).transpose(0, 1)
