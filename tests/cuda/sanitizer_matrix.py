"""Every CUDA kernel over a small matrix of shapes, for compute-sanitizer.

    compute-sanitizer --tool memcheck --kernel-name kernel_substring=cptool \\
        python tests/cuda/sanitizer_matrix.py [--device cpu] [KERNEL...]

Tools: memcheck, racecheck, synccheck, initcheck. The results are compared with float64 as in the
tests, and a difference, too, ends in exit code 1. Without kernels all of the device run. With
`--device cpu` it is the CPU's kernels, which shows that the program itself is sound.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

from reference import check, make_case, tolerance

from cptool.ops.attention import attention_partial, merge_partials
from cptool.ops.kernels import (
    cpu_isas,
    cuda_kernel,
    cuda_kernels,
    force_cpu_isa,
    force_cuda_kernel,
)

# Tiles with a rest, shards, empty sequences, queries that see nothing, and decoding in pieces.
SEQUENCES = {
    "prefill": [
        (range(150), range(150)),
        ([*range(20), *range(231, 250)], [*range(33, 66), *range(198, 231)]),
        ([], range(5)),
        (range(7), []),
        (range(3), range(2, 9)),
    ],
    "decode": [([1500], range(1501)), ([], []), ([3], range(5))],
}


# The tools make the largest kernel so slow that all shapes would not end.
FEW = [
    ("prompt", torch.bfloat16, 128, (2, 1)),
    ("prefill", torch.float16, 64, (6, 2)),
]
SEQUENCES["prompt"] = [(range(300), range(300)), (range(130, 200), range(200))]

WINDOWED = {"prefill, window": (40, 5.0), "decode, window": (1100, 5.0)}
"""Sequences with a window and a soft cap."""
SEQUENCES |= {name: SEQUENCES[name.split(",")[0]] for name in WINDOWED}


def cases(kernel: str) -> list[tuple[str, torch.dtype, int, tuple[int, int]]]:
    """Return sequences, dtype, head dimension and heads of what runs on a kernel."""
    if kernel == "sm90":
        return FEW
    windowed = [(name, torch.bfloat16, 128, (4, 2)) for name in WINDOWED]
    return windowed + [
        (name, dtype, head_dim, heads)
        for name in ("prefill", "decode")
        for head_dim, heads in zip(
            (64, 80, 96, 128), [(2, 2), (9, 3), (5, 1), (16, 2)], strict=True
        )
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    ]


def run(
    kernel: str,
    name: str,
    dtype: torch.dtype,
    head_dim: int,
    heads: tuple[int, int],
    *,
    device: str,
) -> None:
    case = make_case(SEQUENCES[name], heads=heads, head_dim=head_dim, dtype=dtype, slack=3)
    window, cap = WINDOWED.get(name, (None, None))
    case = replace(case, window=window, cap=cap)
    slab = torch.stack([case.k, case.v], 1).to(device)
    others = [x.to(device) for x in (case.q_pos, case.k_pos, case.cu_q, case.cu_k)]
    arguments = (case.q.to(device), slab[:, 0], slab[:, 1], *others, case.scale)
    taken = kernel if device == "cpu" else cuda_kernel(dtype, head_dim, window=window, cap=cap)
    allowed = tolerance(
        case, torch.float32 if taken in ("simt", "portable") else dtype, merged=True
    )
    out, lse = attention_partial(*arguments, **case.options)
    check(case, (out.cpu(), lse.cpu()), allowed)
    running = out.clone(), torch.full_like(lse, -torch.inf)
    attention_partial(*arguments, into=running, **case.options)
    check(case, (running[0].cpu(), running[1].cpu()), allowed)
    merged = merge_partials([out, out], [lse, torch.full_like(lse, -torch.inf)])
    assert torch.equal(merged[0], out) and torch.equal(merged[1], lse)
    print(f"{kernel} {name} {dtype} D {head_dim} heads {heads}: ok", flush=True)


def main(arguments: list[str]) -> None:
    device, force, names = "cuda", force_cuda_kernel, cuda_kernels
    if arguments[:1] == ["--device"]:
        device, arguments = arguments[1], arguments[2:]
        if device == "cpu":
            force, names = force_cpu_isa, cpu_isas
    for kernel in arguments or names():
        with force(kernel):
            for case in cases(kernel):
                run(kernel, *case, device=device)


if __name__ == "__main__":
    main(sys.argv[1:])
