"""The processor's name, and how busy it is."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def cpu_model() -> str:
    """Return the processor's own name, with the numbers that distinguish generations."""
    fields: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines():
            name, _, value = line.partition(":")
            fields[name.strip()] = value.strip()
    except OSError:
        pass
    name = fields.get("model name") or platform.processor() or platform.machine()
    keys = ("cpu family", "model", "stepping")
    numbers = [f"{key} {fields[key]}" for key in keys if key in fields]
    return f"{name} ({', '.join(numbers)})" if numbers else name


def load_per_processor() -> float:
    """Return the load average of the last minute, over the number of processors."""
    return os.getloadavg()[0] / (os.cpu_count() or 1)
