"""Merging partials on one device, compared with a copy and with torch's own operations.

The merge reads each partial once and writes one result, so its ceiling is a copy of as many bytes,
read and written.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch

from cptool.bench.ceilings import memory_rate
from cptool.bench.timing import calls_per_sample, interleave, mean_of_calls
from cptool.ops.attention import merge_partials


@dataclass(frozen=True, kw_only=True)
class MergeProblem:
    """`partials` results [tokens, heads, head_dim] of `dtype`, each with log-sum-exps."""

    partials: int
    tokens: int
    heads: int
    head_dim: int
    dtype: torch.dtype

    def facts(self) -> dict[str, object]:
        """Return the fields, as a result states them."""
        return {**vars(self), "dtype": str(self.dtype).removeprefix("torch.")}


def by_torch(outs: list[torch.Tensor], lses: list[torch.Tensor]) -> torch.Tensor:
    """Return the same result by torch's operations, each of which passes over memory."""
    weights = torch.stack(lses).softmax(0)
    merged = weights[0, :, :, None] * outs[0]
    for weight, out in zip(weights[1:], outs[1:], strict=True):
        merged.addcmul_(weight[:, :, None], out.to(torch.float32))
    return merged.to(outs[0].dtype)


def measure(problems: list[MergeProblem], device: str, repeats: int) -> Iterator[dict[str, object]]:
    """Measure our op, torch's and the ceiling, interleaved; yield one result per problem.

    Rates are per second.
    """
    for problem in problems:
        size = (problem.tokens, problem.heads, problem.head_dim)
        outs = [torch.randn(size, device=device).to(problem.dtype) for _ in range(problem.partials)]
        lses = [torch.randn(size[:2], device=device) for _ in range(problem.partials)]
        moved = sum(t.nbytes for t in (*outs, *lses)) + outs[0].nbytes + lses[0].nbytes
        ours = partial(merge_partials, outs, lses, problem.dtype)
        repeated = partial(mean_of_calls, calls=calls_per_sample(ours, device), device=device)
        measured = interleave(
            {
                "ours": partial(repeated, ours),
                "torch": partial(repeated, partial(by_torch, outs, lses)),
                "memory": partial(memory_rate, torch.cat(outs)),
            },
            repeats,
        )
        time = measured["ours"]["median"]
        exact = torch.einsum(
            "sth,sthd->thd",
            torch.stack(lses).double().softmax(0),
            torch.stack(outs).double(),
        )
        merged = merge_partials(outs, lses, problem.dtype)[0]
        yield {
            **problem.facts(),
            "seconds": measured["ours"],
            "bytes": moved / time,
            "of_ceiling": moved / time / measured["memory"]["median"],
            "ceilings": {"memory": measured["memory"]},
            "torch_seconds": measured["torch"],
            "torch_over_ours": measured["torch"]["median"] / time,
            "error": float((merged.double() - exact).abs().max()),
        }
