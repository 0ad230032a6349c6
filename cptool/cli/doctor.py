"""`cptool doctor`: what was built, what the machine offers, and whether the kernels are right on
it.
"""

import os
import platform
import sys
from pathlib import Path

import click

from cptool.cli import draw


@click.command(short_help="Show the build and the machine, and test the kernels here.")
def doctor() -> None:
    """Show the build and the machine, and test both ops against float64 on this machine.

    Exits with 1 if a kernel is wrong here; of a GPU's, it then names the fastest that is right.
    """
    import torch

    import cptool
    from cptool.exactness import selftest
    from cptool.ops.kernels import build_info, cpu_isa, cpu_linear_isa, cuda_kernels
    from cptool.ops.linear import FEW_ROWS

    draw.table(
        [
            ("cptool", f"{cptool.__version__} in {Path(cptool.__file__).parent}"),
            (
                "kernels",
                f"{', '.join(build_info()['isas'])}; {_cuda()}; built with "
                f"{build_info()['compiler']}",
            ),
            (
                "in use",
                ", ".join(
                    f"{name}: {cpu_isa(getattr(torch, name))}"
                    for name in ("float32", "bfloat16", "float16")
                )
                + (f"; GPU: {', '.join(cuda_kernels())}" if cuda_kernels() else ""),
            ),
            (
                "few rows",
                ", ".join(
                    f"{str(dtype).removeprefix('torch.')}: {cpu_linear_isa(dtype)}"
                    + (f" up to {most}" if most < sys.maxsize else "")
                    for dtype, most in FEW_ROWS.items()
                ),
            ),
            ("python", f"{platform.python_version()}, torch {torch.__version__}"),
            ("machine", f"{_processor()}, {os.cpu_count()} processors, {_memory()}"),
            (
                "GPUs",
                ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
                or "none",
            ),
        ]
    )
    rows, failed = [], 0
    for check in selftest.run("cpu"):
        failed += not check.passed
        rows.append(_row(check, "cpu"))
    remedy = ""
    if torch.cuda.is_available() and build_info()["cuda_archs"]:
        found, best = _gpu_rows()
        rows += found
        failed += sum(verdict == "WRONG" for verdict, _ in found)
        if best is None:
            remedy = "; no kernel is right on the GPU: use --device cpu"
        elif best != cuda_kernels()[-1]:
            remedy = (
                f"; the fastest right one on the GPU is {best}: set CPTOOL_CUDA_KERNEL={best} to "
                "keep to it"
            )
    draw.table(rows)
    if failed:
        draw.say(
            f"cptool doctor: {failed} of {len(rows)} checks failed; results on this machine are "
            f"not to be trusted{remedy}"
        )
        sys.exit(1)


def _row(check, device: str) -> tuple[str, str]:
    return (
        "ok" if check.passed else "WRONG",
        f"{check.name} on {device}: error {check.error:.2e}, allowed {check.allowed:.2e}",
    )


def _gpu_rows() -> tuple[list[tuple[str, str]], str | None]:
    """What each kernel of the GPU did, and the fastest to keep to: one that is right, as are all
    slower ones, to which it leaves what it does not take.

    Each runs in a process of its own: one that breaks the device leaves the others theirs.
    """
    from cptool.exactness import selftest
    from cptool.ops.kernels import cuda_kernels

    rows: list[tuple[str, str]] = []
    best, sound = None, True
    for kernel in cuda_kernels():
        try:
            checks = selftest.run_apart("cuda", kernel)
            rows += [_row(check, "cuda") for check in checks]
            sound = sound and all(check.passed for check in checks)
        except RuntimeError as error:
            rows.append(("WRONG", f"{kernel} on cuda: {error}"))
            sound = False
        if sound:
            best = kernel
    return rows, best


def _cuda() -> str:
    from cptool.ops.kernels import build_info

    archs = build_info()["cuda_archs"]
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
