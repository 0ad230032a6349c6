"""Context parallelism on one CPU machine: 1 rank of N threads against N ranks of one thread each,
launched in turn on the same random bfloat16 weights, with messages from memory to memory and by
gloo.

    python benchmarks/cp_scaling.py --tokens 8192,32768 --repeats 2 --json results.json

Both arrangements do the same work on the same cores, so the ratio of their times to the first token
is what splitting by context costs.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import checkout  # noqa: F401
import torch
from random_llama import SHAPE, write

from cptool.bench.timing import circumstances, summary
from cptool.checkpoint import open_checkpoint
from cptool.distributed.devices import cores
from cptool.distributed.launch import run
from cptool.distributed.options import RankOptions
from cptool.engine.answers.decode import decode, next_tokens
from cptool.engine.answers.records import AnswerOptions
from cptool.engine.engine import Engine
from cptool.engine.options import EngineOptions
from cptool.engine.sampling import Sampling
from cptool.engine.weights import load_model


def prefill(world, path: str, tokens: list[int], variant: str) -> dict[str, float]:
    """On wall time: seconds to the first token of a whole prompt, after a short one to warm up."""
    model = load_model(open_checkpoint(path), torch.bfloat16, world.device, world)
    for prompt in (tokens[:512], tokens):
        engine = Engine(model, world, options=EngineOptions(variant=variant))
        world.barrier()
        begin = time.perf_counter()
        engine.extend([prompt], reserve=17)
        next_tokens(engine, Sampling())
        first = time.perf_counter()
        decode(engine, AnswerOptions(limit=16))
        last = time.perf_counter()
    return {
        "ttft_s": first - begin,
        "ttit_s": (last - first) / 15,
        "exposed_s": engine.ring.exposed_s,
        "sent_bytes": engine.ring.sent_bytes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", default="8192")
    parser.add_argument("--ranks", type=int, default=cores())
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--variant", default="auto")
    parser.add_argument("--gloo", action="store_true", help="measure messages by gloo too")
    parser.add_argument("--model", help="a directory that an earlier run has written")
    parser.add_argument("--json", help="file for the results")
    options = parser.parse_args()
    arrangements = {
        "threads": {"cp": 1, "threads": options.ranks},
        "ranks": {"cp": options.ranks, "threads": 1},
    }
    if options.gloo:
        arrangements["ranks, gloo"] = arrangements["ranks"]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(options.model or folder)
        if not (path / "config.json").exists():
            write(path, layers=options.layers)
        for length in map(int, options.tokens.split(",")):
            tokens = torch.randint(
                100, SHAPE["vocab_size"], (length,), generator=torch.manual_seed(1)
            ).tolist()
            samples: dict[str, list[dict]] = {name: [] for name in arrangements}
            for _ in range(options.repeats):
                for name, how in arrangements.items():
                    os.environ["CPTOOL_TRANSPORT"] = "direct" if "gloo" in name else "auto"
                    samples[name].append(
                        run(
                            prefill,
                            str(path),
                            tokens,
                            options.variant,
                            ranks=RankOptions(device="cpu", **how),
                        )
                    )
            row = {"tokens": length, "arrangements": {}}
            for name, times in samples.items():
                row["arrangements"][name] = {
                    key: summary([sample[key] for sample in times]) for key in times[0]
                }
            rows.append(row)
            base = row["arrangements"]["threads"]
            for name, times in row["arrangements"].items():
                first, further = times["ttft_s"]["median"], times["ttit_s"]["median"]
                print(
                    f"{length:6} {name:12} first {first:8.3f} s, "
                    f"{first / base['ttft_s']['median']:.3f} times that of threads; further "
                    f"{1e3 * further:.2f} ms; exposed {times['exposed_s']['median']:.3f} s",
                    flush=True,
                )
    model = {**SHAPE, "num_hidden_layers": options.layers}
    result = {**circumstances(), "model": model, "ranks": options.ranks, "rows": rows}
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
