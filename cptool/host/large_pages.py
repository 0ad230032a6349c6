"""Host memory in large pages, for what is read from front to back again and again.

Linux gives a process small pages (4 KB) unless it asks, and reading across them costs a walk of the
page table each, dearer in a virtual machine, and stops the processor's own prefetching at every
edge. In pages of 2 MB a core was measured to read a tenth faster, and a decode step's attention a
sixth.
"""

import math
import mmap
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch

from cptool.host import memory as host_memory

_PAGE_BYTES = 2 << 20
_WORTHWHILE_BYTES = 2 * _PAGE_BYTES
_SYSTEM = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def empty(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """`torch.empty`; on a CPU, and from 4 MB on, in large pages where the system has them.

    Pages come into being when they are written first, each filled up to 2 MB at most. Raises
    MemoryError where there is no room.
    """
    count = math.prod(shape)
    size = count * dtype.itemsize
    if torch.device(device).type != "cpu" or size < _WORTHWHILE_BYTES or not there_are():
        return torch.empty(shape, dtype=dtype, device=device)
    # Memory of one's own: what processes share gets large pages only where an administrator says.
    # Whole pages, for the system aligns no other sizes.
    whole = -(-size // _PAGE_BYTES) * _PAGE_BYTES
    try:
        memory = mmap.mmap(-1, whole, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"{size:,} bytes cannot be allocated: {error.strerror}") from None
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype, count=count).view(tuple(shape))


@lru_cache(maxsize=1)
def there_are() -> bool:
    """Whether the system gives large pages to who asks."""
    try:
        return hasattr(mmap, "MADV_HUGEPAGE") and "[never]" not in _SYSTEM.read_text()
    except OSError:
        return False


def worth_copying(size: int) -> bool:
    """Whether `size` bytes that lie in small pages should be copied into large ones: there are
    some, and these are at most half of what the process can still have.
    """
    try:
        return there_are() and 2 * size <= host_memory.available()
    except OSError:
        return False
