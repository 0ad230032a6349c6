"""The device's side of a profile: kernels as torch.profiler recorded them, by phase, and idle time.

On CUDA the host only launches: a span of its thread gives the time of the launch, and the kernel
itself gives the duration. The device is idle while no kernel runs, mostly because the host is late;
small decode steps consist mostly of such idle time.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch

from cptool.profiling.intervals import Interval, length_s, overlap_s, subtract, union
from cptool.profiling.trace import PHASES, Kernel

if TYPE_CHECKING:
    from torch.autograd.profiler_util import FunctionEvent

IDLE = "idle"
DEVICE_ROWS = (*PHASES, IDLE)
TRANSFER = "transfer"

_WORDS = {
    TRANSFER: ("nccl",),
    "attention": ("attention", "merge", "flash"),
    "linear": ("gemm", "gemv", "cutlass", "cublas", "nvjet", "xmma", "splitk"),
}


def phase_of(name: str) -> str:
    """Return the phase of a kernel, or TRANSFER, from its name: ours, NCCL's or a matrix
    library's.
    """
    lowered = name.lower()
    for phase, words in _WORDS.items():
        if any(word in lowered for word in words):
            return phase
    return "small ops"


def device_phases(
    kernels: Sequence[Kernel], sampling: Sequence[Interval], begin: float, end: float
) -> tuple[dict[str, float], float]:
    """Return seconds of each of DEVICE_ROWS in [begin, end), which add up to it, and seconds of
    hidden transfers.

    Where kernels of several phases run at once the moment counts as compute, and a transfer beside
    compute as hidden. Small kernels that start while the host samples are sampling.
    """
    of: dict[str, list[Interval]] = {phase: [] for phase in (*PHASES, TRANSFER)}
    for kernel in kernels:
        phase = phase_of(kernel.name)
        if phase == "small ops" and any(a <= kernel.begin < b for a, b in sampling):
            phase = "sampling"
        clipped = max(kernel.begin, begin), min(kernel.end, end)
        if clipped[0] < clipped[1]:
            of[phase].append(clipped)
    left: list[Interval] = [(begin, end)]
    phases = {}
    for phase in ("linear", "attention", "sampling", "small ops"):
        phases[phase] = overlap_s(left, of[phase])
        left = subtract(left, of[phase])
    phases["exposed"] = overlap_s(left, of[TRANSFER])
    hidden = length_s(union(of[TRANSFER])) - phases["exposed"]
    left = subtract(left, of[TRANSFER])
    phases[IDLE] = length_s(left)
    return {row: phases[row] for row in DEVICE_ROWS}, hidden


def launch_times(events: Iterable[FunctionEvent]) -> dict[int, float]:
    """Return when the host launched each kernel, in seconds since the beginning of the trace, by
    the id that CUDA gave the call and the kernel alike.
    """
    return {
        event.id: 1e-6 * event.time_range.start
        for event in events
        if event.device_type == torch.autograd.DeviceType.CPU
        and event.name.startswith(("cuda", "cuLaunch", "cuMem"))
    }


class DeviceProfiler:
    """Collects kernels between `start` and `stop`, of `activity`: CUDA, or the CPU's operators."""

    def __init__(self, activity: str = "CUDA") -> None:
        self._type = getattr(torch.autograd.DeviceType, activity)
        activities = [getattr(torch.profiler.ProfilerActivity, activity)]
        self._profiler = torch.profiler.profile(activities=activities)

    def start(self) -> None:
        self._profiler.start()

    def stop(self) -> list[Kernel]:
        """Block until the device is done and return the kernels in order of their start."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._profiler.stop()
        # Events count from the beginning of the trace, which is given in time since the epoch.
        recorded = self._profiler.profiler
        assert recorded is not None and recorded.kineto_results is not None
        began = 1e-9 * recorded.kineto_results.trace_start_ns()
        shift = began - (time.time() - time.perf_counter())
        events = self._profiler.events()
        launches = launch_times(events)
        kernels = [
            Kernel(
                name=event.name,
                stream=event.thread,
                begin=shift + 1e-6 * event.time_range.start,
                end=shift + 1e-6 * event.time_range.end,
                launched=shift + launches[event.id] if event.id in launches else None,
            )
            for event in events
            if event.device_type == self._type and not event.is_user_annotation
        ]
        return sorted(kernels, key=lambda kernel: kernel.begin)
