"""A whole model of random weights on one GPU: prefill over contexts, and decode at each.

    python benchmarks/gpu_model.py --shape llama3-8b --context 8192 32768 --json FILE
    python benchmarks/gpu_model.py --device cpu                 # the script itself, a tiny model

Prefill is held against a bf16 matrix product, decode against a copy, both measured in the same run.
Decode runs over static memory, in a CUDA graph where there are graphs, and kernel by kernel as
`extend` does.
"""

from __future__ import annotations

import dataclasses
import statistics
import time

import torch
from gpu_timing import arguments, copy, cuda, parser, product, timed, write

from cptool.checkpoint.shapes import find_shape
from cptool.distributed import launch
from cptool.distributed.options import RankOptions
from cptool.engine.answers.decode import decode, next_tokens
from cptool.engine.answers.records import AnswerOptions
from cptool.engine.engine import Engine
from cptool.engine.options import EngineOptions
from cptool.engine.sampling import Sampling
from cptool.model.llama import Llama
from cptool.model.rope import inverse_frequencies
from cptool.model.shapes import SHAPES
from cptool.planning.cost.counts import attention_flops, kv_bytes, linear_flops, weight_bytes

TINY = dataclasses.replace(
    SHAPES["llama3-8b"],
    vocab_size=128,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
)


def random_model(config, dtype: torch.dtype, device: torch.device) -> Llama:
    """Weights small enough that a residual stream of any depth stays finite."""
    model = Llama(config)
    weights = {}
    for name, parameter in model.named_parameters():
        values = torch.empty(parameter.shape, dtype=dtype, device=device)
        weights[name] = values.fill_(1.0) if values.dim() == 1 else values.normal_(std=0.02)
    model.load_state_dict(weights, assign=True)
    model.inverse_frequencies = inverse_frequencies(config).to(device)
    return model.eval()


def synchronize(device: torch.device) -> None:
    if cuda(device):
        torch.cuda.synchronize(device)


def prefill(engine: Engine, prompt: list[int], device: torch.device) -> float:
    """Seconds to the first token, from tokens in memory to the token on the host."""
    engine.truncate([0])
    synchronize(device)
    began = time.perf_counter()
    engine.extend([prompt], reserve=256)
    next_tokens(engine, Sampling())
    return time.perf_counter() - began


def timed_decode(engine: Engine, steps: int) -> float:
    """Seconds of a step, the mean over `steps`."""
    times: list[float] = []
    decode(
        engine, AnswerOptions(limit=steps + 1), emit=lambda *_: times.append(time.perf_counter())
    )
    return (times[-1] - times[0]) / (len(times) - 1)


def measure(world, given, config, contexts) -> list[dict[str, object]]:
    device, dtype = world.device, torch.bfloat16
    model = random_model(config, dtype, device)
    run, flops = product(device, dtype)
    moving, moved = copy(device)
    generator = torch.Generator().manual_seed(0)
    results = []
    for context in contexts:
        prompt = torch.randint(config.vocab_size, (context,), generator=generator).tolist()
        ways = {"graph": True, "eager": False}
        engines = {
            name: Engine(model, world, options=EngineOptions(static=static))
            for name, static in ways.items()
        }
        names = ("prefill", *engines, "gemm", "copy")
        samples: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(given.rounds + 1):
            for name, engine in engines.items():
                samples["prefill"].append(prefill(engine, prompt, device))
                samples[name].append(timed_decode(engine, given.steps))
            samples["gemm"].append(timed(run, device, 10))
            samples["copy"].append(timed(moving, device, 5))
        median = {name: statistics.median(values[1:]) for name, values in samples.items()}
        work = linear_flops(config, context, 1) + attention_flops(config, context)
        read = weight_bytes(config, 2) + kv_bytes(config, context + given.steps // 2, 2)
        bandwidth = moved / median["copy"]
        result = {
            "context": context,
            "ttft_s": median["prefill"],
            "prefill_flops": work,
            "of_gemm": work / median["prefill"] / (flops / median["gemm"]),
            "decode_bytes": read,
            "steps": engines["graph"].choice.reason,
            **{f"ttit_ms_{name}": 1e3 * median[name] for name in engines},
            **{f"of_copy_{name}": read / median[name] / bandwidth for name in engines},
            "samples": samples,
        }
        results.append(result)
        print(
            f"{context} tokens: first token {result['ttft_s']:.3f} s, "
            f"{work / result['ttft_s'] / 1e12:.1f} TFLOP/s, "
            f"{100 * result['of_gemm']:.1f}% of gemm, "
            + ", ".join(
                f"decode {name} {1e3 * median[name]:.2f} ms, {read / median[name] / 1e9:.0f} GB/s, "
                f"{100 * result[f'of_copy_{name}']:.1f}% of copy"
                for name in engines
            )
            + f" ({result['steps']})"
        )
        del engines
    return results


def main() -> None:
    options = parser(__doc__.partition("\n\n")[0])
    options.add_argument("--shape", help="default: llama3-8b, on a CPU a tiny one")
    options.add_argument("--context", nargs="+", type=int, metavar="TOKENS")
    options.add_argument("--steps", type=int, default=32, help="tokens decoded at each context")
    given = arguments(options)
    on_gpu = cuda(given.device)
    shape = given.shape or ("llama3-8b" if on_gpu else None)
    config = find_shape(shape) if shape else TINY
    contexts = given.context or ([1024, 8192, 32768] if on_gpu else [96])
    results = launch.run(
        measure, given, config, contexts, ranks=RankOptions(device=given.device.type)
    )
    write(given, {"shape": shape or "tiny", "contexts": results})


if __name__ == "__main__":
    main()
