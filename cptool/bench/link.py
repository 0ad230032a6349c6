"""The links between the ranks as they were launched, by the transfers that attention makes.

Sizes are bytes from one rank to one other rank. Times are those of the slowest rank; rates are
bytes per second that leave each rank while all ranks send. On CPUs the ceiling is a plain TCP
stream between the same neighbours over the same interface. Another measurement runs compute beside
a transfer: what compute loses to it is the part of the transfer's time that cannot be hidden.
"""

from __future__ import annotations

import fcntl
import os
import socket
import statistics
import struct
import threading
import time
from collections.abc import Callable, Sequence

import torch

from cptool.bench.timing import summary
from cptool.distributed.world import World
from cptool.parallel.ring import Ring
from cptool.parallel.transport import ring_of

PATTERNS = ("send-receive", "all-gather", "all-to-all")
_SAMPLE_S = 0.02


def measure(
    world: World, sizes: list[int], patterns: list[str], repeats: int, overlap: bool
) -> list[dict[str, object]]:
    """Return one result per size and pattern, the patterns of a size interleaved. Collective."""
    ring = ring_of(world.cp_group)
    results = []
    stream = _Stream(world) if world.device.type == "cpu" else None
    try:
        for done, size in enumerate(sizes):
            world.report("measure messages, size", done, len(sizes))
            results += _of_size(
                world,
                ring,
                stream=stream,
                size=size,
                patterns=patterns,
                repeats=repeats,
                overlap=overlap,
            )
    finally:
        if stream is not None:
            stream.close()
    return world.gather(results)[0]


def _of_size(
    world: World,
    ring: Ring,
    *,
    stream: _Stream | None,
    size: int,
    patterns: Sequence[str],
    repeats: int,
    overlap: bool,
) -> list[dict[str, object]]:
    calls_of = _transfers(ring, size, world.device)
    works = {name: calls_of[name] for name in patterns}
    if stream is not None:
        works["tcp"] = lambda: stream.exchange(size)
    counts = {name: _calls(world, work) for name, work in works.items()}
    samples: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats + 1):
        for name, work in works.items():
            samples[name].append(_seconds(world, work, counts[name]))
    measured = {name: summary(times[1:]) for name, times in samples.items()}
    tcp = measured.get("tcp")
    results = []
    for name in patterns:
        sent = size if name == "send-receive" else size * (ring.size - 1)
        rate = sent / measured[name]["median"]
        results.append(
            {
                "pattern": name,
                "size": size,
                "sent_bytes": sent,
                "seconds": measured[name],
                "rate": rate,
                "tcp_seconds": tcp,
                "of_ceiling": rate * tcp["median"] / size if tcp else None,
            }
        )
        if name == "send-receive" and overlap:
            results[-1].update(
                _overlap(
                    world,
                    ring,
                    size=size,
                    transfer_s=measured[name]["median"],
                    repeats=max(3, repeats),
                )
            )
    return results


def _transfers(ring: Ring, size: int, device: torch.device) -> dict[str, Callable[[], object]]:
    ahead, behind = (ring.rank - 1) % ring.size, (ring.rank + 1) % ring.size
    mine = torch.zeros(size, dtype=torch.uint8, device=device)
    theirs = [torch.empty_like(mine) for _ in range(ring.size)]
    sizes = [size] * ring.size
    return {
        "send-receive": lambda: ring.wait(ring.send_receive(ahead, mine, behind, theirs[behind])),
        "all-gather": lambda: ring.gather(mine, sizes, into=theirs),
        "all-to-all": lambda: ring.exchange([mine] * ring.size, sizes),
    }


def _seconds(world: World, work: Callable[[], object], calls: int) -> float:
    """Return the seconds per call of `calls` calls in a row, on the slowest rank."""
    world.barrier()
    began = time.perf_counter()
    for _ in range(calls):
        work()
    if world.device.type == "cuda":
        torch.cuda.synchronize()
    return max(world.gather((time.perf_counter() - began) / calls))


def _calls(world: World, work: Callable[[], object]) -> int:
    """Return how many calls fill a sample, the same on every rank."""
    return max(1, min(200, round(_SAMPLE_S / _seconds(world, work, 3))))


def _overlap(
    world: World, ring: Ring, size: int, transfer_s: float, repeats: int
) -> dict[str, object]:
    """Time compute that takes twice as long as the transfer, alone and beside it, interleaved."""
    ahead, behind = (ring.rank - 1) % ring.size, (ring.rank + 1) % ring.size
    mine = torch.zeros(size, dtype=torch.uint8, device=world.device)
    theirs = torch.empty_like(mine)
    # Small products, so that compute and transfer compete for the cores and not for memory.
    x = torch.randn(256, 256, device=world.device)
    unit = _seconds(world, lambda: torch.mm(x, x), 20)
    count = max(1, round(2 * transfer_s / unit))

    def compute() -> None:
        for _ in range(count):
            torch.mm(x, x)

    def both() -> None:
        pending = ring.send_receive(ahead, mine, behind, theirs)
        compute()
        ring.wait(pending)

    calls = max(1, min(50, round(_SAMPLE_S / (2 * transfer_s))))
    alone, beside = [], []
    for _ in range(repeats + 1):
        alone.append(_seconds(world, compute, calls))
        beside.append(_seconds(world, both, calls))
    alone, beside = alone[1:], beside[1:]
    lost = statistics.median(beside) - statistics.median(alone)
    return {
        "compute_seconds": summary(alone),
        "compute_beside_transfer_seconds": summary(beside),
        "steals": max(0.0, lost / transfer_s),
    }


class _Stream:
    """A TCP connection to each ring neighbour, over the interface that gloo uses."""

    def __init__(self, world: World) -> None:
        listener = socket.socket()
        listener.bind((_own_address(), 0))
        listener.listen(1)
        addresses = world.gather(listener.getsockname())
        self._ahead = socket.create_connection(addresses[(world.rank - 1) % world.size], timeout=60)
        self._behind, _ = listener.accept()
        listener.close()
        for connection in (self._ahead, self._behind):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.settimeout(60)
        self._buffer = bytearray(0)

    def exchange(self, size: int) -> None:
        """Send `size` bytes to the predecessor while as many come from the successor."""
        if len(self._buffer) != size:
            self._buffer, self._received = bytearray(size), bytearray(size)
        sender = threading.Thread(target=self._ahead.sendall, args=(self._buffer,))
        sender.start()
        view, got = memoryview(self._received), 0
        while got < size:
            count = self._behind.recv_into(view[got:])
            if not count:
                raise RuntimeError("a neighbour closed its TCP connection")
            got += count
        sender.join()

    def close(self) -> None:
        """Close both connections."""
        self._ahead.close()
        self._behind.close()


def _own_address() -> str:
    """Return the address of the interface that gloo is configured to use; by default, of the one
    that leads to the rendezvous.
    """
    name = os.environ.get("GLOO_SOCKET_IFNAME")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        if name:
            request = struct.pack("256s", name.partition(",")[0].encode()[:15])
            siocgifaddr = 0x8915
            return socket.inet_ntoa(fcntl.ioctl(probe.fileno(), siocgifaddr, request)[20:24])
        probe.connect((os.environ.get("MASTER_ADDR", "127.0.0.1"), 1))
        return probe.getsockname()[0]
