"""`cptool doctor`: what was built, what the machine offers, and whether the kernels are right on
it.
"""

import os
import platform
import sys
from pathlib import Path

import click

from cptool.cli import draw


@click.command()
def doctor() -> None:
    """Show the build and the machine, and test both ops against float64 on this machine.

    Exits with 1 if a kernel is wrong here.
    """
    import torch

    import cptool
    from cptool import ops, selftest

    draw.table(
        [
            ("cptool", f"{cptool.__version__} in {Path(cptool.__file__).parent}"),
            (
                "kernels",
                f"{', '.join(ops.build_info()['isas'])}; {_cuda()}; built with "
                f"{ops.build_info()['compiler']}",
            ),
            (
                "in use",
                ", ".join(
                    f"{name}: {ops.cpu_isa(getattr(torch, name))}"
                    for name in ("float32", "bfloat16", "float16")
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
    failed = 0
    rows = []
    on_gpu = torch.cuda.is_available() and ops.build_info()["cuda_archs"]
    for device in ["cpu", "cuda"] if on_gpu else ["cpu"]:
        for check in selftest.run(device):
            failed += not check.passed
            verdict = "ok" if check.passed else "WRONG"
            rows.append(
                (
                    verdict,
                    f"{check.name} on {device}: error {check.error:.2e}, allowed "
                    f"{check.allowed:.2e}",
                )
            )
    draw.table(rows)
    if failed:
        draw.say(
            f"cptool doctor: {failed} of {len(rows)} checks failed; results on this machine are "
            "not to be trusted"
        )
        sys.exit(1)


def _cuda() -> str:
    from cptool import ops

    archs = ops.build_info()["cuda_archs"]
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
