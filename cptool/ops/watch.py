"""Watching attention on the CPU from outside, and stopping it, while a call computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from cptool.ops.kernels import EXTENSION as _C


@contextmanager
def watched_attention(pairs: int, cancelled: int = 0) -> Iterator[None]:
    """Have the CPU attention calls of this thread report what they have done, in the context.

    pairs: address of an int64 that grows by the number of visible pairs (query, key) computed, one
        for each query head, several times a second within a call.
    cancelled: address of an int64, or 0. Once it is not zero, calls return early, and their results
        are undefined.

    Another process may read the one and set the other. The memory must outlive the context.
    """
    _C.watch_attention_cpu(pairs, cancelled)
    try:
        yield
    finally:
        _C.watch_attention_cpu(0, 0)
