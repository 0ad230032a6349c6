"""Where the time of a run went: a table of phases per rank, and a trace that Perfetto opens.

The phases of a rank add up to its wall time; `hidden` lies beside them: transfers that ran while
the rank computed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cptool.profiling.intervals import length_s, subtract
from cptool.profiling.trace import PHASES, Kernel, Recorder, Span, TransferSpan

if TYPE_CHECKING:
    from cptool.distributed.world import World
    from cptool.profiling.trace import Kernel

HOST = "host"
ROWS = (*PHASES, HOST)
"""Rows of a rank on a CPU; a CUDA rank has `device_trace.DEVICE_ROWS`, with idle for host."""


@dataclass(frozen=True)
class Section:
    """A part of a run on one rank: `steps` tokens, or 1 for a prefill."""

    name: str
    begin: float
    end: float
    steps: int


@dataclass(frozen=True, kw_only=True)
class Phases:
    """Seconds per step of `name` by phase, one value per rank, and those of hidden transfers."""

    name: str
    steps: int
    wall_s: tuple[float, ...]
    phases: dict[str, tuple[float, ...]]
    hidden_s: tuple[float, ...]

    def fields(self) -> dict[str, object]:
        return {
            "steps": self.steps,
            "wall_s": list(self.wall_s),
            "phases_s": {name: list(values) for name, values in self.phases.items()},
            "hidden_s": list(self.hidden_s),
        }


def phases_of(recorder: Recorder, section: Section) -> tuple[float, dict[str, float], float]:
    """Return wall time, phases and hidden transfers of one rank, in seconds per step.

    On a CPU `host` is what no span covers: Python between the operations, and waiting for other
    processes of the machine. On CUDA the phases are those of the device's kernels.
    """
    spans, transfers = recorder.between(section.begin, section.end)
    wall, steps = section.end - section.begin, section.steps
    if recorder.kernels is not None:
        from cptool.profiling.device_trace import device_phases

        sampling = [(s.begin, s.end) for s in spans if s.phase == "sampling"]
        phases, hidden = device_phases(recorder.kernels, sampling, section.begin, section.end)
        return wall / steps, {name: s / steps for name, s in phases.items()}, hidden / steps
    phases = dict.fromkeys(ROWS, 0.0)
    for span in spans:
        phases[span.phase] += span.own_s
    phases[HOST] = wall - sum(phases.values())
    moving = [(t.begin, t.end) for t in transfers]
    waiting = [(s.begin, s.end) for s in spans if s.phase == "exposed"]
    hidden = length_s(subtract(moving, waiting))
    return wall / steps, {name: s / steps for name, s in phases.items()}, hidden / steps


def collect(
    world: World, recorder: Recorder, sections: Sequence[Section], path: Path
) -> tuple[Phases, ...]:
    """Return the table of each section over all ranks; rank 0 writes the trace of all of them to
    `path`.

    Collective. Clocks of different hosts are brought together at a barrier, to within its skew.
    """
    from cptool.profiling.trace import Kernel

    world.barrier()
    now = time.perf_counter()
    mine = (
        [phases_of(recorder, section) for section in sections],
        recorder.spans,
        recorder.transfers,
        recorder.kernels or [],
        now,
        world.local_size,
    )
    ranks = world.gather(mine, Span, TransferSpan, Kernel)
    if world.rank == 0:
        one_host = ranks[0][-1] == world.size
        shifts = [0.0 if one_host else ranks[0][4] - rank[4] for rank in ranks]
        write_trace(path, [rank[1:4] for rank in ranks], shifts)
    tables = []
    for index, section in enumerate(sections):
        walls, phases, hidden = zip(*(rank[0][index] for rank in ranks), strict=True)
        by_phase = {name: tuple(of[name] for of in phases) for name in phases[0]}
        table = Phases(
            name=section.name,
            steps=section.steps,
            wall_s=walls,
            phases=by_phase,
            hidden_s=hidden,
        )
        tables.append(table)
    return tuple(tables)


def write_trace(
    path: Path,
    ranks: Sequence[tuple[Sequence[Span], Sequence[TransferSpan], Sequence[Kernel]]],
    shifts: Sequence[float],
) -> None:
    """Write a Chrome trace: a process per rank, with a track for its thread, a track per stream of
    its device, and as many tracks for sends and receives as run at the same time. An event's
    arguments state its layer.
    """
    events: list[dict[str, object]] = []

    def name(kind: str, rank: int, track: int, value: str) -> None:
        events.append({"ph": "M", "name": kind, "pid": rank, "tid": track, "args": {"name": value}})

    def event(
        what: Span | Kernel | TransferSpan,
        name: str,
        kind: str,
        *,
        rank: int,
        track: int,
        **facts: object,
    ) -> None:
        if what.layer is not None:
            facts = {"layer": what.layer, **facts}
        events.append(
            {
                "ph": "X",
                "name": name,
                "cat": kind,
                "pid": rank,
                "tid": track,
                "ts": round(1e6 * (what.begin + shifts[rank] - origin), 3),
                "dur": round(1e6 * (what.end - what.begin), 3),
                **({"args": facts} if facts else {}),
            }
        )

    starts = [
        s.begin + shift for (spans, *_), shift in zip(ranks, shifts, strict=True) for s in spans
    ]
    origin = min(starts, default=0.0)
    for rank, (spans, transfers, kernels) in enumerate(ranks):
        name("process_name", rank, 0, f"rank {rank}")
        name("thread_name", rank, 0, "host" if kernels else "compute")
        for span in spans:
            event(span, span.name, span.phase, rank=rank, track=0)
        for stream in sorted({kernel.stream for kernel in kernels}):
            name("thread_name", rank, 1000 + stream, f"device, stream {stream}")
        for kernel in kernels:
            event(kernel, kernel.name, "kernel", rank=rank, track=1000 + kernel.stream)
        lanes: list[tuple[str, float]] = []
        for move in sorted(transfers, key=lambda move: move.begin):
            kind = move.name
            free = (i for i, (of, end) in enumerate(lanes) if of == kind and end <= move.begin)
            lane = next(free, len(lanes))
            if lane == len(lanes):
                lanes.append((kind, 0.0))
                name("thread_name", rank, 1 + lane, kind)
            lanes[lane] = (kind, move.end)
            event(
                move,
                f"{kind}, rank {move.peer}",
                "transfer",
                rank=rank,
                track=1 + lane,
                bytes=move.bytes,
            )
    path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}) + "\n")
