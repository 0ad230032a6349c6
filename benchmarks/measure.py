"""What every benchmark shares: interleaved timing, and the facts without which a number is none."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from cptool import ops


def clock_name() -> str:
    """Which time `stopwatch` and the ceilings take, as torch's number of threads says."""
    return "wall time" if torch.get_num_threads() > 1 else "CPU time of the thread"


def stopwatch(run: Callable[[], object]) -> float:
    """Seconds that a call takes.

    On one thread, of that thread's CPU time: on an idle machine it is the time on the wall, and on
    a busy one it leaves out the turns of other processes.
    """
    clock = time.perf_counter if torch.get_num_threads() > 1 else time.thread_time
    begin = clock()
    run()
    return clock() - begin


def summary(samples: list[float]) -> dict[str, float]:
    """Median with its spread."""
    return {"median": statistics.median(samples), "min": min(samples), "max": max(samples)}


def interleave(
    measures: dict[str, Callable[[], float | None]], repeats: int
) -> dict[str, dict[str, float] | None]:
    """Calls every measure in turn, `repeats` times round, so that a drift of the machine meets all.

    One more round before is not counted. A measure that gives None has no summary.
    """
    samples: dict[str, list[float | None]] = {name: [] for name in measures}
    for _ in range(repeats + 1):
        for name, measure in measures.items():
            samples[name].append(measure())
    return {
        name: None if None in values else summary(values[1:]) for name, values in samples.items()
    }


def _cpu_model() -> str:
    """The name that the processor gives itself, with the numbers that tell generations apart."""
    fields: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines():
            name, _, value = line.partition(":")
            fields[name.strip()] = value.strip()
    except OSError:
        pass
    name = fields.get("model name") or platform.processor() or platform.machine()
    keys = ("cpu family", "model", "stepping")
    numbers = [f"{key} {fields[key]}" for key in keys if key in fields]
    return f"{name} ({', '.join(numbers)})" if numbers else name


def _commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty"]
    try:
        return subprocess.run(
            command, cwd=Path(__file__).parent, check=True, capture_output=True, text=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def circumstances() -> dict[str, object]:
    """Machine, date, commit, command and versions: the head of every file of results."""
    return {
        "machine": {
            "cpu": _cpu_model(),
            "cores": os.cpu_count(),
            "isas": ops.cpu_isas(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "load_average": os.getloadavg()[0],
        },
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "torch": torch.__version__,
        "compiler": ops.build_info()["compiler"],
    }
