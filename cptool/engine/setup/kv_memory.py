"""Where the memory of keys and values comes from."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from cptool.cache import Allocate, MemorySlab, Slab
from cptool.host.file_memory import FileMemory


def memory_of_kv(resident: int | None) -> Allocate:
    """Return what makes the memory of KV: a file for what does not fit into `resident` bytes."""
    if resident is None:
        return MemorySlab

    def allocate(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Slab:
        if math.prod(shape) * dtype.itemsize <= resident:
            return MemorySlab(shape, dtype, device)
        return FileMemory(shape, dtype, resident=resident)

    return allocate
