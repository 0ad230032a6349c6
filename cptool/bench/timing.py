"""What all measurements share: interleaved timing, and the circumstances that a result states."""

from __future__ import annotations

import datetime
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

import cptool
from cptool.host.processor import cpu_model


def clock_name() -> str:
    """Return the name of the clock of `stopwatch`, which depends on torch's number of threads."""
    return "wall time" if torch.get_num_threads() > 1 else "CPU time of the thread"


def stopwatch(run: Callable[[], object], device: str = "cpu", *, wall: bool = False) -> float:
    """Return the seconds that a call takes, on CUDA until the device is done.

    With one thread it is that thread's CPU time, unless `wall` time is requested: on an idle
    machine they are equal, and on a busy one CPU time leaves out what other processes take.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        torch.cuda.synchronize()
        return time.perf_counter() - begin
    wall = wall or torch.get_num_threads() > 1
    clock = time.perf_counter if wall else time.thread_time
    begin = clock()
    run()
    return clock() - begin


def calls_per_sample(call: Callable[[], object], device: str) -> int:
    """Return how often to repeat a short call so that a sample takes 20 ms, at most 1000 times."""
    return max(1, min(1000, round(0.02 / max(1e-6, stopwatch(call, device)))))


def mean_of_calls(call: Callable[[], object], *, calls: int, device: str) -> float:
    """Return the seconds per call over `calls` calls in a row."""
    return stopwatch(lambda: [call() for _ in range(calls)], device) / calls


def summary(samples: list[float]) -> dict[str, float]:
    """Return the median and the range."""
    return {"median": statistics.median(samples), "min": min(samples), "max": max(samples)}


def interleave(
    measures: Mapping[str, Callable[[], float]], repeats: int
) -> dict[str, dict[str, float]]:
    """Return the `summary` of each measure over `repeats` rounds, after one that warms up.

    Each round calls every measure once, so that drift of the machine affects all alike.
    """
    samples: dict[str, list[float]] = {name: [] for name in measures}
    for _ in range(repeats + 1):
        for name, measure in measures.items():
            samples[name].append(measure())
    return {name: summary(values[1:]) for name, values in samples.items()}


def _commit() -> str | None:
    """Return the commit of the checkout that this file is in; None for an installed package."""
    here = Path(__file__)

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)
        return git("describe", "--always", "--dirty")
    except (OSError, subprocess.CalledProcessError):
        return None


def _command() -> str:
    program = Path(sys.argv[0])
    if program.name in ("cptool", "__main__.py"):
        return shlex.join(["cptool", *sys.argv[1:]])
    return shlex.join(["python", f"benchmarks/{program.name}", *sys.argv[1:]])


def circumstances(kernels: bool = True) -> dict[str, object]:
    """Return machine, date, commit, command and versions, which head every file of results.

    kernels: whether to add what the compiled extension reports; without, it need not be built.
    """
    isas, compiler = {}, {}
    if kernels:
        from cptool.ops.kernels import build_info, cpu_isas

        isas, compiler = {"isas": cpu_isas()}, {"compiler": build_info()["compiler"]}
    return {
        "cptool": cptool.__version__,
        "machine": {
            "cpu": cpu_model(),
            "cores": os.cpu_count(),
            **isas,
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "load_average": os.getloadavg()[0],
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "command": _command(),
        "torch": torch.__version__,
        **compiler,
    }
