"""Breaks cptool on purpose and counts what happened: random kills, damaged files, many turns.

    python tests/faults/run.py --report benchmarks/results/faults-DATE.json

Exits with 1 if anything was neither sound nor refused.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import damaged
import kills
import turns
from material import make_huggingface


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run(root: Path, *, formats, files: int, kill: int, turn: int, seed: int) -> dict:
    """The counts of all three; a count of 0 leaves one out. `root` is an empty folder."""
    os.environ["CPTOOL_CACHE"] = str(root / "cache")
    found = {}
    if files:
        damaged.make(root)
        found["damaged"] = damaged.run(root, formats, files, seed, say)
    model = root / "hf" if files else make_huggingface(root / "hf")
    if turn:
        found["turns"] = turns.run(model, root / "long", turn, say)
    if kill:
        found["kills"] = kills.run(model, root / "kills", kill, seed, say)
    return found


def faults(found: dict) -> list[str]:
    """One line for each fault."""
    lines = [
        f"{name}: {fault}"
        for name, result in found.get("damaged", {}).items()
        for fault in result["faults"]
    ]
    lines += [f"kill: {failure}" for failure in found.get("kills", {}).get("failures", ())]
    if long := found.get("turns"):
        for name, most in (("processor_seconds", 2), ("kilobytes", 1.25), ("files", 3)):
            first, last = long[name]
            if last > most * first + (20 if name == "files" else 0):
                lines.append(f"turns: {name} grew from {first} to {last}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--report", type=Path, help="write the counts to this JSON file")
    parser.add_argument("--formats", nargs="+", default=list(damaged.FORMATS), metavar="NAME")
    parser.add_argument("--files", type=int, default=1000, help="damaged files of each format")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--turns", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cptool-faults-") as root:
        found = run(
            Path(root),
            formats=asked.formats,
            files=asked.files,
            kill=asked.kills,
            turn=asked.turns,
            seed=asked.seed,
        )
    found = {
        "machine": _processor(),
        "date": datetime.date.today().isoformat(),
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parent,
        ).stdout.strip(),
        "command": " ".join(["python", "tests/faults/run.py", *sys.argv[1:]]),
        **found,
    }
    text = json.dumps(found, indent=1)
    if asked.report:
        asked.report.write_text(text + "\n")
    else:
        print(text)
    for line in faults(found):
        say(line)
    return 1 if faults(found) else 0


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return f"{line.partition(': ')[2]}, {os.cpu_count()} CPUs"
    return "unknown"


if __name__ == "__main__":
    sys.exit(main())
