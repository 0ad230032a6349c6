"""Memory in a file, of which a limited part stays resident: for KV that is larger than memory.

The layers of a model are visited in order, forward after forward. Some of them stay resident; the
others are streamed: while one is visited the next is read ahead, and the one before is written back
and released. A forward whose computation takes longer than that reading and writing then takes as
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

from cptool.errors import RunError
from cptool.host import memory
from cptool.units import size

_WRITE_BACK = 1 | 2 | 4  # SYNC_FILE_RANGE: wait for what is under way, write the rest, wait for it
_READ_BYTES = 128 << 10  # Linux reads ahead no more than this for one request, by default
_GROWTH = 2  # a layer's place in the file is as many times as large as it is at first


class FileMemory:
    """A tensor whose first dimension is visited in order, in a file without a name in the temporary
    directory. Processes that are forked share it.

    tensor: uninitialised, of `shape` and `dtype`; each layer is contiguous.
    streamed: how many of its last layers do not stay resident.
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, *, resident: int) -> None:
        """resident: the bytes that may stay resident, but two layers always do: one is computed
        with while the next is read.

        Raises RunError if the temporary directory has no room.
        """
        self._layers, slots, *self._shape = shape
        self._dtype, self._limit = dtype, resident
        self._slot = math.prod(self._shape) * dtype.itemsize
        self._room = _GROWTH * slots
        self._stride = _whole_pages(self._room * self._slot)
        self._slots, self._visited = 0, dict[int, int]()
        self._lock = threading.Lock()
        self._file = _unnamed(Path(tempfile.gettempdir()))
        try:
            os.ftruncate(self._file, self._layers * self._stride)
            self._allocate(slots)
            self._memory = mmap.mmap(self._file, self._layers * self._stride)
        except OSError as error:
            os.close(self._file)
            raise _no_room(self._layers * slots * self._slot, error) from None
        self._set(slots)
        self._reader, self._writer = _Worker(self._file, "read"), _Worker(self._file, "write")
        self._released: Future[None] | None = None
        weakref.finalize(self, _end, self._file, (self._reader, self._writer))
        memory.own_mappings.add(self)

    @property
    def resident(self) -> int:
        """Bytes that stay resident, those of the layers that are streamed just now included."""
        kept = self._layers - self.streamed
        return min(self._layers, kept + 2) * self._slots * self._slot

    def grow(self, slots: int) -> bool:
        """Make `tensor` have room for so many slots, if the file has it, and keep what it holds."""
        if slots > self._room:
            return False
        try:
            self._allocate(slots)
        except OSError as error:
            raise _no_room(self._layers * (slots - self._slots) * self._slot, error) from None
        self._set(slots)
        return True

    def visit(self, layer: int, slots: int) -> None:
        """Prepare for reading and writing the first `slots` slots of `layer`, and then of the next.

        Raises RunError if a layer could not be written back.
        """
        thread = threading.get_ident()
        with self._lock:  # a session is saved by a thread of its own
            before = self._visited.get(thread, -1)
            if layer == before or not slots:
                return
            self._visited[thread] = layer
            first = self._layers - self.streamed
            following = layer + 1 if layer + 1 < self._layers else first
            if first <= following != layer:
                self._reader.submit(_read_ahead, following * self._stride, slots * self._slot)
            if first <= before != following and before not in self._visited.values():
                self._release(before, slots)

    def _release(self, layer: int, slots: int) -> None:
        # At most one is written back at a time, so that a slow disk takes time, not memory.
        try:
            if self._released is not None:
                self._released.result()
        except OSError as error:
            raise RunError(f"the file of KV: {error.strerror}; use another disk") from None
        start, length = layer * self._stride, slots * self._slot
        # The page cache alone then has what was written, and can release it.
        self._memory.madvise(mmap.MADV_DONTNEED, start, _whole_pages(length))
        self._released = self._writer.submit(_write_back, start, length)

    def _allocate(self, slots: int) -> None:
        """Have the file system set aside what `slots` slots take beyond those of now."""
        more = (slots - self._slots) * self._slot
        for layer in range(self._layers if more > 0 else 0):
            os.posix_fallocate(self._file, layer * self._stride + self._slots * self._slot, more)

    def _set(self, slots: int) -> None:
        self._slots = slots
        layer = slots * self._slot
        self.streamed = self._layers
        if layer:
            self.streamed -= max(0, min(self._layers, self._limit // layer - 2))
        whole = torch.frombuffer(self._memory, dtype=torch.uint8).view(self._layers, self._stride)
        self.tensor = whole[:, :layer].view(self._dtype).unflatten(1, (slots, *self._shape))


class _Worker:
    """A thread that works on a file of its own, a copy of the descriptor `file`."""

    def __init__(self, file: int, name: str) -> None:
        self.file = os.dup(file)
        self._threads = ThreadPoolExecutor(1, thread_name_prefix=f"cptool-kv-{name}")

    def submit(
        self, work: Callable[[int, int, int], None], start: int, length: int
    ) -> Future[None]:
        """Call work(file, start, length) after what was submitted before."""
        return self._threads.submit(work, self.file, start, length)

    def end(self) -> None:
        """Have the file closed after what is submitted, without waiting for that."""
        try:
            self._threads.submit(os.close, self.file)
        except RuntimeError:  # the interpreter is ending, and with it the file
            return
        self._threads.shutdown(wait=False)


def _whole_pages(length: int) -> int:
    return -(-length // mmap.PAGESIZE) * mmap.PAGESIZE


def _unnamed(folder: Path) -> int:
    """Return the descriptor of a new file that ends with its last use."""
    try:
        try:
            return os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o600)
        except OSError:  # not every file system has files without names
            file, name = tempfile.mkstemp(dir=folder)
            os.unlink(name)
            return file
    except OSError as error:
        raise _no_room(0, error) from None


def _no_room(length: int, error: OSError) -> RunError:
    folder, wanted = tempfile.gettempdir(), f"{size(length)} for KV: " if length else ""
    return RunError(
        f"{folder}: {wanted}{error.strerror}; set TMPDIR to a directory on another disk, or use "
        "more ranks"
    )


def _read_ahead(file: int, start: int, length: int) -> None:
    for at in range(start, start + length, _READ_BYTES):
        count = min(_READ_BYTES, start + length - at)
        os.posix_fadvise(file, at, count, os.POSIX_FADV_WILLNEED)


def _write_back(file: int, start: int, length: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    arguments = ctypes.c_int64(start), ctypes.c_int64(length), ctypes.c_uint(_WRITE_BACK)
    if libc.sync_file_range(file, *arguments) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    os.posix_fadvise(file, start, length, os.POSIX_FADV_DONTNEED)


def _end(file: int, workers: tuple[_Worker, ...]) -> None:
    for worker in workers:
        worker.end()
    os.close(file)
