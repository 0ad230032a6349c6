"""Are the kernels right on this machine? Both ops against attention in float64, in seconds.

`cptool doctor` runs it; the test suite goes through many more shapes.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from cptool import ops
from cptool.cache import NEVER


@dataclass(frozen=True)
class Check:
    """The largest absolute error found and the largest allowed."""

    name: str
    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_pos: torch.Tensor,
    k_pos: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one sequence, all scores in memory, computed in the type of q: `(out [Tq, Hq,
    D], lse [Tq, Hq])`.
    """
    group = q.shape[1] // k.shape[1]
    keys, values = (x.repeat_interleave(group, dim=1).transpose(0, 1) for x in (k, v))
    scores = (q.transpose(0, 1) @ keys.transpose(1, 2) * scale).masked_fill(
        k_pos > q_pos[:, None], -torch.inf
    )
    lse = scores.logsumexp(-1)
    weights = torch.where(lse.isinf()[..., None], 0, (scores - lse[..., None]).exp())
    return (weights @ values).transpose(0, 1), lse.transpose(0, 1)


def run(device: str = "cpu") -> Iterator[Check]:
    """Every kernel that this machine can run, every dtype: attention, then the merge."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for isa in ops.cpu_isas() if device == "cpu" else ["cuda"]:
            for head_dim in (64, 128):
                with ops.force_cpu_isa(isa) if device == "cpu" else nullcontext():
                    if device != "cpu" or ops.cpu_isa(dtype, head_dim) == isa:
                        yield _attention(device, isa, dtype, head_dim)
    yield _merge(device)


def _attention(device: str, isa: str, dtype: torch.dtype, head_dim: int) -> Check:
    """Two sequences with GQA 9 to 3, in two chunks as ring shards are, in a cache with slack."""
    generator = torch.Generator().manual_seed(head_dim)
    q_pos = [torch.cat([torch.arange(0, 37), torch.arange(400, 461)]), torch.arange(5, 6)]
    k_pos = [torch.cat([torch.arange(30, 131), torch.arange(300, 500)]), torch.arange(0, 70)]
    slack = 13
    q = torch.randn(sum(map(len, q_pos)), 9, head_dim, generator=generator).to(dtype)
    kv = torch.randn(sum(map(len, k_pos)) + 2 * slack, 2, 3, head_dim, generator=generator).to(
        dtype
    )
    slots = [torch.cat([p, torch.full((slack,), NEVER)]) for p in k_pos]
    starts = torch.tensor([0, *map(len, slots)]).cumsum(0)
    for stop in starts[1:].tolist():
        kv[stop - slack : stop] = torch.nan
    rows = torch.tensor([0, *map(len, q_pos)]).cumsum(0)
    scale = head_dim**-0.5

    def whole(compute: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        parts = []
        for b in range(2):
            held = slice(starts[b], starts[b] + len(k_pos[b]))
            tensors = (x.to(compute) for x in (q[rows[b] : rows[b + 1]], kv[held, 0], kv[held, 1]))
            parts.append(attention(*tensors, q_pos[b], k_pos[b], scale))
        return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts])

    out, lse = whole(torch.float64)
    plain = whole(dtype)[0]
    # Twice the error of a plain implementation in the same type, and one rounding of the result.
    allowed = 2 * (plain - out).abs().max() + torch.finfo(dtype).eps * out.abs().max()
    got, got_lse = ops.attention_partial(
        q.to(device),
        *kv.to(device).unbind(1),
        *(torch.cat(p).int().to(device) for p in (q_pos, slots)),
        rows.int().to(device),
        starts.int().to(device),
        scale,
        out_dtype=dtype,
    )
    seen = ~lse.isinf()
    error = torch.maximum((got.cpu() - out).abs().max(), (got_lse.cpu() - lse)[seen].abs().max())
    if not torch.equal(got_lse.cpu().isinf(), ~seen):
        error = torch.tensor(
            torch.inf
        )  # a query saw keys that it must not see, or none where there are some
    return Check(f"attention {isa}, {str(dtype)[6:]}, D {head_dim}", float(error), float(allowed))


def _merge(device: str) -> Check:
    """Partials that saw nothing, and LSEs 1e4 apart, merged in order."""
    generator = torch.Generator().manual_seed(0)
    outs = torch.randn(3, 50, 5, 64, generator=generator)
    lses = torch.randn(3, 50, 5, generator=generator)
    lses[0, ::3] += 1e4
    lses[1, ::5] -= 1e4
    lses[2, ::2] = -torch.inf
    total = lses.double().logsumexp(0)
    expected = ((lses.double() - total).exp()[..., None] * outs.double()).sum(0)
    got, lse = ops.merge_partials(list(outs.to(device)), list(lses.to(device)))
    error = torch.maximum(
        (got.cpu() - expected).abs().max(),
        ((lse.cpu() - total) / total.abs().clamp(min=1)).abs().max(),
    )
    allowed = 4 * torch.finfo(torch.float32).eps * expected.abs().max()
    return Check("merge, LSEs 1e4 apart", float(error), float(allowed))
