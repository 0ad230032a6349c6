"""Gathering a value of every rank by plain tensors, because torch's object collectives pickle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cptool.distributed.encoding import decode, encode

if TYPE_CHECKING:
    import torch.distributed as dist

# Most values are a few numbers: their length and they themselves travel together.
_FRAME, _LENGTH_BYTES = 512, 8


def gather_values(
    value: Any, types: Sequence[type] = (), group: dist.ProcessGroup | None = None
) -> list[Any]:
    """Return the `value` of every rank of the group, in rank order. Collective.

    value: any that `cptool.distributed.encoding` takes, with dataclasses of `types`. Tensors arrive
    on the CPU.
    """
    data = encode(value, types)
    first = data[: _FRAME - _LENGTH_BYTES]
    header = len(data).to_bytes(_LENGTH_BYTES, "little") + first
    frames = _all_gather(header, _FRAME, group)
    sizes = [int.from_bytes(frame[:_LENGTH_BYTES], "little") for frame in frames]
    parts = [
        frame[_LENGTH_BYTES : _LENGTH_BYTES + size]
        for frame, size in zip(frames, sizes, strict=True)
    ]
    longest = max(sizes) - (_FRAME - _LENGTH_BYTES)
    if longest > 0:
        rests = _all_gather(data[len(first) :], longest, group)
        parts = [
            part + rest[: max(0, size - len(part))]
            for part, rest, size in zip(parts, rests, sizes, strict=True)
        ]
    return [decode(part, types) for part in parts]


def _all_gather(data: bytes, size: int, group: dist.ProcessGroup | None) -> list[bytes]:
    """Return the `data` of every rank, padded to `size` bytes."""
    import torch
    import torch.distributed as dist

    own = torch.frombuffer(bytearray(data.ljust(size, b"\0")), dtype=torch.uint8)
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, own, group=group)
    return [part.numpy().tobytes() for part in parts]
