"""What each choice of types costs on one CPU thread: time to the first token and per further token
with each --dtype, with KV in 16 bits and with quantised weights, and whether `--dtype auto` is as
fast as the best --dtype.

    python benchmarks/dtype_choice.py --tokens 512 --repeats 5 --json results.json

The model has random bfloat16 weights. float16 is shown and not compared: bfloat16 weights do not
fit in it without loss. The engines take turns within each round; times are of the processor.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import checkout  # noqa: F401
import torch
from cpu_model import clock
from random_llama import SHAPE, write

from cptool.bench.timing import circumstances, summary
from cptool.checkpoint import open_checkpoint
from cptool.distributed.launch import run
from cptool.distributed.options import RankOptions
from cptool.engine.answers.decode import decode, next_tokens
from cptool.engine.answers.records import AnswerOptions
from cptool.engine.engine import Engine
from cptool.engine.options import EngineOptions
from cptool.engine.sampling import Sampling
from cptool.engine.setup.types import resolve_types
from cptool.engine.weights import load_model

CHOICES = {
    "auto": ("auto", EngineOptions()),
    "float32": ("float32", EngineOptions()),
    "bfloat16": ("bfloat16", EngineOptions()),
    "float16": ("float16", EngineOptions()),
    "float32, KV bfloat16": ("float32", EngineOptions(kv_dtype="bfloat16")),
    "float32, weights q8_0": ("float32", EngineOptions(weights="q8_0")),
}
COMPARED = ("float32", "bfloat16")


def compare(world, path: str, options: argparse.Namespace) -> dict[str, object]:
    """The seconds of every choice, in rounds."""
    checkpoint, engines, types = open_checkpoint(path), {}, {}
    for name, (asked, wanted) in CHOICES.items():
        dtype, found = resolve_types(asked, wanted, checkpoint, "cpu")
        model = load_model(checkpoint, getattr(torch, dtype), "cpu", world, weights=found.weights)
        types[name], engines[name] = dtype, (model, found)
    tokens = [100 + 7 * i % 30_000 for i in range(options.tokens)]
    first: dict[str, list[float]] = {name: [] for name in engines}
    further: dict[str, list[float]] = {name: [] for name in engines}
    for repeat in range(options.repeats + 1):
        for name, (model, found) in engines.items():
            engine = Engine(model, world, options=found)
            began = clock()
            engine.extend([tokens if repeat else tokens[:64]], reserve=options.decode + 1)
            next_tokens(engine, Sampling())
            read = clock()
            decode(engine, AnswerOptions(limit=options.decode + 1))
            if repeat:  # the round before warms up
                first[name].append(read - began)
                further[name].append((clock() - read) / options.decode)
    rows = {
        name: {
            "dtype": types[name],
            "ttft_s": summary(first[name]),
            "ttit_s": summary(further[name]),
        }
        for name in engines
    }
    return {"rows": rows, "auto_over_best": {key: _auto_over_best(rows, key) for key in TIMES}}


TIMES = ("ttft_s", "ttit_s")


def _auto_over_best(rows: dict[str, dict], time: str) -> float:
    best = min(rows[name][time]["median"] for name in COMPARED)
    return rows["auto"][time]["median"] / best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--decode", type=int, default=16, help="further tokens timed")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--json", help="file for the results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), options.layers)
        found = run(compare, folder, options, ranks=RankOptions(device="cpu", threads=1))
    for name, row in found["rows"].items():
        first, further = (row[time]["median"] for time in TIMES)
        print(f"{name:22} first token {first:7.3f} s, further {1e3 * further:7.2f} ms")
    for time, ratio in found["auto_over_best"].items():
        print(f"auto over the best of {', '.join(COMPARED)}: {time} {ratio:.3f}")
    shape = {**SHAPE, "num_hidden_layers": options.layers}
    result = {**circumstances(), "clock": "CPU time of the process", "model": shape, **found}
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
