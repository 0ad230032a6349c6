"""Memory in a file, of which a limited part stays resident: for KV that is larger than memory.

The layers of a model are visited in order, forward after forward. Some of them stay resident; the
others come by: while one is visited the next is read ahead, and the one before is written back and
given up. A forward whose computation takes longer than reading what does not stay then takes as
long as with all in memory. A chunk of C tokens computes 2 C Hq/Hkv operations per element of KV
that it reads, so a prefill does; a decode step does not.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import tempfile
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from cptool.errors import OptionError, RunError
from cptool.units import size

_WRITE_BACK = 1 | 2 | 4  # SYNC_FILE_RANGE: wait for what is under way, write the rest, wait for it


class FileMemory:
    """A tensor whose first dimension is visited in order, in a file without a name in the temporary
    directory.

    tensor: uninitialised, of `shape` and `dtype`; each layer is contiguous.
    streamed: how many of its last layers do not stay resident.
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, *, resident: int) -> None:
        """Raise OptionError if `resident` bytes do not hold two layers, and RunError if the
        temporary directory cannot hold the file or is itself in memory.
        """
        self._layers, slots = shape[0], shape[1]
        self._slot = math.prod(shape[2:]) * dtype.itemsize
        layer = slots * self._slot
        if resident < 2 * layer:
            raise OptionError(
                "kv_memory",
                size(resident),
                f"two layers of KV take {size(2 * layer)} per rank",
                "give more, or use more ranks",
            )
        # One layer is computed with while the next is read.
        self.streamed = self._layers - max(0, min(self._layers, resident // layer - 2))
        self._stride = -(-layer // mmap.PAGESIZE) * mmap.PAGESIZE
        self._file = _unnamed(Path(tempfile.gettempdir()), self._layers * self._stride)
        self._memory = mmap.mmap(self._file, self._layers * self._stride)
        bytes_ = torch.frombuffer(self._memory, dtype=torch.uint8).view(self._layers, self._stride)
        self.tensor = bytes_[:, :layer].view(dtype).unflatten(1, tuple(shape[1:]))
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="cptool-kv")
        self._pending: list[Future[None]] = []
        self._lock = threading.Lock()
        self._visited = -1
        self._end = weakref.finalize(self, _end, self._worker, self._file)

    def visit(self, layer: int, slots: int) -> None:
        """Prepare for reading and writing the first `slots` slots of `layer`, and then of the next.

        Raises RunError if a layer that came by could not be written back.
        """
        with self._lock:  # a session is saved by a thread of its own
            if layer == self._visited:
                return
            before, self._visited = self._visited, layer
            first = self._layers - self.streamed
            following = layer + 1 if layer + 1 < self._layers else first
            if first <= following != layer:
                self._do(_fetch, following, slots)
            if first <= before != following:
                # Then the page cache alone has what was written, from where it can be given up.
                length = -(-slots * self._slot // mmap.PAGESIZE) * mmap.PAGESIZE
                self._memory.madvise(mmap.MADV_DONTNEED, before * self._stride, length)
                self._do(_give_up, before, slots)

    def _do(self, work: Callable[[int, int, int], None], layer: int, slots: int) -> None:
        done = [future for future in self._pending if future.done()]
        self._pending = [future for future in self._pending if future not in done]
        try:
            for future in done:
                future.result()
        except OSError as error:
            raise RunError(f"the file of KV: {error.strerror}; use another disk") from None
        start, length = layer * self._stride, slots * self._slot
        self._pending.append(self._worker.submit(work, self._file, start, length))


def in_memory(folder: Path) -> bool:
    """Return whether files in `folder` are in memory themselves."""
    try:
        mounts = [line.split()[1:3] for line in Path("/proc/self/mounts").read_text().splitlines()]
    except OSError:
        return False
    above = [(len(at), kind) for at, kind in mounts if folder.resolve().is_relative_to(at)]
    return max(above, default=(0, ""))[1] in ("tmpfs", "ramfs")


def _unnamed(folder: Path, length: int) -> int:
    """Return the descriptor of a new file of `length` bytes that ends with its last use."""
    if in_memory(folder):
        raise RunError(f"{folder} is in memory itself; set TMPDIR to a directory on a disk")
    try:
        try:
            file = os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o600)
        except OSError:  # not every file system has files without names
            file, name = tempfile.mkstemp(dir=folder)
            os.unlink(name)
        try:
            os.posix_fallocate(file, 0, length)
        except OSError:
            os.close(file)
            raise
    except OSError as error:
        raise RunError(
            f"{folder}: {size(length)} for KV: {error.strerror}; set TMPDIR to a directory on "
            "another disk, or use more ranks"
        ) from None
    return file


def _fetch(file: int, start: int, length: int) -> None:
    os.posix_fadvise(file, start, length, os.POSIX_FADV_WILLNEED)


def _give_up(file: int, start: int, length: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    arguments = ctypes.c_int64(start), ctypes.c_int64(length), ctypes.c_uint(_WRITE_BACK)
    if libc.sync_file_range(file, *arguments) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    os.posix_fadvise(file, start, length, os.POSIX_FADV_DONTNEED)


def _end(worker: ThreadPoolExecutor, file: int) -> None:
    worker.shutdown(wait=True, cancel_futures=True)
    os.close(file)
