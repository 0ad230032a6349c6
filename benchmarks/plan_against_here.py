"""The cost model against runs on this machine, calibrated in the same run.

    python benchmarks/plan_against_here.py --cp 2 --cp 4

For each world of N ranks the hardware is measured first (as `cptool bench calibrate` does, but
nothing is kept), then TTFT over a grid of contexts, miss rates and variants, on N ranks and on one
of them, all interleaved. Rates that hold for a model of one size must predict another: the shape
here is none that calibration looks at. `--merge FILE` adds an earlier run's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported

import checkout  # noqa: F401

from cptool.model.shapes import llama_config

CONTEXTS, MISS_RATES = (512, 2048, 6144), (1.0, 0.25, 0.03, 0.0025, 0.0001)
RESULTS = Path(__file__).parent / "results"
MODEL = llama_config(
    hidden=768,
    layers=3,
    heads=12,
    kv_heads=4,
    ffn=2304,
    vocab_size=1024,
    head_dim=64,
    max_position_embeddings=16384,
    tie_word_embeddings=True,
)


def main() -> None:
    from cptool.bench import prefill
    from cptool.bench.timing import circumstances
    from cptool.distributed.launch import run
    from cptool.distributed.options import RankOptions
    from cptool.variants import names

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cp", type=int, action="append")
    parser.add_argument("--context", type=int, action="append", help=f"default {CONTEXTS}")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="at least, a cell")
    parser.add_argument("--merge", type=Path, action="append", default=[])
    parser.add_argument("--output", type=Path, default=RESULTS / "plan_against_here.json")
    arguments = parser.parse_args()
    results, runs = [], []
    for path in arguments.merge:
        earlier = json.loads(path.read_text())
        results, runs = results + earlier["results"], runs + earlier["runs"]
    for ranks in arguments.cp or ([] if arguments.merge else [2, 4]):
        sweep = prefill.Sweep(
            config=MODEL,
            dtype=arguments.dtype,
            kv_dtype=arguments.dtype,
            ranks=(1, ranks) if ranks == 2 else (ranks,),
            contexts=tuple(arguments.context or CONTEXTS),
            miss_rates=MISS_RATES,
            variants=names(),
            repeats=arguments.repeats,
            seconds=arguments.seconds,
            calibrated=True,
        )
        measured = run(prefill.measure, sweep, ranks=RankOptions(cp=ranks, device="cpu"))
        runs.append({**circumstances(), "cp": ranks, "profile": measured["profile"]})
        for r in measured["results"]:
            results.append(r)
            error = r["predicted_over_measured"] - 1
            times = r["ttft_seconds"]
            print(
                f"N={r['ranks']} T={r['tokens']:5} P={r['cached']:5} {r['variant']:9} "
                f"{1e3 * times['median']:8.1f} ms ({1e3 * times['min']:.1f} to "
                f"{1e3 * times['max']:.1f}), predicted {1e3 * r['predicted_s']:8.1f}, {error:+.0%}"
            )
    summary = {}
    for name in ("all", *sorted({r["ranks"] for r in results})):
        sizes = [
            abs(r["predicted_over_measured"] - 1) for r in results if name in ("all", r["ranks"])
        ]
        key = name if name == "all" else f"N={name}"
        summary[key] = {
            "cells": len(sizes),
            "median_error": statistics.median(sizes),
            "worst_error": max(sizes),
        }
        print(f"{key}: median {summary[key]['median_error']:.1%}, worst {max(sizes):.1%}")
    found = {"errors": summary, "runs": runs, "results": results}
    arguments.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
