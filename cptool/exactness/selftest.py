"""Are the kernels right on this machine? All of them against float64, in seconds.

`cptool doctor` runs it; `python -m cptool.exactness.selftest [cpu|cuda] [KERNEL]` does so without
the packages that the command line needs. The test suite covers many more shapes.
"""

import json
import signal
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

import torch

from cptool.cache import NEVER
from cptool.distributed.signals import end_with_parent
from cptool.exactness.reference import attention
from cptool.ops import trials
from cptool.ops.attention import attention_partial, merge_partials
from cptool.ops.elementwise import add_rms_norm_, rotate_, swiglu_
from cptool.ops.kernels import (
    cpu_isa,
    cpu_isas,
    cuda_kernel,
    cuda_kernels,
    force_cpu_isa,
    force_cuda_kernel,
)
from cptool.ops.silu_attention import silu_attention_partial

LIFETIME_S = 120
"""Of a self-test in a process of its own, in case that nobody ends it."""

ROOM_BYTES = 64 << 20
"""Device memory that the checks need, with room to spare."""


@dataclass(frozen=True)
class Check:
    """The largest absolute error found and the largest allowed."""

    name: str
    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed


def kernels(device: str) -> list[str]:
    """Return the attention kernels that this machine runs on `device`, slowest first."""
    return cpu_isas() if device == "cpu" else cuda_kernels()


def run(device: str = "cpu", only: str | None = None) -> Iterator[Check]:
    """Check every kernel that this machine can run, or `only` one: attention in every dtype for
    prefill and decode shapes and with a window and a soft cap; with CUDA's tensor cores also on one
    thread block, into a running result and in pieces of keys; SiLU attention; then the merge and
    the token-wise steps.
    """
    force, head_dims = force_cpu_isa, [64, 128]
    if device == "cuda":
        force, head_dims = force_cuda_kernel, [64, 80, 96, 128]
    for kernel in kernels(device) if only is None else [only]:
        with force(kernel):
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                cases = [(d, case) for d in head_dims for case in (PREFILL, DECODE, WINDOWED)]
                cases.append((100, WINDOWED))  # no multiple of 8: padded in the kernel's tiles
                if device == "cuda" and dtype != torch.float32:
                    cases += TENSOR_CORES
                for head_dim, case in cases:
                    if _taken(device, dtype, head_dim, case) == kernel:
                        yield _attention(device, kernel, dtype, head_dim=head_dim, case=case)
                if device == "cpu" or kernel == "simt":
                    yield _silu_attention(device, kernel, dtype)
    yield _merge(device)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        yield _tokenwise(device, dtype)


@dataclass(frozen=True, kw_only=True)
class Case:
    """Positions of the queries and of the keys of each sequence, in a call that is checked."""

    name: str
    queries: tuple[torch.Tensor, ...]
    keys: tuple[torch.Tensor, ...]
    window: int | None = None
    cap: float | None = None
    sm_margin: int = 0
    into: bool = False
    """Whether every second key is computed with first, and the others into that result."""


# Two sequences in two chunks, as ring shards are; and single tokens over many keys.
PREFILL = Case(
    name="",
    queries=(torch.cat([torch.arange(0, 37), torch.arange(400, 461)]), torch.arange(5, 6)),
    keys=(torch.cat([torch.arange(30, 131), torch.arange(300, 500)]), torch.arange(0, 70)),
)
DECODE = Case(
    name=", decode",
    queries=(torch.arange(1501, 1502), torch.arange(300, 301)),
    keys=(torch.arange(0, 1505), torch.arange(1, 301, 3)),
)
WINDOWED = replace(PREFILL, name=", window and soft cap", window=90, cap=2.0)
# A single thread block takes all jobs, most of them from the counter.
CROWDED = replace(PREFILL, name=", one thread block", sm_margin=1 << 20)
RUNNING = replace(CROWDED, name=", one thread block, into a running result", into=True)
# Few jobs of many keys, with a head dimension that leaves them to the kernel for 9.0.
PIECES = Case(
    name=", pieces of keys", queries=(torch.arange(1990, 2010),), keys=(torch.arange(0, 2010),)
)
TENSOR_CORES = [(64, CROWDED), (64, RUNNING), (128, CROWDED), (128, RUNNING), (112, PIECES)]


def _taken(device: str, dtype: torch.dtype, head_dim: int, case: Case) -> str:
    """Return the kernel that runs such a call now."""
    if device == "cpu":
        return cpu_isa(dtype, head_dim)
    tokens = sum(map(len, case.queries))
    return cuda_kernel(dtype, head_dim, tokens, window=case.window, cap=case.cap)


def _attention(device: str, kernel: str, dtype: torch.dtype, *, head_dim: int, case: Case) -> Check:
    """Check one call, with 9 query heads on 3 KV heads, in a cache with slack."""
    generator = torch.Generator().manual_seed(head_dim)
    q_pos, k_pos, slack = case.queries, case.keys, 13
    q = torch.randn(sum(map(len, q_pos)), 9, head_dim, generator=generator).to(dtype)
    kv = torch.randn(sum(map(len, k_pos)) + len(k_pos) * slack, 2, 3, head_dim, generator=generator)
    kv = kv.to(dtype)
    slots = [torch.cat([p, torch.full((slack,), NEVER)]) for p in k_pos]
    starts = torch.tensor([0, *map(len, slots)]).cumsum(0)
    for stop in starts[1:].tolist():
        kv[stop - slack : stop] = torch.nan
    rows = torch.tensor([0, *map(len, q_pos)]).cumsum(0)
    scale = head_dim**-0.5

    def whole(compute: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        parts = []
        for b in range(len(q_pos)):
            held = slice(starts[b], starts[b] + len(k_pos[b]))
            part = attention(
                q[rows[b] : rows[b + 1]].to(compute),
                kv[held, 0].to(compute),
                kv[held, 1].to(compute),
                q_pos=q_pos[b],
                k_pos=k_pos[b],
                scale=scale,
                window=case.window,
                cap=case.cap,
            )
            parts.append(part)
        return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts])

    out, lse = whole(torch.float64)
    plain = whole(dtype)[0]
    # Twice the error of a plain implementation in the same type, and one rounding of the result.
    allowed = 2 * (plain - out).abs().max() + torch.finfo(dtype).eps * out.abs().max()
    queries = torch.cat(q_pos).int().to(device), rows.int().to(device)
    held = torch.cat(slots).int().to(device), starts.int().to(device)
    got, got_lse = _called(q.to(device), kv.to(device), queries, keys=held, scale=scale, case=case)
    seen, got, got_lse = ~lse.isinf(), got.cpu(), got_lse.cpu()
    pairs = [
        ((got - out).abs().max(), allowed),
        (
            (got_lse - lse)[seen].abs().max(),
            torch.maximum(allowed, 4 * torch.finfo(torch.float32).eps * lse[seen].abs().max()),
        ),
    ]
    error, allowed = max(pairs, key=lambda pair: float(pair[0] / pair[1]))
    if got.isnan().any() or not torch.equal(got_lse.isinf(), ~seen):
        error = torch.tensor(torch.inf)  # a query saw what it must not see, or not what it must
    name = f"attention {kernel}, {str(dtype)[6:]}, D {head_dim}{case.name}"
    return Check(name, float(error), float(allowed))


def _called(
    q: torch.Tensor,
    kv: torch.Tensor,
    queries: tuple[torch.Tensor, torch.Tensor],
    *,
    keys: tuple[torch.Tensor, torch.Tensor],
    scale: float,
    case: Case,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what the kernel says. queries, keys: their positions and offsets."""
    (q_pos, cu_q), (k_pos, cu_k), running = queries, keys, None
    for half in (0, 1) if case.into else (None,):
        # Positions ascend, so every second slot is every second one of each sequence.
        k, v = (kv if half is None else kv[half::2]).unbind(1)
        running = attention_partial(
            q,
            k,
            v,
            q_pos=q_pos,
            k_pos=k_pos if half is None else k_pos[half::2].contiguous(),
            cu_q=cu_q,
            cu_k=cu_k if half is None else (cu_k + 1 - half) // 2,
            scale=scale,
            into=running,
            out_dtype=torch.float32 if case.into else q.dtype,
            window=case.window,
            cap=case.cap,
            sm_margin=case.sm_margin,
        )
    assert running is not None
    return running


def _silu_attention(device: str, kernel: str, dtype: torch.dtype) -> Check:
    """Check SiLU attention of WINDOWED's first sequence, with 6 query heads on 2 KV heads."""
    generator, head_dim = torch.Generator().manual_seed(2), 64
    q_pos, k_pos, window = WINDOWED.queries[0], WINDOWED.keys[0], WINDOWED.window
    assert window is not None
    q = torch.randn(len(q_pos), 6, head_dim, generator=generator).to(dtype)
    k, v = torch.randn(2, len(k_pos), 2, head_dim, generator=generator).to(dtype)
    apart = q_pos[:, None] - k_pos
    seen = (apart >= 0) & (apart < window)

    def whole(compute: torch.dtype) -> torch.Tensor:
        keys, values = (t.to(compute).repeat_interleave(3, 1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q.to(compute), keys) * head_dim**-0.5
        weights = torch.nn.functional.silu(scores) * seen
        return torch.einsum("hqk,khd->qhd", weights, values) / 512

    exact = whole(torch.float64)
    allowed = 2 * (whole(dtype) - exact).abs().max() + torch.finfo(dtype).eps * exact.abs().max()
    got = silu_attention_partial(
        q.to(device),
        k.to(device),
        v.to(device),
        q_pos=q_pos.int().to(device),
        k_pos=k_pos.int().to(device),
        cu_q=torch.tensor([0, len(q_pos)]).int().to(device),
        cu_k=torch.tensor([0, len(k_pos)]).int().to(device),
        scale=head_dim**-0.5,
        max_len=512,
        out_dtype=dtype,
        window=window,
    )
    error = (got.cpu() - exact).abs().max()
    return Check(f"SiLU attention {kernel}, {str(dtype)[6:]}", float(error), float(allowed))


def _merge(device: str) -> Check:
    """Check the merge of partials that saw no key and of LSEs that are 1e4 apart."""
    generator = torch.Generator().manual_seed(0)
    outs = torch.randn(3, 50, 5, 64, generator=generator)
    lses = torch.randn(3, 50, 5, generator=generator)
    lses[0, ::3] += 1e4
    lses[1, ::5] -= 1e4
    lses[2, ::2] = -torch.inf
    total = lses.double().logsumexp(0)
    expected = ((lses.double() - total).exp()[..., None] * outs.double()).sum(0)
    got, lse = merge_partials(list(outs.to(device)), list(lses.to(device)))
    error = torch.maximum(
        (got.cpu() - expected).abs().max(),
        ((lse.cpu() - total) / total.abs().clamp(min=1)).abs().max(),
    )
    allowed = 4 * torch.finfo(torch.float32).eps * expected.abs().max()
    return Check("merge, LSEs 1e4 apart", float(error), float(allowed))


def _tokenwise(device: str, dtype: torch.dtype) -> Check:
    """Check RMSNorm after a sum, rotation and SwiGLU, and return the worst of the three against its
    bound.
    """
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    hidden, added, weight = random(5, 1032), random(5, 1032), random(1032)
    heads, angles = random(5, 3, 64), 100 * torch.rand(5, 1, 32, generator=generator)
    gate, up = random(5, 264), random(5, 264)
    total = (hidden + added).double()
    a, b = heads.double().chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    exact = (
        total / (total.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double(),
        torch.cat([a * cos - b * sin, b * cos + a * sin], -1),
        torch.nn.functional.silu(gate.double()) * up.double(),
    )
    turned = heads.to(device)
    rotate_(turned, cos.to(device), sin.to(device))
    got = (
        add_rms_norm_(hidden.to(device), added.to(device), weight.to(device), 1e-5),
        turned,
        swiglu_(gate.to(device), up.to(device)),
    )
    # Two roundings in the dtype, one in float32 and its sums.
    eps, eps32 = torch.finfo(dtype).eps, torch.finfo(torch.float32).eps
    pairs = [
        ((ours.cpu() - exactly).abs().max(), (1.1 * eps + 64 * eps32) * exactly.abs().max())
        for ours, exactly in zip(got, exact, strict=True)
    ]
    error, allowed = max(pairs, key=lambda pair: float((pair[0] / pair[1]).nan_to_num(torch.inf)))
    return Check(f"token-wise steps, {str(dtype)[6:]}", float(error), float(allowed))


def run_apart(device: str, kernel: str, patience_s: float = 100.0) -> list[Check]:
    """Call `run` for one kernel in a separate process, because a wrong kernel can leave the device
    in a bad state.

    Raises RuntimeError, one line, if that process does not end well: `trials.NotStarted` if that
    says nothing of the kernel.
    """
    process = trials.start(device, kernel)
    return [Check(**fields) for fields in trials.answer(process, patience_s)]


def main(arguments: list[str]) -> int:
    """Print each check as a line of JSON and return `FAILED` if one is wrong.

    With the third argument `trials.APART` this process ends with its parent and in any case soon,
    and prints `trials.READY` once it has the device.
    """
    if arguments[2:] == [trials.APART]:
        end_with_parent()
        signal.alarm(LIFETIME_S)
        torch.ones(ROOM_BYTES, dtype=torch.uint8).to(arguments[0])[-1].item()
        print(json.dumps(trials.READY), flush=True)
    failed = False
    for check in run(*(arguments[:2] or ["cpu"])):
        print(json.dumps(asdict(check)), flush=True)
        failed |= not check.passed
    return trials.FAILED if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
