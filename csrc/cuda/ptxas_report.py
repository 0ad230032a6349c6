"""Run a CUDA compilation and keep what ptxas reports about each kernel: registers and spills.

    python ptxas_report.py nvcc -Xptxas -v ... -o OBJECT

CMake puts it before nvcc. Writes OBJECT.ptxas, one JSON object per kernel and architecture, prints
one line per file and passes on everything else that the compiler prints. Standard library only.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

_NOISE = re.compile(r"ptxas info|\s*\d+ bytes stack frame")


def kernels(log: str) -> list[dict]:
    """Return what `ptxas -v` reports about each kernel, in order."""
    found: list[dict] = []
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '(.+)' for '(.+)'", line):
            found.append({"kernel": match[1], "arch": match[2]})
        elif match := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            if found and "spill_stores" not in found[-1]:
                found[-1] |= {"spill_stores": int(match[1]), "spill_loads": int(match[2])}
        elif match := re.search(r"Used (\d+) registers", line):
            if found:
                found[-1]["registers"] = int(match[1])
    return found


def main(command: list[str]) -> int:
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    for line in done.stderr.splitlines():
        if not _NOISE.match(line):
            print(line, file=sys.stderr)
    found = kernels(done.stderr)
    if done.returncode == 0 and found:
        target = Path(command[command.index("-o") + 1])
        Path(f"{target}.ptxas").write_text("".join(json.dumps(kernel) + "\n" for kernel in found))
        spilled = sum(kernel.get("spill_stores", 0) > 0 for kernel in found)
        print(
            f"{target.stem}: {len(found)} kernels, at most "
            f"{max(kernel.get('registers', 0) for kernel in found)} registers, "
            f"{spilled or 'no'} spills"
        )
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
