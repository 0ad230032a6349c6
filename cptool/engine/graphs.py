"""CUDA graphs: a call with static inputs and outputs recorded once, and replayed by one launch."""

from __future__ import annotations

from collections.abc import Callable

import torch


class Recorded:
    """`run`, whose kernels read and write the same memory at every call.

    Calling it replays the graph and returns what `run` returned when it was recorded: the same
    tensors with new values. On a CPU, or if recording fails, it calls `run` itself; `reason` holds
    the cause.

    run: must not block and not depend on values on the host. It is called twice before recording,
        for libraries that initialize at first use, so two additional calls must do no harm.
    """

    def __init__(self, run: Callable[[], torch.Tensor], device: torch.device) -> None:
        self._run, self._graph, self._result = run, None, None
        self.reason: str | None = None
        if device.type != "cuda":
            self.reason = f"{device.type} has no graphs"
            return
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(2):
                run()
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            # Thread-local, because NCCL's watchdog queries events in a thread of its own.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._result = run()
        except RuntimeError as error:
            self.reason = f"recording failed: {' '.join(str(error).split())[:200]}"
            return
        self._graph = graph

    def __call__(self) -> torch.Tensor:
        if self._graph is None or self._result is None:
            return self._run()
        self._graph.replay()
        return self._result
