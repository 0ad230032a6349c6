"""Processes that were stopped (SIGSTOP) and so respond to no signal but SIGKILL."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

# Variables that have the same values in all ranks that a launcher started for one world.
_WORLD = (
    "MASTER_ADDR",
    "MASTER_PORT",
    "WORLD_SIZE",
    "TORCHELASTIC_RUN_ID",
    "SLURM_JOB_ID",
    "SLURM_STEP_ID",
)
_PLACE = ("RANK", "SLURM_PROCID")


def is_stopped(pid: int | None) -> bool:
    """Whether the process is stopped. False for one that has ended, or has not started (None)."""
    return pid is not None and _state_and_parent(pid)[0] == "T"


def kill_stopped_peers() -> None:
    """Kill the stopped ranks of this rank's world on this machine.

    A launcher ends the remaining ranks once one has failed, but torchrun waits 30 s before it sends
    the only signal that a stopped process responds to. Ranks of one world are recognized as
    children of one process with the same world in their environment.
    """
    own, parent = _environment(os.getpid()), os.getppid()
    if not any(name in own for name in _PLACE):
        return
    for entry in Path("/proc").glob("[0-9]*"):
        pid = int(entry.name)
        if _state_and_parent(pid) != ("T", parent):
            continue
        with contextlib.suppress(OSError):
            process = os.pidfd_open(pid)  # names this process even if its pid is reused
            try:
                peer = _environment(pid)
                same = all(own.get(name) == peer.get(name) for name in _WORLD)
                other = any(own.get(name) != peer.get(name) for name in _PLACE)
                placed = any(name in peer for name in _PLACE)
                if same and other and placed and _state_and_parent(pid) == ("T", parent):
                    signal.pidfd_send_signal(process, signal.SIGKILL)
            finally:
                os.close(process)


def _state_and_parent(pid: int) -> tuple[str, int]:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return fields[0], int(fields[1])
    except (OSError, IndexError, ValueError):
        return "", 0


def _environment(pid: int) -> dict[str, str]:
    """Return the environment a process was started with; empty for another user's process."""
    try:
        content = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
    except OSError:
        return {}
    return dict(item.split("=", 1) for item in content.split("\0") if "=" in item)
