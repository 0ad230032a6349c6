"""The memory that a prefill is planned to take, against what its ranks took.

    python benchmarks/memory_plan.py [--tokens 16K] [--output FILE]

Runs `cptool prefill` with a random-weight Llama of 8 layers: one piece and chunks, every variant on
two ranks, in each type of products and KV. Both figures are those of the command's own report:
bytes of the fullest rank, of which the weights that ranks share count in part.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import checkout  # noqa: F401
import random_llama

from cptool.bench.timing import circumstances
from cptool.units import size

OUTPUT = Path(__file__).parent / "results" / "memory_plan.json"


def cases(tokens: int) -> list[list[str]]:
    """The options of every run, beside the model and the prompt."""
    float32, narrow = ["--dtype", "float32"], ["--dtype", "float32", "--kv-dtype", "bfloat16"]
    bfloat16, chunk = ["--dtype", "bfloat16"], ["--chunk", str(tokens // 4)]
    one = [["--cp", "1", *types, "--chunk", str(tokens)] for types in (float32, narrow, bfloat16)]
    one.append(["--cp", "1", *float32, *chunk])
    two = [
        ["--cp", "2", *types, *chunk, "--variant", variant]
        for types in (float32, bfloat16)
        for variant in ("pass-kv", "gather-kv", "pass-q", "gather-q")
    ]
    return [*one, *two, ["--cp", "2", *bfloat16], ["--cp", "1", "--tp", "2", *bfloat16, *chunk]]


def run(model: Path, tokens: int, options: list[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "cptool", "prefill", str(model), "--synthetic", str(tokens)]
    done = subprocess.run([*command, *options, "--json"], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    said = json.loads(done.stdout)
    planned, peak = said["memory_bytes_per_rank"], said["peak_memory_bytes_per_rank"]
    return {
        "options": " ".join(options),
        "chunk": said["chunk"],
        "planned_bytes": planned,
        "planned_parts_bytes": said["memory_parts_bytes"],
        "peak_bytes": peak,
        "planned_over_peak": round(planned / peak, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        random_llama.write(model)
        for options in cases(arguments.tokens):
            found = run(model, arguments.tokens, options)
            results.append(found)
            print(
                f"{found['options']:62} planned {size(found['planned_bytes']):>8} "
                f"peak {size(found['peak_bytes']):>8} {found['planned_over_peak']:.2f}",
                flush=True,
            )
    errors = [abs(found["planned_over_peak"] - 1) for found in results]
    summary = {"median": statistics.median(errors), "worst": max(errors)}
    print(f"off by a median of {summary['median']:.1%}, {summary['worst']:.1%} at worst")
    document = {**circumstances(kernels=False), "tokens": arguments.tokens, "errors": summary}
    arguments.output.write_text(json.dumps({**document, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
