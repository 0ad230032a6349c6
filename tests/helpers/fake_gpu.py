"""A machine with GPUs, as far as a command can tell before it uses one."""

import re
from dataclasses import dataclass, field
from typing import Any

import torch

from cptool.distributed import devices, launch
from cptool.distributed.options import RankOptions
from cptool.errors import RunError
from cptool.exactness import verify
from cptool.ops import kernels, trials

STARTED = "the ranks were started"

# What torch says of the first use of a device that is not there, in its builds without CUDA and
# with it.
FIRST_USE = re.compile("Torch not compiled with CUDA enabled|Found no NVIDIA driver")


@dataclass
class Launch:
    """What a command wanted to run on its ranks."""

    args: tuple[Any, ...]
    ranks: RankOptions


@dataclass
class FakeGpus:
    """The launches that were requested so far; none was carried out."""

    launches: list[Launch] = field(default_factory=list)


def pretend(monkeypatch, count: int = 2) -> None:
    """Have cptool and torch report `count` GPUs, and a build with kernels for them."""
    built = kernels.build_info() | {"cuda_archs": ["90"]}
    monkeypatch.setattr(kernels, "build_info", lambda: built)
    monkeypatch.setattr(kernels, "cuda_kernels", lambda: ["simt", "sm80", "sm90"])
    monkeypatch.setattr(devices, "_gpus", lambda: count)
    monkeypatch.setattr(trials, "settle", lambda index: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=0: f"Fake GPU {index}")


def stop_at_launch(monkeypatch) -> FakeGpus:
    """Record launches instead of starting ranks, and end the command with the error STARTED."""
    fake = FakeGpus()

    def run(entry, *args, ranks, **options):
        fake.launches.append(Launch(args, ranks))
        raise RunError(STARTED)

    monkeypatch.setattr(launch, "run", run)
    monkeypatch.setattr(verify, "run", run)  # it imports the function
    return fake
