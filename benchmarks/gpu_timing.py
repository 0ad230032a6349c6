"""What the GPU benchmarks share: timers that leave out the host, and the ceilings of the device.

`--device cpu` runs the same code on the CPU, so that a script is known to work before it meets a
GPU: clocks take the place of events, plain calls that of graphs and streams.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import checkout  # noqa: F401
import torch

from cptool.bench.timing import circumstances, summary
from cptool.engine.graphs import Recorded
from cptool.ops.kernels import cuda_kernels


def cuda(device: torch.device) -> bool:
    return device.type == "cuda"


def timed(run: Callable[[], object], device: torch.device, calls: int = 1) -> float:
    """Seconds of one of `calls` calls in a row, on the device."""
    if not cuda(device):
        began = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - began) / calls
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    for _ in range(calls):
        run()
    ended.record()
    ended.synchronize()
    return 1e-3 * began.elapsed_time(ended) / calls


class Candidate:
    """A call that is timed among others; one that fails says why and is left out."""

    def __init__(
        self, run: Callable[[], object], device: torch.device, window_s: float, per_run: int = 1
    ) -> None:
        """window_s: at least as long is one sample. per_run: equal pieces of work in one call."""
        self.run, self.device, self.per_run = run, device, per_run
        self.samples: list[float] = []
        self.failure: str | None = None
        try:
            for _ in range(2):
                once = timed(run, device)
        except (RuntimeError, ValueError, NotImplementedError, TypeError) as error:
            self.failure = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
            return
        self.calls = max(1, min(1000, round(window_s / max(once, 1e-7))))

    def sample(self) -> None:
        if self.failure is None:
            self.samples.append(timed(self.run, self.device, self.calls) / self.per_run)

    @property
    def seconds(self) -> dict[str, float] | None:
        return summary(self.samples) if self.samples else None


def interleave(candidates: dict[str, Candidate], rounds: int) -> None:
    """Samples every candidate in turn, `rounds` times: a drift of the clocks meets all alike."""
    for _ in range(rounds):
        for candidate in candidates.values():
            candidate.sample()


def product(device: torch.device, dtype: torch.dtype) -> tuple[Callable[[], object], float]:
    """A large matrix product of random values, and its operations: the ceiling of arithmetic."""
    size = 8192 if cuda(device) else 256
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return (lambda: a @ b), 2.0 * size**3


def copy(device: torch.device) -> tuple[Callable[[], object], float]:
    """A large copy, and the bytes it reads and writes: the ceiling of memory."""
    count = 2**31 if cuda(device) else 2**24
    source = torch.empty(count // 2, dtype=torch.int16, device=device).random_()
    target = torch.empty_like(source)
    return (lambda: target.copy_(source)), 2.0 * source.nbytes


def graph(run: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """`run` as one CUDA graph; on a CPU, `run`. RuntimeError where it cannot be recorded."""
    recorded = Recorded(run, device)
    if cuda(device) and recorded.reason:
        raise RuntimeError(recorded.reason)
    return recorded


def kernels(device: torch.device) -> list[str]:
    """Our attention kernels that can be told apart on this device, slowest first."""
    return cuda_kernels() if cuda(device) else []


def driver() -> str | None:
    """The version of NVIDIA's driver."""
    try:
        for line in Path("/proc/driver/nvidia/version").read_text().splitlines():
            words = line.split()
            found = [word for word in words if word[:1].isdigit() and word.count(".") >= 1]
            if line.startswith("NVRM") and found:
                return found[0]
    except OSError:
        pass
    return None


def head(device: torch.device) -> dict[str, object]:
    """Where and when a result was measured."""
    facts = circumstances()
    facts["commit"] = facts["commit"] or os.environ.get("CPTOOL_COMMIT")
    facts["device"] = device.type
    if cuda(device):
        properties = torch.cuda.get_device_properties(device)
        facts["gpu"] = {
            "name": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "driver": driver(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return facts


def parser(description: str) -> argparse.ArgumentParser:
    """Options of every GPU benchmark. argparse, for a machine that has torch and little else."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    options.add_argument("--rounds", type=int, default=0, help="default: 7, on a CPU 1")
    options.add_argument("--json", type=Path, help="write the results to this file")
    return options


def arguments(options: argparse.ArgumentParser) -> argparse.Namespace:
    given = options.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        options.error("no CUDA device here; --device cpu runs the same code on small sizes")
    given.device = torch.device(given.device, 0 if given.device == "cuda" else None)
    if given.device.type == "cpu":
        given.device = torch.device("cpu")
    given.rounds = given.rounds or (7 if cuda(given.device) else 1)
    return given


def write(given: argparse.Namespace, results: object) -> None:
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(
            json.dumps({**head(given.device), "results": results}, indent=1) + "\n"
        )
        print(f"written: {given.json}")
