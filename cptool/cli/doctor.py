"""`cptool doctor`: what was built, what the machine offers, and whether the kernels are right."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cptool.cli import draw
from cptool.cli.draw import Rows

if TYPE_CHECKING:
    from cptool.exactness.selftest import Check


@click.command(short_help="Show the build and the machine, and test the kernels here.")
def doctor() -> None:
    """Show the build and the machine, and test all kernels against float64 on this machine.

    Exits with 1 if a kernel is wrong here; of a GPU's, it then names the fastest that is right.
    """
    import torch

    from cptool.exactness import selftest
    from cptool.ops.kernels import build_info

    draw.table([*_build_rows(), *_machine_rows()])
    rows = [_row(check, "cpu") for check in selftest.run("cpu")]
    remedy = ""
    if torch.cuda.is_available() and build_info()["cuda_archs"]:
        found, best = _gpu_rows()
        rows += found
        remedy = _remedy(best)
    draw.table(rows)
    failed = sum(verdict == _WRONG for verdict, _ in rows)
    if failed:
        draw.say(
            f"cptool doctor: {failed} of {len(rows)} checks failed; results on this machine are "
            f"not to be trusted{remedy}",
            always=True,
        )
        sys.exit(1)


_WRONG = "WRONG"


def _build_rows() -> Rows:
    """Return what was built, and which of it this machine uses."""
    import torch

    import cptool
    from cptool.ops.kernels import build_info, cpu_isa, cpu_linear_isa, cuda_kernels
    from cptool.ops.linear import FEW_ROWS

    built: dict[str, Any] = build_info()
    in_use = [
        f"{name}: {cpu_isa(getattr(torch, name))}" for name in ("float32", "bfloat16", "float16")
    ]
    if cuda_kernels():
        in_use.append(f"GPU: {', '.join(cuda_kernels())}")
    few_rows = [
        f"{str(dtype).removeprefix('torch.')}: {cpu_linear_isa(dtype)}"
        + (f" up to {most}" if most < sys.maxsize else "")
        for dtype, most in FEW_ROWS.items()
    ]
    return [
        ("cptool", f"{cptool.__version__} in {Path(cptool.__file__).parent}"),
        ("kernels", f"{', '.join(built['isas'])}; {_cuda()}; built with {built['compiler']}"),
        ("in use", "; ".join([", ".join(in_use[:3]), *in_use[3:]])),
        ("few rows", ", ".join(few_rows)),
    ]


def _machine_rows() -> Rows:
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return [
        ("python", f"{platform.python_version()}, torch {torch.__version__}"),
        ("machine", f"{_processor()}, {os.cpu_count()} processors, {_memory()}"),
        ("GPUs", ", ".join(gpus) or "none"),
    ]


def _remedy(best: str | None) -> str:
    """Return what to do about wrong kernels of the GPU, of which `best` is the fastest to use."""
    from cptool.ops.kernels import cuda_kernels

    if best is None:
        return "; no kernel is right on the GPU: use --device cpu"
    if best != cuda_kernels()[-1]:
        return (
            f"; the fastest right one on the GPU is {best}: set CPTOOL_CUDA_KERNEL={best} to "
            "limit cptool to it"
        )
    return ""


def _row(check: Check, device: str) -> tuple[str, str]:
    return (
        "ok" if check.passed else _WRONG,
        f"{check.name} on {device}: error {check.error:.2e}, allowed {check.allowed:.2e}",
    )


def _gpu_rows() -> tuple[Rows, str | None]:
    """Check each kernel of the GPU, and return the fastest to use, None if there is none.

    That one is right, and so are all slower ones, which do what it does not support. Each runs in a
    process of its own, because one that breaks the device would break it for the others.
    """
    from cptool.exactness import selftest
    from cptool.ops.kernels import cuda_kernels

    rows: Rows = []
    best, sound = None, True
    for kernel in cuda_kernels():
        try:
            checks = selftest.run_apart("cuda", kernel)
            rows += [_row(check, "cuda") for check in checks]
            sound = sound and all(check.passed for check in checks)
        except RuntimeError as error:
            rows.append((_WRONG, f"{kernel} on cuda: {error}"))
            sound = False
        if sound:
            best = kernel
    return rows, best


def _cuda() -> str:
    from cptool.ops.kernels import build_info

    archs: Any = build_info()["cuda_archs"]
    return f"CUDA for sm_{', sm_'.join(archs)}" if archs else "no CUDA"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory() -> str:
    return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB"
