"""Time per token of a model whose layers have a sliding window, against the same model without one:
flat from twice the window on, in reading a prompt and in answering.

    python benchmarks/windows.py --window 4096 --tokens 65536 --json results.json

A model of random weights reads a prompt in chunks. At the end of a chunk that ends at 1K, 2K, 4K
and so on, the time of that chunk per token is taken, and that of the steps of an answer there.
Times are those of the processor on one thread, so that other programs count little. The cost model
predicts both, by the profile that `auto` goes by.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import checkout  # noqa: F401
import torch

from cptool.bench.timing import circumstances, summary
from cptool.distributed.launch import run
from cptool.distributed.options import RankOptions
from cptool.engine.engine import Engine
from cptool.model.config import LlamaConfig
from cptool.model.llama import Llama
from cptool.model.shapes import llama_config
from cptool.planning.cost.estimate import decode_step, prefill

SHAPE = llama_config(
    hidden=256,
    layers=2,
    heads=4,
    kv_heads=2,
    ffn=704,
    head_dim=64,
    vocab_size=1000,
    max_position_embeddings=1 << 20,
)


def random_model(config: LlamaConfig) -> Llama:
    torch.manual_seed(0)
    model = Llama(config, "cpu")
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.fill_(1.0)
        else:
            parameter.normal_(std=0.02)
    return model.eval()


def spent(work) -> float:
    """Return the processor time of a call, in seconds."""
    began = time.process_time()
    work()
    return time.process_time() - began


@torch.inference_mode()
def measure(world, config: LlamaConfig, options: argparse.Namespace) -> list[dict]:
    torch.set_num_threads(1)
    engine = Engine(random_model(config), world, batch=1)
    ids = torch.randint(config.vocab_size, (options.tokens,), generator=torch.manual_seed(1))
    prompt, rows = ids.tolist(), []
    for first in range(0, options.tokens, options.chunk):
        chunk = prompt[first : first + options.chunk]
        held = first + len(chunk)
        reading = engine.forward([len(chunk)])
        seconds = spent(lambda chunk=chunk: engine.extend([chunk]))
        if held & (held - 1) and held != options.tokens:
            continue
        answering, here = engine.forward([1]), engine.mark()
        steps = [spent(lambda: engine.extend([[7]])) for _ in range(options.steps)]
        engine.rewind(here)
        rows.append(
            {
                "tokens": held,
                "read_s_per_token": seconds / len(chunk),
                "predicted_read_s_per_token": prefill("pass-kv", reading, engine.profile).seconds
                / len(chunk),
                "step_s": summary(steps),
                "predicted_step_s": decode_step("pass-kv", answering, engine.profile).seconds,
            }
        )
        print(
            f"window {config.window(0)}: {held:6} tokens, read {1e6 * seconds / len(chunk):8.1f} "
            f"us per token, step {1e3 * min(steps):7.3f} ms",
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--window", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=65536, help="of the prompt")
    parser.add_argument("--chunk", type=int, default=1024, help="tokens read at a time")
    parser.add_argument("--steps", type=int, default=20, help="steps of an answer at each length")
    parser.add_argument("--json", help="file for the results")
    options = parser.parse_args()
    ranks = RankOptions(device="cpu", threads=1)
    results = {
        name: run(measure, replace(SHAPE, windows=windows), options, ranks=ranks)
        for name, windows in (
            ("window", (options.window,) * SHAPE.num_hidden_layers),
            ("all", None),
        )
    }
    if options.json:
        facts = {"options": vars(options), **circumstances(), **results}
        Path(options.json).write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
