"""A whole model on a CPU: time to the first token and per further token, ours against transformers
with SDPA and, where llama-cpp-python is installed, llama.cpp with flash attention, on the same
weights, with the ceilings of the machine.

    python benchmarks/cpu_model.py --weights bf16,q4_k_m --tokens 1024,4096 --json results.json
    python benchmarks/cpu_model.py --shape llama3-1b --weights q4_0 --threads 2 --tokens 4096
    python benchmarks/cpu_model.py --model SmolLM2-135M-Instruct.gguf --tokens 1024,4096

Each engine computes in the type that is fastest for it: cptool in that of `--dtype auto`,
transformers in bfloat16 where the processor multiplies it and else in float32, llama.cpp as it
does. llama.cpp quantises activations to 8 bits where weights are quantised, and computes another
function than the others.

The ceiling of a prefill is its matrix products at the rate of one large product, torch's or ours,
and its attention at that of our own kernel, all measured in the same run; that of a decode step is
its weights as they are stored and its KV at the rate at which the same threads read memory.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import checkout  # noqa: F401
import random_gguf
import random_llama
import torch
from ceilings import Ceilings
from transformers import AutoModelForCausalLM

from cptool.bench.timing import circumstances, summary
from cptool.checkpoint import Checkpoint, open_checkpoint
from cptool.distributed.launch import run
from cptool.distributed.options import RankOptions
from cptool.engine.answers.decode import decode, next_tokens
from cptool.engine.answers.records import AnswerOptions
from cptool.engine.engine import Engine
from cptool.engine.sampling import Sampling
from cptool.engine.setup.types import mean_weight_size, resolve_dtype
from cptool.engine.weights import load_model
from cptool.model.shapes import SHAPES, llama_config
from cptool.ops.attention import attention_partial
from cptool.ops.linear import linear as ours_linear
from cptool.ops.processor import has_bfloat16_products
from cptool.planning.cost.counts import attention_flops, kv_bytes, linear_flops, weight_bytes

Times = tuple[float, float]
"""Seconds to the first token, and of each further one."""

SMALL = "156m"
"""The shape of `random_llama`, which transformers reads as well."""


def clock() -> float:
    """CPU time of the process on one thread, whatever threads a peer starts beside it; else on the
    wall.
    """
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def ours(world, path: str) -> Callable[[list[int], int], Times]:
    checkpoint = open_checkpoint(path)
    dtype = getattr(torch, resolve_dtype("auto", checkpoint, "cpu"))
    model = load_model(checkpoint, dtype, world.device, world)

    def measure(tokens: list[int], further: int) -> Times:
        engine = Engine(model, world)
        begin = clock()
        engine.extend([tokens], reserve=further + 1)
        next_tokens(engine, Sampling())
        first = clock()
        decode(engine, AnswerOptions(limit=further + 1))
        return first - begin, (clock() - first) / further

    return measure


def by_transformers(path: str) -> Callable[[list[int], int], Times]:
    dtype = torch.bfloat16 if has_bfloat16_products() else torch.float32
    file = Path(path)
    place = (file.parent, {"gguf_file": file.name}) if file.is_file() else (file, {})
    model = AutoModelForCausalLM.from_pretrained(
        place[0], dtype=dtype, attn_implementation="sdpa", **place[1]
    )

    @torch.inference_mode()
    def measure(tokens: list[int], further: int) -> Times:
        begin = clock()
        result = model(torch.tensor([tokens]), use_cache=True, logits_to_keep=1)
        token = result.logits[:, -1].argmax(-1, keepdim=True)
        first = clock()
        for _ in range(further):
            result = model(token, use_cache=True, past_key_values=result.past_key_values)
            token = result.logits[:, -1].argmax(-1, keepdim=True)
        return first - begin, (clock() - first) / further

    return measure


def by_llama_cpp(path: str, context: int) -> Callable[[list[int], int], Times]:
    from llama_cpp import Llama

    threads = torch.get_num_threads()
    file = Path(path)
    model = Llama(
        model_path=str(file if file.is_file() else file / "model.gguf"),
        n_ctx=context,
        n_batch=2048,
        n_threads=threads,
        n_threads_batch=threads,
        flash_attn=True,
        verbose=False,
    )

    def measure(tokens: list[int], further: int) -> Times:
        model.reset()
        begin = clock()
        model.eval(tokens)
        first = clock()
        for step in range(further):
            model.eval([100 + step])
        return first - begin, (clock() - first) / further

    return measure


def rates(checkpoint: Checkpoint, tokens: int) -> dict[str, float]:
    """Measured now: FLOP/s of a large product and of causal attention, bytes/s of reading."""
    config = checkpoint.config
    dtype = getattr(torch, resolve_dtype("auto", checkpoint, "cpu"))
    x, w = torch.randn(1024, 1024, dtype=dtype), torch.randn(5632, 1024, dtype=dtype)
    heads, head_dim = config.num_attention_heads, config.head_dim
    count = min(tokens, 4096)
    q = torch.randn(count, heads, head_dim, dtype=dtype)
    k = torch.randn(count, config.num_key_value_heads, head_dim, dtype=dtype)
    positions = torch.arange(count, dtype=torch.int32)
    ends = torch.tensor([0, count], dtype=torch.int32)

    def seconds(call: Callable[[], object], repeats: int) -> float:
        samples = []
        for _ in range(repeats):
            begin = clock()
            call()
            samples.append(clock() - begin)
        return min(samples)

    linear = min(
        seconds(lambda: torch.nn.functional.linear(x, w), 5),
        seconds(lambda: ours_linear(x, w), 5),
    )
    attention = seconds(
        lambda: attention_partial(
            q, k, k, positions, positions, ends, ends, head_dim**-0.5, out_dtype=q.dtype
        ),
        2,
    )
    memory = torch.ones(256 << 20, dtype=torch.uint8)
    return {
        "linear_flops": 2 * x.shape[0] * w.numel() / linear,
        "attention_flops": 4 * head_dim * heads * count * (count + 1) / 2 / attention,
        "read_bandwidth": max(Ceilings(torch.get_num_threads()).read(memory) for _ in range(3)),
    }


def compare(world, path: str, options: argparse.Namespace) -> list[dict]:
    torch.set_num_threads(options.threads)
    lengths = [int(length) for length in options.tokens.split(",")]
    checkpoint = open_checkpoint(path)
    config = checkpoint.config
    measures = {"cptool": ours(world, path)}
    if "transformers" in options.peers:
        measures["transformers"] = by_transformers(path)
    if "llama.cpp" in options.peers:
        measures["llama.cpp"] = by_llama_cpp(path, max(lengths) + options.decode + 8)
    generator = torch.manual_seed(1)
    for measure in measures.values():  # warm up
        measure([7] * 64, 2)
    dtype = resolve_dtype("auto", checkpoint, "cpu")
    size = getattr(torch, dtype).itemsize
    stored_size = mean_weight_size(checkpoint, dtype, "cpu") or size
    rows = []
    for length in lengths:
        tokens = torch.randint(100, config.vocab_size, (length,), generator=generator).tolist()
        samples: dict[str, list[Times]] = {name: [] for name in measures}
        for _ in range(options.repeats):
            for name, measure in measures.items():
                samples[name].append(measure(tokens, options.decode))
        rate = rates(checkpoint, length)
        ceiling = {
            "ttft_s": linear_flops(config, length, 1) / rate["linear_flops"]
            + attention_flops(config, length, 0) / rate["attention_flops"],
            "ttit_s": (weight_bytes(config, 1) * stored_size + kv_bytes(config, length, size))
            / rate["read_bandwidth"],
        }
        row = {"tokens": length, "dtype": dtype, "rates": rate, "ceiling": ceiling, "engines": {}}
        for name, times in samples.items():
            row["engines"][name] = {
                "ttft_s": summary([first for first, _ in times]),
                "ttit_s": summary([further for _, further in times]),
            }
        rows.append(row)
        ours_first, ours_further = _medians(row["engines"]["cptool"])
        for name, times in row["engines"].items():
            first, further = _medians(times)
            print(
                f"{length:6} {name:13} first {first:8.3f} s ({first / ours_first:.2f} times ours, "
                f"ceiling {ceiling['ttft_s']:.3f}), further {1e3 * further:7.2f} ms "
                f"({further / ours_further:.2f} times ours, ceiling {1e3 * ceiling['ttit_s']:.2f})",
                flush=True,
            )
    return rows


def _medians(times: dict[str, dict[str, float]]) -> Times:
    return times["ttft_s"]["median"], times["ttit_s"]["median"]


def _write(folder: Path, shape: str, weights: str) -> Path:
    """Return the model, written to `folder` unless an earlier run did."""
    if (shape, weights) == (SMALL, "bf16"):
        path = folder / f"{shape}-{weights}"
        if not (path / "model.gguf").exists():
            random_llama.write(path, gguf=True)
        return path
    path = folder / f"{shape}-{weights}.gguf"
    if not path.exists():
        small = llama_config(
            hidden=1024, layers=8, heads=8, kv_heads=2, ffn=2816, max_position_embeddings=1 << 17
        )
        random_gguf.write(path, small if shape == SMALL else SHAPES[shape], weights)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", default="1024,2048,4096")
    parser.add_argument("--decode", type=int, default=16, help="further tokens timed")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peers", default="transformers,llama.cpp")
    parser.add_argument("--model", help="a checkpoint, in place of random weights")
    parser.add_argument("--shape", default=SMALL, choices=[SMALL, *SHAPES])
    parser.add_argument("--weights", default="bf16", help=f"some of {','.join(random_gguf.MIXES)}")
    parser.add_argument("--folder", help="where random models are kept for the next run")
    parser.add_argument("--json", help="file for the results")
    options = parser.parse_args()
    options.peers = [peer for peer in options.peers.split(",") if peer]
    torch.set_num_threads(options.threads)
    ranks = RankOptions(device="cpu", threads=options.threads)
    models = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.folder or temporary)
        for weights in options.weights.split(","):
            path = options.model or str(_write(folder, options.shape, weights))
            name = Path(path).name
            print(name, flush=True)
            models.append({"model": name, "rows": run(compare, path, options, ranks=ranks)})
            if options.model:
                break
    clock = "CPU time of the process" if options.threads == 1 else "wall time"
    result = {**circumstances(), "clock": clock, "models": models}
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
