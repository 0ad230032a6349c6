"""Measuring the link between ranks, and what compute loses to its transfers."""

from __future__ import annotations

from itertools import cycle

import torch

from cptool.calibration.clock import Clock, slope
from cptool.calibration.examples import COLD_BYTES
from cptool.distributed.world import World
from cptool.parallel.ring import Ring
from cptool.parallel.transport import ring_of
from cptool.planning.hardware import Link

SMALL_MESSAGE, LARGE_MESSAGE = 1 << 10, 4 << 20


def link_rates(clock: Clock, part: World | None) -> tuple[Link, float]:
    """Return the link, and the part of a transfer's time that compute loses to it, 0 to 1."""
    device, ring = clock.device, ring_of(part.cp_group) if part else Ring()
    ahead, behind = (ring.rank - 1) % ring.size, (ring.rank + 1) % ring.size

    def buffer(size: int) -> torch.Tensor:
        return torch.zeros(size, dtype=torch.uint8, device=device)

    def transfer(outgoing: torch.Tensor, incoming: torch.Tensor, messages: int = 1) -> None:
        pending = []
        for _ in range(messages):
            pending += ring.send_receive(ahead, outgoing, behind, incoming)
        ring.wait(pending)

    small, arriving = (buffer(SMALL_MESSAGE), buffer(SMALL_MESSAGE)), buffer(LARGE_MESSAGE)
    # What is sent is KV of a layer, which no cache holds when its turn comes.
    cold = cycle([buffer(LARGE_MESSAGE) for _ in range(COLD_BYTES // LARGE_MESSAGE)])
    latency = clock(lambda: transfer(*small), calls=32)
    several = clock(lambda: transfer(*small, messages=5), calls=8)
    whole = clock(lambda: transfer(next(cold), arriving), calls=4)

    # Compute that takes about twice as long as the transfer, alone and beside it.
    x = torch.randn(1024, 1024, device=device)
    unit = clock(lambda: torch.mm(x, x))
    count = max(1, round(2 * whole / unit))

    def compute() -> None:
        for _ in range(count):
            torch.mm(x, x)

    def both() -> None:
        pending = ring.send_receive(ahead, next(cold), behind, arriving)
        compute()
        ring.wait(pending)

    times = clock.all({"alone": compute, "together": both})
    bandwidth = slope((SMALL_MESSAGE, latency), (LARGE_MESSAGE, whole))
    further = max(0.0, several - latency) / 4
    link = Link(
        bandwidth=bandwidth,
        fan_out=bandwidth,
        latency_s=latency,
        message_overhead_s=further,
        collective_latency_s=latency + (ring.size - 2) * further,
    )
    return link, min(1.0, max(0.0, (times["together"] - times["alone"]) / whole))
