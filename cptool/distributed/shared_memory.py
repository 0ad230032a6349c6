"""Memory that the ranks of one machine share, so that N ranks hold one copy of the weights."""

import math
import os
import uuid
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import torch

if TYPE_CHECKING:
    from cptool.distributed.world import World

_ALIGNMENT = 64  # a cache line, and the widest vector load

Key = TypeVar("Key", bound=Hashable)


@contextmanager
def shared_tensors(
    world: "World",
    shapes: Mapping[Key, tuple[int, ...]],
    dtype: torch.dtype,
    key_types: Sequence[type] = (),
) -> Iterator[tuple[dict[Key, torch.Tensor], list[Key]]]:
    """Map one tensor for every key that any rank of this machine requests. Collective.

    shapes: the shape of each tensor that this rank requests, by key.
    key_types: the dataclasses that keys are made of.

    Yields the tensors by key, and the keys that this rank must fill: each key falls to one rank of
    the machine, balanced by size. A `with` block that ends normally blocks until all ranks of
    `world` reach its end, so that afterwards every tensor is filled.

    The memory is a file without a name (memfd_create): it needs no room in /dev/shm or on a disk,
    and vanishes with the last process that maps it, however that ends.
    """
    name = f"cptool-{uuid.uuid4().hex}"
    fd = os.memfd_create(name)
    try:
        # Each rank offers a file and takes the first it finds: that of its machine's first rank.
        offers = world.gather((f"/proc/{os.getpid()}/fd/{fd}", name))
        path, name = next(offer for offer in offers if is_here(*offer))
        everyone = world.gather((name, dict(shapes)), *key_types)
        peers = [rank for rank, (file, _) in enumerate(everyone) if file == name]
        union = {key: shape for rank in peers for key, shape in everyone[rank][1].items()}
        tensors = _map(path, union, dtype)
        yield tensors, _deal(union, len(peers))[peers.index(world.rank)]
        world.barrier()
    finally:
        os.close(fd)


def is_here(path: str, name: str) -> bool:
    """Whether the file is on this machine, that is, in its /proc."""
    try:
        return os.readlink(path).startswith(f"/memfd:{name}")
    except OSError:
        return False


def _map(
    path: str, shapes: Mapping[Key, tuple[int, ...]], dtype: torch.dtype
) -> dict[Key, torch.Tensor]:
    offsets, end = {}, 0
    for key, shape in shapes.items():
        offsets[key] = end // dtype.itemsize
        end += -(-math.prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
    # Grows the file to `end` bytes if no other rank has; pages are allocated when written.
    storage = torch.UntypedStorage.from_file(path, shared=True, nbytes=max(end, _ALIGNMENT))
    assert isinstance(storage, torch.UntypedStorage)  # the method's annotation is wider
    flat = torch.empty(0, dtype=dtype).set_(storage)
    return {
        key: flat[offset : offset + math.prod(shapes[key])].view(shapes[key])
        for key, offset in offsets.items()
    }


def _deal(shapes: Mapping[Key, tuple[int, ...]], ranks: int) -> list[list[Key]]:
    """Return the keys of each rank: dealt largest first, each to the rank with the least so far."""
    shares: list[list[Key]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for key in sorted(shapes, key=lambda key: math.prod(shapes[key]), reverse=True):
        least = loads.index(min(loads))
        shares[least].append(key)
        loads[least] += math.prod(shapes[key])
    return shares
