"""Attention in float64, and how far from it a kernel may be.

The tolerance is flash-attention's idea: a kernel may err at most twice as much as plain torch
(matmul, softmax, matmul, every intermediate rounded) does on the same inputs in the kernel's
arithmetic, plus the few roundings that even an exact algorithm cannot avoid. So it follows the
inputs, and holds no number of its own:

    out: 2 * max|plain - exact| + 4 u max|v|  + u_out max|out|
    lse: 2 * max|plain - exact| + 4 u max|lse|

with u the unit roundoff of the arithmetic and u_out that of the output's dtype. The four roundings
of out are those of the score's scale, a weight, its product with v and the division by the sum;
those of lse are of the score's scale, the maximum, the logarithm and the sum of the two.

A soft cap adds the error of its hyperbolic tangent, at most three units in the last place as the
kernels state. An error e in a score is one in an lse, and a relative one in a weight and in the
total: 6 u max|score| more for lse, and twice that times max|v| for out.

Merging partials weighs each with exp(lse_i - lse): an error e in an lse is a relative error e in
that weight, once in its own and once in the total's, so a merged out may err by 2 e max|v| more,
and by one more rounding of each product and of the sum.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

EMPTY_SLOT = 2**31 - 1
BFLOAT16_ISAS = ("avx512bf16", "amx")  # CPU kernels that multiply bfloat16 as it is


@dataclass(frozen=True)
class Case:
    """Arguments of attention_partial."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_pos: Tensor
    k_pos: Tensor
    cu_q: Tensor
    cu_k: Tensor
    scale: float
    window: int | None = None
    cap: float | None = None

    @property
    def options(self) -> dict:
        """What follows the positional arguments."""
        return {"window": self.window, "cap": self.cap}

    @property
    def arguments(self) -> tuple:
        return (self.q, self.k, self.v, self.q_pos, self.k_pos, self.cu_q, self.cu_k, self.scale)

    def sequences(self):
        """(query rows, visible part of the keys, mask [queries, keys]) of each sequence."""
        for b in range(len(self.cu_q) - 1):
            queries = slice(int(self.cu_q[b]), int(self.cu_q[b + 1]))
            first, last = int(self.cu_k[b]), int(self.cu_k[b + 1])
            k_pos, q_pos = self.k_pos[first:last][None, :].long(), self.q_pos[queries][:, None]
            visible = k_pos <= q_pos
            used = int(visible.any(0).sum())
            if self.window is not None:
                visible &= k_pos > q_pos - self.window
            yield queries, slice(first, first + used), visible[:, :used]

    @cached_property
    def exact(self) -> tuple[Tensor, Tensor]:
        return _attention(self, torch.float64)

    def plain(self, arithmetic: torch.dtype) -> tuple[Tensor, Tensor]:
        """What plain torch makes of it, every intermediate rounded."""
        return _attention(self, arithmetic)

    def only_keys(self, keep: Tensor) -> Case:
        """The same queries over the keys where the boolean `keep` [Tk] is true."""
        ends = torch.cat([torch.zeros(1, dtype=torch.int32), keep.cumsum(0).int()])
        cu_k = ends[self.cu_k.long()]
        return replace(self, k=self.k[keep], v=self.v[keep], k_pos=self.k_pos[keep], cu_k=cu_k)


@dataclass(frozen=True)
class Tolerance:
    out: float
    lse: float


def _attention(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Matmul, softmax, matmul, each rounded to `dtype`."""
    group = case.q.shape[1] // case.k.shape[1]
    out = torch.zeros(case.q.shape, dtype=dtype)
    lse = torch.full(case.q.shape[:2], -torch.inf, dtype=torch.promote_types(dtype, torch.float32))
    for queries, keys, visible in case.sequences():
        q = case.q[queries].to(dtype).transpose(0, 1)
        k = case.k[keys].to(dtype).repeat_interleave(group, 1).permute(1, 2, 0)
        v = case.v[keys].to(dtype).repeat_interleave(group, 1).transpose(0, 1)
        scores = _scores(case, q, k).masked_fill(~visible, -torch.inf)
        seen = visible.any(1)
        weights = torch.zeros_like(scores)
        weights[:, seen] = scores[:, seen].softmax(-1)
        out[queries] = (weights @ v).transpose(0, 1)
        lse[queries] = scores.to(lse.dtype).logsumexp(-1).T
    return out, lse


def _scores(case: Case, q: Tensor, k: Tensor) -> Tensor:
    scores = q @ k * case.scale
    return scores if case.cap is None else (scores / case.cap).tanh() * case.cap


def _largest_score(case: Case) -> float:
    group, largest = case.q.shape[1] // case.k.shape[1], 0.0
    for queries, keys, visible in case.sequences():
        k = case.k[keys].double().repeat_interleave(group, 1).permute(1, 2, 0)
        scores = _scores(case, case.q[queries].double().transpose(0, 1), k)
        largest = max(largest, _largest(scores.masked_fill(~visible, 0.0)))
    return largest


def _largest(tensor: Tensor) -> float:
    finite = tensor[tensor.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def unit_roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def tolerance(
    case: Case,
    arithmetic: torch.dtype = torch.float32,
    out_dtype: torch.dtype = torch.float32,
    merged: bool = False,
) -> Tolerance:
    """What the module's text derives, for a kernel that computes in `arithmetic`."""
    exact_out, exact_lse = case.exact
    plain_out, plain_lse = case.plain(arithmetic)
    seen = exact_lse.isfinite()
    u = unit_roundoff(arithmetic)
    values = max((_largest(case.v[keys]) for _, keys, _ in case.sequences()), default=0.0)
    out = (
        2 * _largest(plain_out - exact_out)
        + 4 * u * values
        + unit_roundoff(out_dtype) * _largest(exact_out)
    )
    lse = 2 * _largest(plain_lse[seen] - exact_lse[seen]) + 4 * u * _largest(exact_lse)
    if case.cap is not None:
        capping = 6 * unit_roundoff(torch.float32) * _largest_score(case)
        out, lse = out + 2 * capping * values, lse + capping
    if merged:
        out += 2 * lse * values + 2 * u * values
        lse += 2 * unit_roundoff(torch.float32) * _largest(exact_lse)
    return Tolerance(out, lse)


def check(case: Case, result: tuple[Tensor, Tensor], allowed: Tolerance) -> None:
    """Asserts that a partial is within `allowed` of float64, and (0, -inf) where no key is seen."""
    out, lse = result
    exact_out, exact_lse = case.exact
    assert (
        out.shape == exact_out.shape and lse.shape == exact_lse.shape and lse.dtype == torch.float32
    )
    unseen = exact_lse == -torch.inf
    assert torch.equal(lse == -torch.inf, unseen)
    assert torch.all(out[unseen] == 0)
    out_error = (out.double() - exact_out).abs()
    lse_error = (lse.double() - exact_lse)[~unseen].abs()
    assert torch.all(out_error <= allowed.out), (
        f"out errs by {out_error.max():.3g}, allowed {allowed.out:.3g}"
    )
    assert torch.all(lse_error <= allowed.lse), (
        f"lse errs by {lse_error.max():.3g}, allowed {allowed.lse:.3g}"
    )


def make_case(
    sequences: list[tuple],
    *,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 64,
    dtype: torch.dtype = torch.float32,
    kv_dtype: torch.dtype | None = None,
    slack: int = 0,
    spread: float = 1.0,
    seed: int = 0,
) -> Case:
    """Random inputs. Each sequence is (query positions, key positions), ascending ints.

    K and V are strided views of one slab [tokens, 2, heads, head_dim], as in the KV cache, with
    `slack` empty slots of NaN at the end of every sequence. `spread` scales q, hence the scores.
    `kv_dtype` is theirs where it is not that of q.
    """
    generator = torch.Generator().manual_seed(seed)
    q_heads, kv_heads = heads
    queries = [torch.tensor(list(q), dtype=torch.int32) for q, _ in sequences]
    keys = [torch.tensor([*k, *[EMPTY_SLOT] * slack], dtype=torch.int32) for _, k in sequences]
    empty = torch.zeros(0, dtype=torch.int32)
    q_pos, k_pos = torch.cat([empty, *queries]), torch.cat([empty, *keys])
    q = torch.randn(len(q_pos), q_heads, head_dim, generator=generator) * spread
    slab = torch.randn(len(k_pos), 2, kv_heads, head_dim, generator=generator)
    slab[k_pos == EMPTY_SLOT] = torch.nan
    slab = slab.to(kv_dtype or dtype)
    return Case(
        q.to(dtype),
        slab[:, 0],
        slab[:, 1],
        q_pos,
        k_pos,
        _offsets(queries),
        _offsets(keys),
        head_dim**-0.5,
    )


def _offsets(parts: list[Tensor]) -> Tensor:
    return torch.tensor([0, *[len(part) for part in parts]], dtype=torch.int32).cumsum(0).int()
