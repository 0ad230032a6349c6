"""What a command takes: the peak of its resident memory over all of its processes, pages that they
share counted once, and the figures that it reports.

    python benchmarks/resident.py --json results.json -- \\
        cptool generate model.gguf --synthetic 4096 -n 8 --cp 2 --json

Memory is read from the kernel's proportional set sizes (PSS), 20 times a second.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from pathlib import Path

import checkout  # noqa: F401

from cptool.bench.timing import circumstances

FIELDS = ("Pss_Anon", "Pss_File", "Pss_Shmem")


def tree(root: int) -> list[int]:
    """Return a process and all that descend from it."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            parents.setdefault(parent, []).append(int(entry.name))
    found = [root]
    for process in found:
        found += parents.get(process, [])
    return found


def resident(processes: list[int]) -> dict[str, int]:
    """Return their bytes of each of `FIELDS`."""
    total = dict.fromkeys(FIELDS, 0)
    for process in processes:
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        for line in lines:
            name, _, value = line.partition(":")
            if name in total:
                total[name] += int(value.split()[0]) << 10
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="file for the results")
    parser.add_argument("command", nargs="+", help="after --, with its own --json")
    options = parser.parse_args()
    begin = time.perf_counter()
    process = subprocess.Popen(options.command, stdout=subprocess.PIPE, text=True)
    peak: dict[str, int] = {}
    while process.poll() is None:
        now = resident(tree(process.pid))
        if sum(now.values()) > sum(peak.values()):
            peak = now
        time.sleep(0.05)
    seconds = time.perf_counter() - begin
    output = process.stdout.read()
    if process.returncode:
        raise SystemExit(f"the command failed: {output}")
    reported = json.loads(output)
    print(f"{seconds:.1f} s in all, peak {sum(peak.values()) / 1e9:.2f} GB:")
    for name, size in peak.items():
        print(f"  {name:10} {size / 1e9:.2f} GB")
    if options.json:
        result = {**circumstances(), "measured": options.command, "seconds": seconds}
        result |= {"peak_bytes": peak, "reported": reported}
        Path(options.json).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
