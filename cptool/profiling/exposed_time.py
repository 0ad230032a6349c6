"""Time that transfers add to compute: how long the host, or a device's stream, stood and waited."""

from __future__ import annotations

import time

import torch


class Exposure:
    """Sums the time between `begin` and `end` around waits.

    On a CPU it is the caller's time. On CUDA a wait holds up the current stream and not the caller,
    so it is the time between two events of that stream, one before the wait and one after: from the
    end of the compute queued before to the arrival of what was waited for. Nothing is measured
    while a graph is recorded.
    """

    _PENDING = 1024

    def __init__(self) -> None:
        self._seconds = 0.0
        self._pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def begin(self, device: torch.device) -> float | torch.cuda.Event | None:
        if device.type != "cuda":
            return time.perf_counter()
        if torch.cuda.is_current_stream_capturing():
            return None
        return self._mark()

    def end(self, began: float | torch.cuda.Event | None) -> None:
        if isinstance(began, float):
            self._seconds += time.perf_counter() - began
        elif began is not None:
            self._pairs.append((began, self._mark()))
            if len(self._pairs) > self._PENDING:
                self._settle(self._PENDING // 2)  # long past, so nothing waits for them

    @property
    def seconds(self) -> float:
        """Seconds so far. On CUDA, blocks until the last of the waits is over."""
        self._settle(len(self._pairs))
        return self._seconds

    def _settle(self, count: int) -> None:
        for began, ended in self._pairs[:count]:
            ended.synchronize()
            self._seconds += 1e-3 * began.elapsed_time(ended)
        del self._pairs[:count]

    @staticmethod
    def _mark() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
