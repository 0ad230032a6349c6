"""CUDA attention, decode, merge and ring steps, held against the device and against torch.

    python benchmarks/gpu_attention.py attention decode merge ring --json FILE
    python benchmarks/gpu_attention.py --device cpu attention      # the script itself, tiny sizes

All that is compared runs in turn in one process, round after round; figures are medians.

- attention: causal forward, 16K tokens in all as in the FlashAttention-3 paper, and partial prefill
  over cached tokens. Peers: torch's cuDNN and flash attention, FlashAttention-3 where it can be
  imported. Ceiling: a bf16 matrix product. 4 D operations for each visible pair and query head.
- decode: one query token a sequence over a KV cache, each call another cache so that none is found
  in L2; called one by one and through a CUDA graph. Ceiling: a copy, bytes read and written.
- merge: the same ceiling, over bytes read and written.
- ring: pass-KV over the blocks of all sources, its transfers as copies on a second stream, against
  the same kernels without transfers, and with copies that nothing hides.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence

import torch
from gpu_timing import (
    Candidate,
    arguments,
    copy,
    cuda,
    graph,
    interleave,
    kernels,
    parser,
    product,
    timed,
    write,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from cptool.cache import KVCache
from cptool.distributed.devices import NCCL_BLOCKS
from cptool.ops.attention import attention_partial, merge_partials
from cptool.ops.kernels import force_cuda_kernel
from cptool.parallel.attention import attend
from cptool.parallel.ring import Ring
from cptool.parallel.step import Scores, Step
from cptool.sharding import balanced

BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
SAMPLED = 8


class Inputs:
    """`batch` sequences of `tokens` queries over `cached` keys and over themselves."""

    def __init__(
        self,
        tokens: int,
        cached: int,
        batch: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.tokens, self.cached, self.batch, self.device = tokens, cached, batch, device
        self.heads, self.kv_heads, self.head_dim, self.dtype = heads, kv_heads, head_dim, dtype
        keys, self.scale = tokens + cached, head_dim**-0.5

        def integers(*parts: torch.Tensor) -> torch.Tensor:
            return torch.cat(parts).to(device, torch.int32)

        self.q = torch.randn(batch * tokens, heads, head_dim, device=device, dtype=dtype)
        self.kv = torch.randn(batch * keys, 2, kv_heads, head_dim, device=device, dtype=dtype)
        self.positions = (
            integers(*[torch.arange(cached, keys)] * batch),
            integers(*[torch.arange(keys)] * batch),
            integers(torch.arange(batch + 1) * tokens),
            integers(torch.arange(batch + 1) * keys),
        )

    @property
    def flops(self) -> float:
        pairs = self.tokens * self.cached + self.tokens * (self.tokens + 1) / 2
        return 4.0 * self.head_dim * self.heads * self.batch * pairs

    def facts(self) -> dict[str, object]:
        names = ("tokens", "cached", "batch", "heads", "kv_heads", "head_dim")
        facts = {name: getattr(self, name) for name in names}
        return {**facts, "dtype": str(self.dtype).removeprefix("torch.")}

    def ours(self, kernel: str | None = None, out_dtype: torch.dtype | None = None) -> torch.Tensor:
        k, v = self.kv.unbind(1)
        call = (self.q, k, v, *self.positions, self.scale)
        out_dtype = out_dtype or self.dtype
        if kernel is None:
            return attention_partial(*call, out_dtype=out_dtype)[0]
        with force_cuda_kernel(kernel):
            return attention_partial(*call, out_dtype=out_dtype)[0]

    def by_sequence(self, x: torch.Tensor) -> torch.Tensor:
        """[batch * tokens, heads, D] as [batch, tokens, heads, D]."""
        return x.unflatten(0, (self.batch, -1))

    def error(self) -> float:
        """Largest distance of ours from float64 over some rows of the last sequence."""
        rows = torch.linspace(0, self.tokens - 1, SAMPLED).long().unique().to(self.device)
        q = self.by_sequence(self.q)[-1][rows].double()
        kv = self.by_sequence(self.kv)[-1]
        group = self.heads // self.kv_heads
        worst = 0.0
        out = self.by_sequence(self.ours())[-1][rows].double()
        visible = (rows + self.cached)[:, None] >= torch.arange(len(kv), device=self.device)
        for head in range(self.heads):
            k, v = kv[:, :, head // group].double().unbind(1)
            scores = (q[:, head] @ k.T * self.scale).masked_fill(~visible, -torch.inf)
            worst = max(worst, float((scores.softmax(-1) @ v - out[:, head]).abs().max()))
        return worst


def sdpa(inputs: Inputs, backend: SDPBackend) -> Callable[[], torch.Tensor]:
    """torch's attention over contiguous [batch, heads, tokens, D]."""
    q = inputs.by_sequence(inputs.q).transpose(1, 2).contiguous()
    k, v = (inputs.by_sequence(x).transpose(1, 2).contiguous() for x in inputs.kv.unbind(1))
    options = {"scale": inputs.scale, "enable_gqa": inputs.heads != inputs.kv_heads}
    if inputs.tokens > 1 and inputs.cached:
        from torch.nn.attention.bias import causal_lower_right

        options["attn_mask"] = causal_lower_right(inputs.tokens, inputs.tokens + inputs.cached)
    else:
        options["is_causal"] = inputs.tokens > 1

    def run() -> torch.Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, **options)

    return run


def flash3(inputs: Inputs) -> Callable[[], object] | None:
    """FlashAttention-3, whose causal mask is aligned at the end; None where it is not installed."""
    try:
        from flash_attn_interface import flash_attn_func
    except ImportError:
        return None
    q = inputs.by_sequence(inputs.q)
    k, v = (inputs.by_sequence(x).contiguous() for x in inputs.kv.unbind(1))
    return lambda: flash_attn_func(q, k, v, softmax_scale=inputs.scale, causal=True)


def rate(work: float, candidate: Candidate) -> float | None:
    return work / candidate.seconds["median"] if candidate.seconds else None


def told(
    case: str,
    facts: dict,
    candidates: dict[str, Candidate],
    work: dict[str, float],
    ceiling: str,
    **more: object,
) -> dict[str, object]:
    """One result; prints a line for each candidate with its rate and its part of the ceiling.

    work: operations or bytes of one piece of each candidate's work; "" those of all not named.
    """
    limit = rate(work[ceiling], candidates[ceiling])
    unit = "TFLOP/s" if case in ("attention", "ring") else "GB/s"
    scale = 1e12 if unit == "TFLOP/s" else 1e9
    named = " ".join(f"{name}={value}" for name, value in facts.items())
    print(f"{case} {named} " + " ".join(f"{k}={v:.2e}" for k, v in more.items()))
    entries = {}
    for name, candidate in candidates.items():
        reached = rate(work.get(name, work[""]), candidate)
        entries[name] = {
            "seconds": candidate.seconds,
            "rate": reached,
            "of_ceiling": reached / limit if reached and limit else None,
            "failure": candidate.failure,
        }
        if reached is None:
            print(f"    {name:14} {candidate.failure}")
            continue
        print(
            f"    {name:14} {1e6 * candidate.seconds['median']:11.1f} us "
            f"{reached / scale:9.1f} {unit} {100 * reached / limit:6.1f}% of {ceiling}"
        )
    return {"case": case, **facts, "unit": unit, "ceiling": ceiling, **more, "candidates": entries}


def attention(given: argparse.Namespace) -> list[dict[str, object]]:
    device, dtype = given.device, torch.bfloat16
    if cuda(device):
        total = 16384
        sizes = [
            (t, 0, max(1, total // t), 16, 16, 128) for t in (1024, 2048, 4096, 8192, 16384, 32768)
        ]
        sizes += [(t, 0, max(1, total // t), 32, 32, 64) for t in (2048, 8192, 16384)]
        sizes += [(8192, 0, 1, 64, 8, 128), (16384, 0, 1, 16, 1, 128)]
        sizes += [
            (1024, 16384, 1, 16, 1, 128),
            (4096, 16384, 1, 16, 1, 128),
            (2048, 124 * 1024, 1, 16, 1, 128),
        ]
    else:
        sizes = [(64, 0, 2, 4, 4, 128), (48, 33, 1, 4, 1, 64)]
    ceiling = product(device, dtype)
    return [attention_of(given, Inputs(*size, dtype, device), ceiling) for size in sizes]


def attention_of(
    given: argparse.Namespace, inputs: Inputs, ceiling: tuple[Callable[[], object], float]
) -> dict[str, object]:
    """One call, and a matrix product beside it: `ceiling` is its call and its operations."""
    run, flops = ceiling
    window = 0.02 if cuda(given.device) else 0.0
    calls = {"ours": inputs.ours}
    for kernel in kernels(given.device)[:-1]:  # the last one is what the op chooses
        if kernel != "simt":  # a hundred times slower than the others
            calls[f"ours {kernel}"] = functools.partial(inputs.ours, kernel)
    for name, backend in BACKENDS.items():
        calls[name] = sdpa(inputs, backend)
    third = flash3(inputs)
    if third is not None:
        calls["flash3"] = third
    calls["gemm"] = run
    candidates = {name: Candidate(call, given.device, window) for name, call in calls.items()}
    interleave(candidates, given.rounds)
    work = {"": inputs.flops, "gemm": flops}
    return told("attention", inputs.facts(), candidates, work, "gemm", error=inputs.error())


def decode(given: argparse.Namespace) -> list[dict[str, object]]:
    device, dtype = given.device, torch.bfloat16
    if cuda(device):
        sizes = [
            (keys, batch, heads, kv_heads)
            for heads, kv_heads in ((32, 8), (16, 1))
            for keys, batch in (
                (4096, 1),
                (16384, 1),
                (65536, 1),
                (131072, 1),
                (4096, 8),
                (32768, 4),
            )
        ]
    else:
        sizes = [(96, 1, 8, 2), (40, 3, 4, 1)]
    ceiling = copy(device)
    return [
        decode_of(given, (1, keys - 1, batch, heads, kv_heads, 128, dtype, device), ceiling)
        for keys, batch, heads, kv_heads in sizes
    ]


def decode_of(
    given: argparse.Namespace, size: tuple, ceiling: tuple[Callable[[], object], float]
) -> dict[str, object]:
    """A decode step over caches in turn, and a copy beside it: its call and its bytes."""
    device = given.device
    first = Inputs(*size)
    # Together several times the L2 cache, so that each call reads memory.
    count = max(2, min(32, -(-(2**28) // first.kv.nbytes))) if cuda(device) else 2
    sets = [first, *(Inputs(*size) for _ in range(count - 1))]
    window = 0.01 if cuda(device) else 0.0
    candidates = {}
    for name, make in _decode_calls(sets, device).items():
        try:
            call = make()
        except (RuntimeError, ValueError, NotImplementedError) as error:
            call = _raising(error)
        candidates[name] = Candidate(call, device, window, per_run=count)
    run, moved = ceiling
    candidates["copy"] = Candidate(run, device, window)
    interleave(candidates, given.rounds)
    _, cached, batch, heads, kv_heads, head_dim, *_ = size
    facts = {
        "keys": cached + 1,
        "batch": batch,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
    }
    work = {"": float(first.kv.nbytes), "copy": moved}
    return told("decode", facts, candidates, work, "copy", error=first.error())


def _decode_calls(
    sets: Sequence[Inputs], device: torch.device
) -> dict[str, Callable[[], Callable[[], object]]]:
    """What makes each contestant's call over all `sets`; it may raise."""
    ours = _each([inputs.ours for inputs in sets])
    makers: dict[str, Callable[[], Callable[[], object]]] = {
        "ours": lambda: ours,
        "ours graph": lambda: graph(ours, device),
    }
    for kernel in kernels(device)[:-1]:
        forced = _each([functools.partial(inputs.ours, kernel) for inputs in sets])
        makers[f"{kernel} graph"] = functools.partial(graph, forced, device)
    for name, backend in BACKENDS.items():
        makers[f"{name} graph"] = functools.partial(_graph_of_sdpa, sets, backend, device)
    return makers


def _graph_of_sdpa(
    sets: Sequence[Inputs], backend: SDPBackend, device: torch.device
) -> Callable[[], object]:
    return graph(_each([sdpa(inputs, backend) for inputs in sets]), device)


def _each(calls: Sequence[Callable[[], object]]) -> Callable[[], None]:
    def run_all() -> None:
        for call in calls:
            call()

    return run_all


def _raising(error: Exception) -> Callable[[], object]:
    def run() -> None:
        raise error

    return run


def merge(given: argparse.Namespace) -> list[dict[str, object]]:
    device = given.device
    tokens, heads = (8192, 32) if cuda(device) else (16, 2)
    run, moved = copy(device)
    results = []
    for partials, dtype in (
        (2, torch.float32),
        (4, torch.float32),
        (4, torch.bfloat16),
        (16, torch.float32),
    ):
        outs = [torch.randn(tokens, heads, 128, device=device).to(dtype) for _ in range(partials)]
        lses = [torch.randn(tokens, heads, device=device) for _ in range(partials)]
        written = tokens * heads * (128 * 2 + 4)
        count = sum(x.nbytes for x in (*outs, *lses)) + written
        calls = {
            "ours": lambda outs=outs, lses=lses: merge_partials(outs, lses, torch.bfloat16),
            "copy": run,
        }
        window = 0.01 if cuda(device) else 0.0
        candidates = {name: Candidate(call, device, window) for name, call in calls.items()}
        interleave(candidates, given.rounds)
        facts = {
            "partials": partials,
            "tokens": tokens,
            "heads": heads,
            "head_dim": 128,
            "dtype": str(dtype).removeprefix("torch."),
        }
        results.append(told("merge", facts, candidates, {"": count, "copy": moved}, "copy"))
    return results


class CopyRing(Ring):
    """A ring whose transfers are copies on the device.

    how: "beside", on a stream of their own of high priority; "kernel", the same by a kernel, which
        needs multiprocessors as NCCL does; "in turn", in the stream of compute; "", left out.
    free: multiprocessors that attention leaves free while one is under way.

    A block that "arrives" is a copy of the one sent, as long as what is expected.
    """

    def __init__(self, rank: int, size: int, device: torch.device, how: str, free: int = 0):
        super().__init__()
        self.rank, self.size, self.how, self.free = rank, size, how, free
        aside = how in ("beside", "kernel") and cuda(device)
        self.side = torch.cuda.Stream(device, priority=-1) if aside else None

    @property
    def margin(self) -> int:
        return self.free if self._batches else 0

    def _start(self, sends, receives) -> list:
        self._batches += 1
        if not self.how:
            return []
        pairs = [
            (incoming, outgoing[: len(incoming)])
            for (_, outgoing), (_, incoming) in zip(sends, receives, strict=True)
        ]
        if self.side is None:
            for incoming, outgoing in pairs:
                incoming[: len(outgoing)].copy_(outgoing)
            return []
        self.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side):
            for incoming, outgoing in pairs:
                arrived = incoming[: len(outgoing)]
                if self.how == "kernel":
                    torch.add(outgoing, 0, out=arrived)
                else:
                    arrived.copy_(outgoing)
        return [self.side.record_event()]

    def wait(self, pending) -> None:
        for event in pending:
            torch.cuda.current_stream().wait_event(event)
        self._batches -= 1


def ring(given: argparse.Namespace) -> list[dict[str, object]]:
    device, dtype = given.device, torch.bfloat16
    if cuda(device):
        sizes = [(8192, 8, 16, 16), (8192, 8, 16, 1), (2048, 8, 16, 1), (8192, 16, 16, 1)]
    else:
        sizes = [(24, 4, 4, 2)]
    ceiling = product(device, dtype)
    return [ring_of_size(given, *size, ceiling) for size in sizes]


def ring_of_size(
    given: argparse.Namespace,
    tokens: int,
    ranks: int,
    heads: int,
    kv_heads: int,
    ceiling: tuple[Callable[[], object], float],
) -> dict[str, object]:
    """One layer of pass-KV as rank 0 of `ranks` computes it, its transfers copies on the device."""
    device, dtype = given.device, torch.bfloat16
    run, flops = ceiling
    placements = tuple(p.to(device) for p in balanced([tokens * ranks], ranks).placements())
    step = Step(0, placements, placements)
    q = torch.randn(tokens, heads, 128, device=device, dtype=dtype)
    cache = KVCache(layers=1, kv_heads=kv_heads, head_dim=128, batch=1, dtype=dtype, device=device)
    cache.extend(placements[0])
    cache.store(0, *(torch.randn(2, tokens, kv_heads, 128, device=device, dtype=dtype)))
    kv, scores = cache.layer(0), Scores(128**-0.5)

    def forward(how: str, free: int = 0) -> Callable[[], object]:
        transfers = CopyRing(0, ranks, device, how, free)
        for name in range(2):  # what is received before the first copy must be finite
            transfers.buffer(name, tokens, kv.packed()).zero_()
        return lambda: attend("pass-kv", q, kv, step, ring=transfers, scores=scores)

    calls = {
        "pass-kv": forward("beside"),
        "by a kernel": forward("kernel"),
        "by a kernel, room left": forward("kernel", NCCL_BLOCKS),
        "in turn": forward("in turn"),
        "kernels alone": forward(""),
        "gemm": run,
    }
    window = 0.02 if cuda(device) else 0.0
    candidates = {name: Candidate(call, device, window) for name, call in calls.items()}
    interleave(candidates, given.rounds)
    pairs = sum(
        int(torch.searchsorted(keys.positions, placements[0].positions, right=True).sum())
        for keys in placements
    )
    work = {"": 4.0 * 128 * heads * pairs, "gemm": flops}
    facts = {
        "tokens_per_rank": tokens,
        "ranks": ranks,
        "heads": heads,
        "kv_heads": kv_heads,
        "block_bytes": kv.packed().nbytes,
    }
    alone, beside = (candidates[name].seconds for name in ("kernels alone", "pass-kv"))
    hidden = alone["median"] / beside["median"] if alone and beside else float("nan")
    copied = timed(lambda: kv.packed().clone(), device)
    return told("ring", facts, candidates, work, "gemm", of_kernels_alone=hidden, copy_s=copied)


PARTS = {"attention": attention, "decode": decode, "merge": merge, "ring": ring}


@torch.inference_mode()
def main() -> None:
    options = parser(__doc__.partition("\n\n")[0])
    options.add_argument("parts", nargs="+", choices=list(PARTS), metavar="PART")
    given = arguments(options)
    torch.manual_seed(0)
    results = [result for part in given.parts for result in PARTS[part](given)]
    write(given, results)


if __name__ == "__main__":
    main()
