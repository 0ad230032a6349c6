"""One call of attention on one device, compared with torch's and with the device's ceilings.

A call takes at least the time of its operations at the rate of a large matrix product in the same
dtype, and at least that of reading its keys and values: the larger is its ceiling. torch gets
contiguous [heads, tokens, D]; our op [tokens, heads, D] and a slab of K and V as the KV cache holds
them; both lie in large pages. torch's causal mask has no form for cached tokens, so these have no
torch time, except for a single query, which sees all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from cptool.bench.ceilings import matmul_rate, memory_rate
from cptool.bench.timing import calls_per_sample, interleave, mean_of_calls
from cptool.host import large_pages
from cptool.ops.attention import attention_partial
from cptool.ops.kernels import cpu_isa

SAMPLED_ROWS = 16


@dataclass(frozen=True, kw_only=True)
class AttentionProblem:
    """`tokens` queries over `cached` keys and over themselves."""

    tokens: int
    cached: int
    q_heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def flops(self) -> float:
        """Operations: 4 D per visible pair and query head."""
        pairs = self.tokens * self.cached + self.tokens * (self.tokens + 1) / 2
        return 4.0 * self.head_dim * self.q_heads * pairs

    def facts(self) -> dict[str, object]:
        """Return the fields, as a result states them."""
        return {**vars(self), "dtype": str(self.dtype).removeprefix("torch.")}


class Inputs:
    """Random arguments for one problem, and our op's and torch's calls on them."""

    def __init__(self, problem: AttentionProblem, device: str = "cpu") -> None:
        self.problem, self.device = problem, device
        keys = problem.cached + problem.tokens
        generator = torch.Generator().manual_seed(0)

        def random(*size: int) -> torch.Tensor:
            return torch.randn(size, generator=generator).to(device, problem.dtype)

        self.q = self._in_large_pages(random(problem.tokens, problem.q_heads, problem.head_dim))
        self.slab = self._in_large_pages(random(keys, 2, problem.kv_heads, problem.head_dim))
        self.scale = problem.head_dim**-0.5
        self.q_pos = torch.arange(problem.cached, keys, dtype=torch.int32, device=device)
        self.k_pos = torch.arange(keys, dtype=torch.int32, device=device)
        self.cu_q = torch.tensor([0, problem.tokens], dtype=torch.int32, device=device)
        self.cu_k = torch.tensor([0, keys], dtype=torch.int32, device=device)
        self._q, self._k, self._v = (
            self._in_large_pages(x.transpose(0, 1)[None])
            for x in (self.q, self.slab[:, 0], self.slab[:, 1])
        )

    @staticmethod
    def _in_large_pages(x: torch.Tensor) -> torch.Tensor:
        if not x.is_cpu:
            return x.contiguous()
        return large_pages.empty(x.shape, x.dtype).copy_(x)

    def ours(self) -> torch.Tensor:
        """Return the result of our op, [tokens, heads, D]."""
        k, v = self.slab.unbind(1)
        return attention_partial(
            self.q,
            k,
            v,
            q_pos=self.q_pos,
            k_pos=self.k_pos,
            cu_q=self.cu_q,
            cu_k=self.cu_k,
            scale=self.scale,
            out_dtype=self.problem.dtype,
        )[0]

    @property
    def torch_can(self) -> bool:
        """Whether torch's causal mask covers the problem."""
        return self.problem.cached == 0 or self.problem.tokens == 1

    def torch(self) -> torch.Tensor:
        """Return torch's result: on a CPU of its flash attention, on CUDA of what it picks."""
        problem = self.problem
        on_cpu = self.device == "cpu"
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if on_cpu else nullcontext():
            out = scaled_dot_product_attention(
                self._q,
                self._k,
                self._v,
                is_causal=problem.tokens > 1,
                scale=self.scale,
                enable_gqa=problem.q_heads != problem.kv_heads,
            )
        return out[0].transpose(0, 1)

    def errors(self) -> dict[str, float | None]:
        """Return the largest distances from float64 over sampled rows, first and last included."""
        group = self.problem.q_heads // self.problem.kv_heads
        rows = torch.linspace(0, self.problem.tokens - 1, SAMPLED_ROWS).long().unique()
        q, (k, v) = self.q.cpu(), self.slab.cpu().repeat_interleave(group, 2).unbind(1)
        exact = torch.empty(len(rows), *q.shape[1:], dtype=torch.float64)
        for i, row in enumerate(rows):
            end = self.problem.cached + int(row) + 1
            scores = torch.einsum("hd,khd->hk", q[row].double(), k[:end].double()) * self.scale
            exact[i] = torch.einsum("hk,khd->hd", scores.softmax(-1), v[:end].double())

        def error(out: torch.Tensor) -> float:
            return float((out.cpu()[rows].double() - exact).abs().max())

        return {
            "error": error(self.ours()),
            "torch_error": error(self.torch()) if self.torch_can else None,
        }


def measure(
    problems: list[AttentionProblem], device: str, repeats: int
) -> Iterator[dict[str, object]]:
    """Measure our op, torch's and the ceilings, interleaved; yield one result per problem.

    Rates are per second.
    """
    for problem in problems:
        inputs = Inputs(problem, device)
        repeated = partial(
            mean_of_calls, calls=calls_per_sample(inputs.ours, device), device=device
        )
        measures: dict[str, Callable[[], float]] = {
            "ours": partial(repeated, inputs.ours),
            "matmul": partial(matmul_rate, problem.dtype, device),
            "memory": partial(memory_rate, inputs.slab),
        }
        if inputs.torch_can:
            measures["torch"] = partial(repeated, inputs.torch)
        measured = interleave(measures, repeats)
        ours, peer = measured["ours"], measured.get("torch")
        time = ours["median"]
        compute_s = problem.flops / measured["matmul"]["median"]
        memory_s = inputs.slab.nbytes / measured["memory"]["median"]
        yield {
            **problem.facts(),
            "kernel": cpu_isa(problem.dtype, problem.head_dim) if device == "cpu" else "cuda",
            "seconds": ours,
            "flops": problem.flops / time,
            "kv_bytes": inputs.slab.nbytes / time,
            "bound": "compute" if compute_s >= memory_s else "memory",
            "of_ceiling": max(compute_s, memory_s) / time,
            "ceilings": {name: measured[name] for name in ("matmul", "memory")},
            "torch_seconds": peer,
            "torch_over_ours": peer["median"] / time if peer else None,
            **inputs.errors(),
        }
