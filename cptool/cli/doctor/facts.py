"""What `cptool doctor` knows of the build and of the machine: fields of JSON, and a table."""

from __future__ import annotations

import datetime
import os
import platform
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cptool
from cptool import units
from cptool.checkpoint import catalogue
from cptool.cli.draw import Rows
from cptool.distributed.devices import cores
from cptool.errors import UserError
from cptool.files import cache_dir
from cptool.host import memory
from cptool.host.processor import cpu_model, load_per_processor
from cptool.planning.hardware import QUIET, Measurement
from cptool.planning.profiles import kept_measurement

OLD_DAYS = 90
"""Age from which a calibration may describe another kernel, driver or machine."""


def collect() -> dict[str, Any]:
    """Return the fields for --json."""
    load = load_per_processor()  # before torch is imported, which is itself a load
    import torch

    from cptool.ops.kernels import build_info, cpu_isa, cpu_isas, cpu_linear_isa
    from cptool.ops.linear import FEW_ROWS

    built: dict[str, Any] = build_info()
    dtypes = ("float32", "bfloat16", "float16")
    return {
        "cptool": cptool.__version__,
        "path": str(Path(cptool.__file__).parent),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "compiler": built["compiler"],
        "isas_built": list(built["isas"]),
        "isas_usable": cpu_isas(),
        "isa_limit": os.environ.get("CPTOOL_ISA") or None,
        "isa_of_attention": {name: cpu_isa(getattr(torch, name)) for name in dtypes},
        "isa_of_few_rows": {name: cpu_linear_isa(getattr(torch, name)) for name in dtypes},
        "few_rows": {
            str(dtype).removeprefix("torch."): most if most < sys.maxsize else None
            for dtype, most in FEW_ROWS.items()
        },
        "cuda_archs": list(built["cuda_archs"]),
        **_machine(load),
        "calibrations": _calibrations(),
        **_cache(),
    }


def _machine(load: float) -> dict[str, Any]:
    import torch

    from cptool.ops.kernels import cuda_kernels

    try:
        left: int | None = memory.available()
    except OSError:
        left = None
    return {
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cuda_kernels": cuda_kernels(),
        "cuda_kernels_failed": _failed_kernels(),
        "cpu": cpu_model(),
        "processors": os.cpu_count(),
        "cores": cores(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "memory_available_bytes": left,
        "load": load,
        "quiet": load <= QUIET,
    }


def _failed_kernels() -> dict[str, str]:
    """Return the kernels that failed at the first use of the GPU, and why."""
    import torch

    from cptool.ops.trials import kept

    trial = kept(0) if torch.cuda.device_count() else None
    faults = trial.faults.items() if trial else ()
    return {kernel: fault for kernel, fault in faults if fault is not None}


def _calibrations() -> list[dict[str, Any]]:
    kept = {device: kept_measurement(device) for device in ("cpu", "cuda")}
    return [
        {"device": device, **asdict(measured), "stale": _stale(measured, device)}
        for device, measured in kept.items()
        if measured is not None
    ]


def _stale(measured: Measurement, device: str) -> str | None:
    """Return why figures should be measured again; None if they should not."""
    import torch

    name = cpu_model() if device == "cpu" else None
    if device == "cuda" and torch.cuda.device_count():
        name = torch.cuda.get_device_name()
    if measured.machine and name and measured.machine != name:
        return f"measured on {measured.machine}"
    age = (datetime.date.today() - datetime.date.fromisoformat(measured.date)).days
    if age > OLD_DAYS:
        return f"{age} days old"
    if measured.noise > QUIET:
        return "rough: the machine was busy"
    return None


def _cache() -> dict[str, Any]:
    try:
        folder: Path | None = cache_dir()
    except UserError:  # a user without a home has no cache
        return {"cache": None, "models": []}
    return {
        "cache": str(folder),
        "models": [name for name in catalogue.MODELS if catalogue.is_here(name)],
    }


def rows(facts: dict[str, Any]) -> Rows:
    """Return the table of what `collect` found."""
    archs = facts["cuda_archs"]
    cuda = f"CUDA for sm_{', sm_'.join(archs)}" if archs else "no CUDA"
    unusable = [isa for isa in facts["isas_built"] if isa not in facts["isas_usable"]]
    usable = ", ".join(facts["isas_usable"])
    if unusable:
        usable += f" (also built, but not for this processor: {', '.join(unusable)})"
    if facts["isa_limit"]:
        usable += f"; CPTOOL_ISA={facts['isa_limit']} allows none beyond it"
    return [
        ("cptool", f"{facts['cptool']} in {facts['path']}"),
        (
            "python",
            f"{facts['python']}, torch {facts['torch']} with "
            f"{units.some(facts['torch_threads'], 'thread')}",
        ),
        ("build", f"{facts['compiler']}, {cuda}"),
        ("kernels", usable),
        ("in use", _in_use(facts)),
        ("few rows", _few_rows(facts)),
        ("machine", f"{facts['cpu']}"),
        ("", _processors(facts)),
        ("GPUs", ", ".join(facts["gpus"]) or "none"),
        *(
            ("not used", f"{kernel} failed at the first use of the GPU: {fault}")
            for kernel, fault in facts["cuda_kernels_failed"].items()
        ),
        ("load", _load(facts)),
        *_calibration_rows(facts["calibrations"]),
        *_cache_rows(facts),
    ]


def _in_use(facts: dict[str, Any]) -> str:
    said = ", ".join(f"{dtype}: {isa}" for dtype, isa in facts["isa_of_attention"].items())
    kernels = facts["cuda_kernels"]
    return f"{said}; GPU: {', '.join(kernels)}" if kernels else said


def _few_rows(facts: dict[str, Any]) -> str:
    limits = facts["few_rows"]
    return ", ".join(
        f"{dtype}: {isa}" + (f" up to {limits[dtype]}" if limits.get(dtype) else "")
        for dtype, isa in facts["isa_of_few_rows"].items()
    )


def _processors(facts: dict[str, Any]) -> str:
    left = facts["memory_available_bytes"]
    usable = "" if left is None else f", of which {units.size(left)} can be used"
    return (
        f"{units.some(facts['processors'], 'processor')} ({facts['cores']} to be used), "
        f"{units.size(facts['memory_bytes'])} of memory{usable}"
    )


def _load(facts: dict[str, Any]) -> str:
    verdict = "quiet" if facts["quiet"] else "busy: figures measured now would be rough"
    return f"{units.three(facts['load'])} per processor; {verdict}"


def _calibration_rows(calibrations: list[dict[str, Any]]) -> Rows:
    if not calibrations:
        return [
            (
                "calibrated",
                "not yet: predictions go by defaults; measure with: cptool bench calibrate",
            )
        ]
    rows = []
    for each in calibrations:
        dtypes = f" in {', '.join(each['dtypes'])}" if each["dtypes"] else ""
        stale = f"; {each['stale']}, measure again" if each["stale"] else ""
        rows.append(("calibrated", f"{each['date']} on {each['device']}{dtypes}{stale}"))
    return rows


def _cache_rows(facts: dict[str, Any]) -> Rows:
    if facts["cache"] is None:
        return [("cache", "none: this user has no home; set CPTOOL_CACHE")]
    pulled = ", ".join(facts["models"]) or "no model pulled yet"
    return [("cache", f"{facts['cache']}: {pulled}")]
