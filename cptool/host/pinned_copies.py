"""Copies between a GPU and pageable host memory through pinned memory.

A copy from or to pageable memory blocks the caller and reaches a fraction of the bus's bandwidth.
Here the bus transfers one tensor while the host copies, reads or writes another. torch reuses
pinned memory once the copies on a stream are done with it, so only a few tensors' worth exists at a
time.
"""

from collections.abc import Iterable, Iterator

import torch


def to_host(tensors: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Yield each tensor in pageable memory, in order; tensors already there are not copied."""
    waiting: tuple[torch.Tensor, torch.cuda.Event] | None = None
    for tensor in tensors:
        if not tensor.is_cuda:
            yield tensor
            continue
        copied = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        copied.copy_(tensor, non_blocking=True)
        done = torch.cuda.Event()
        done.record()
        if waiting is not None:  # copied while this one crosses the bus
            yield _pageable(*waiting)
        waiting = copied, done
    if waiting is not None:
        yield _pageable(*waiting)


def _pageable(copied: torch.Tensor, done: torch.cuda.Event) -> torch.Tensor:
    done.synchronize()
    return copied.clone()


def to_device(tensors: Iterable[torch.Tensor], device: torch.device) -> Iterator[torch.Tensor]:
    """Yield each tensor on `device`, in order; the next is fetched while one crosses the bus."""
    for tensor in tensors:
        if device.type == "cuda" and not tensor.is_cuda:
            tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)
        yield tensor.to(device, non_blocking=True)
