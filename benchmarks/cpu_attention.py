"""CPU attention held against the machine and against torch.

    python benchmarks/cpu_attention.py                      # 8K tokens, one thread
    python benchmarks/cpu_attention.py --quick --isa all --json FILE

Three things are measured, each interleaved with its ceiling and with torch in the same run:

- prefill: causal attention of T new tokens over P cached ones and themselves, 4 D flops for each of
  the (P T + T (T + 1) / 2) pairs and each query head; the ceiling is the rate of multiply-adds in
  registers of the units that the kernel uses (ceilings.cpp), the peer torch's flash attention. A
  partial prefill has 1/16 of the tokens new.
- decode: one query token over a long KV cache; the ceiling is a plain read of as many bytes. A
  sample is a run of calls, each on the next of several caches, as a decode step takes one layer's
  after another: none is in a processor's cache. The first call of a run is not counted, for it
  finds what another contender left behind: after torch's it was measured at a third of the rate.
- merge of partials; the ceiling is torch's copy into memory as new as the merge's result, counted
  as bytes read and bytes written.

Torch gets contiguous [heads, tokens, D], our op [tokens, heads, D] and a slab of K and V as the KV
cache holds them. torch's causal mask has no form for cached tokens, so these go without a peer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import checkout  # noqa: F401
import click
import torch
from ceilings import STEPS, Ceilings
from rich.console import Console
from rich.table import Table

from cptool.bench.attention import AttentionProblem, Inputs
from cptool.bench.timing import circumstances, clock_name, interleave, stopwatch
from cptool.cli.options.types import Heads
from cptool.ops.attention import merge_partials
from cptool.ops.kernels import cpu_isa, cpu_isas, force_cpu_isa

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
COLD_BYTES = 256 << 20  # of caches, so that each is cold when its turn comes
RUN = 4  # calls counted in a sample of decode
CEILINGS = {"avx512bf16": "bf16_dot", "amx": "amx"}  # of a kernel's units; the others': fma
PIECES = {torch.float32: 6, torch.float16: 5}  # products of bfloat16 that AMX computes for one


def _timed_on(isa: str, run: Callable[[], object]) -> float:
    with force_cpu_isa(isa):
        return stopwatch(run)


def _in_a_run(measure: Callable[[], float]) -> Callable[[], float]:
    """The mean of RUN calls after one that does not count."""

    def run() -> float:
        measure()
        return math.fsum(measure() for _ in range(RUN)) / RUN

    return run


def problem_of(
    tokens: int, cached: int, heads: tuple[int, int], head_dim: int, dtype: str
) -> AttentionProblem:
    return AttentionProblem(
        tokens=tokens,
        cached=cached,
        q_heads=heads[0],
        kv_heads=heads[1],
        head_dim=head_dim,
        dtype=DTYPES[dtype],
    )


def _kernels(isas: tuple[str, ...], problem: AttentionProblem) -> list[str]:
    """Return those of `isas` ("all": every one) that take the problem; if none are given, the op's
    own choice.
    """
    if not isas:
        return [cpu_isa(problem.dtype, problem.head_dim)]
    taking = []
    for isa in cpu_isas() if "all" in isas else isas:
        with force_cpu_isa(isa):
            taking += [isa] if cpu_isa(problem.dtype, problem.head_dim) == isa else []
    return taking


def attention(
    kind: str,
    problem: AttentionProblem,
    isas: tuple[str, ...],
    ceilings: Ceilings | None,
    repeats: int,
) -> list[dict[str, object]]:
    """Measure one problem: a result per instruction set."""
    inputs = Inputs(problem)
    copies = 1 + math.ceil(COLD_BYTES / inputs.slab.nbytes) if kind == "decode" else 1
    turns = cycle([inputs, *(Inputs(problem) for _ in range(copies - 1))])
    kernels = _kernels(isas, problem)
    measures: dict[str, Callable[[], float]] = {}
    for isa in kernels:
        measures[f"ours {isa}"] = lambda isa=isa: _timed_on(isa, next(turns).ours)
    if inputs.torch_can:
        measures["torch"] = lambda: stopwatch(next(turns).torch)
    if ceilings and kind == "decode":
        measures["read"] = lambda: ceilings.read(next(turns).slab)
    elif ceilings:
        for name in STEPS:
            if ceilings.flops(name) is not None:
                measures[name] = lambda name=name: ceilings.flops(name)
    if kind == "decode":
        measures = {name: _in_a_run(measure) for name, measure in measures.items()}
    measured = interleave(measures, repeats)
    peer = measured.get("torch")
    results = []
    for isa in kernels:
        ours = measured[f"ours {isa}"]
        time = ours["median"]
        if kind == "decode":
            ceiling, rate = "read", inputs.slab.nbytes / time
        else:
            ceiling, rate = CEILINGS.get(isa, "fma"), problem.flops / time
        limit = measured.get(ceiling)
        pieces = PIECES.get(problem.dtype, 1) if ceiling == "amx" else 1
        with force_cpu_isa(isa):
            errors = inputs.errors()
        results.append(
            {
                "case": kind,
                **problem.facts(),
                "threads": torch.get_num_threads(),
                "isa": isa,
                "seconds": ours,
                "rate": rate,
                "unit": "bytes/s" if kind == "decode" else "flop/s",
                "ceiling": ceiling,
                "of_ceiling": pieces * rate / limit["median"] if limit else None,
                "torch_seconds": peer,
                "torch_over_ours": peer["median"] / time if peer else None,
                "ceilings": {name: measured.get(name) for name in (*STEPS, "read")},
                **errors,
            }
        )
    return results


def merge(
    partials: int, tokens: int, heads: int, head_dim: int, dtype: torch.dtype, repeats: int
) -> dict[str, object]:
    """Measures merge_partials into the partials' dtype."""
    outs = [torch.randn(tokens, heads, head_dim).to(dtype) for _ in range(partials)]
    lses = [torch.randn(tokens, heads) for _ in range(partials)]
    moved = (partials + 1) * (outs[0].nbytes + lses[0].nbytes)
    measured = interleave(
        {
            "merge": lambda: stopwatch(lambda: merge_partials(outs, lses, dtype)),
            "copy": lambda: 2 * outs[0].nbytes / stopwatch(outs[0].clone),
        },
        repeats,
    )
    rate = moved / measured["merge"]["median"]
    exact = torch.einsum(
        "sth,sthd->thd", torch.stack(lses).double().softmax(0), torch.stack(outs).double()
    )
    return {
        "case": "merge",
        "threads": torch.get_num_threads(),
        "partials": partials,
        "tokens": tokens,
        "q_heads": heads,
        "head_dim": head_dim,
        "dtype": str(dtype).removeprefix("torch."),
        "seconds": measured["merge"],
        "rate": rate,
        "unit": "bytes/s",
        "ceiling": "copy",
        "of_ceiling": rate / measured["copy"]["median"],
        "ceilings": {"copy": measured["copy"]},
        "error": float((merge_partials(outs, lses, dtype)[0].double() - exact).abs().max()),
    }


def draw(results: list[dict[str, object]], console: Console) -> None:
    table = Table(box=None, header_style="bold", padding=(0, 1))
    for column in ("case", "threads", "dtype", "D", "heads", "tokens", "isa"):
        table.add_column(column, no_wrap=True)
    for column in ("ms (min, max)", "rate", "of ceiling", "x torch", "error (torch's)"):
        table.add_column(column, justify="right", no_wrap=True)
    for r in results:
        time = [f"{1e3 * r['seconds'][key]:.4g}" for key in ("median", "min", "max")]
        rate = (
            f"{r['rate'] / 1e12:.3f} TFLOP/s"
            if r["unit"] == "flop/s"
            else f"{r['rate'] / 1e9:.1f} GB/s"
        )
        ratio, torch_error = r.get("torch_over_ours"), r.get("torch_error")
        table.add_row(
            str(r["case"]),
            str(r["threads"]),
            r["dtype"],
            str(r["head_dim"]),
            f"{r['q_heads']}/{r['kv_heads']}" if "kv_heads" in r else str(r["q_heads"]),
            f"{r['tokens']}"
            + (f" + {r['cached']} cached" if r.get("cached") else "")
            + (f" x {r['partials']}" if "partials" in r else ""),
            r.get("isa", ""),
            f"{time[0]} ({time[1]}, {time[2]})",
            rate,
            f"{100 * r['of_ceiling']:.1f}% {r['ceiling']}" if r["of_ceiling"] else "",
            f"{ratio:.2f}" if ratio else "",
            f"{r['error']:.1e}" + (f" ({torch_error:.1e})" if torch_error else ""),
        )
    console.print(table)


POSITIVE = click.IntRange(min=1)


@click.command(help=__doc__.partition("\n\n")[0], context_settings={"show_default": True})
@click.option("--tokens", "-t", type=POSITIVE, multiple=True, default=(8192,), help="New tokens.")
@click.option("--cached", type=click.IntRange(min=0), multiple=True, default=(0,))
@click.option(
    "--head-dim", "-d", type=click.IntRange(min=8, max=256), multiple=True, default=(64, 80, 128)
)
@click.option("--heads", type=Heads(), multiple=True, default=("8/8", "8/2", "8/1"), metavar="Q/KV")
@click.option(
    "--dtype", "dtypes", type=click.Choice(list(DTYPES)), multiple=True, default=tuple(DTYPES)
)
@click.option(
    "--isa",
    "isas",
    type=click.Choice([*cpu_isas(), "all"]),
    multiple=True,
    help="Instruction sets; without any, the one that the op chooses.",
)
@click.option("--threads", type=POSITIVE, multiple=True, default=(1,))
@click.option("--partial/--no-partial", default=True, help="Partial prefills too.")
@click.option(
    "--quick",
    is_flag=True,
    help="2K tokens, 8 heads on 2 of 64 and 128, 8K keys to decode: under a minute.",
)
@click.option("--repeats", type=POSITIVE, default=5)
@click.option(
    "--decode-keys",
    type=click.IntRange(min=0),
    default=32768,
    help="Keys of the decode call; 0 leaves it out.",
)
@click.option(
    "--merge-tokens",
    type=click.IntRange(min=0),
    default=8192,
    help="Tokens of the merged partials; 0 leaves them out.",
)
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path))
def main(
    tokens,
    cached,
    head_dim,
    heads,
    dtypes,
    isas,
    threads,
    partial,
    quick,
    repeats,
    decode_keys,
    merge_tokens,
    json_file,
) -> None:
    if quick:
        tokens, head_dim, heads = (2048,), (64, 128), [(8, 2)]
        decode_keys, merge_tokens = 8192, 2048
    log = Console(stderr=True, highlight=False)
    problems = [
        ("prefill", problem_of(t, p, h, d, dtype))
        for d in head_dim
        for h in heads
        for dtype in dtypes
        for t in tokens
        for p in cached
    ]
    if partial:
        problems += [
            ("prefill", problem_of(t // 16, t - t // 16, h, d, dtype))
            for d in head_dim
            for h in heads
            for dtype in dtypes
            for t in tokens
            if t >= 16
        ]
    if decode_keys:
        problems += [
            ("decode", problem_of(1, decode_keys - 1, h, d, dtype))
            for d in head_dim
            for h in heads
            for dtype in dtypes
        ]
    head = circumstances()
    results: list[dict[str, object]] = []
    for count in threads:
        torch.set_num_threads(count)
        head["clock"] = clock_name() if len(threads) == 1 else "CPU time on one thread, else wall"
        try:
            ceilings = Ceilings(count)
        except OSError as error:
            log.print(f"No ceilings: {error}")
            ceilings = None
        with log.status("") as status:
            for kind, problem in problems:
                facts = " ".join(f"{name}={value}" for name, value in problem.facts().items())
                status.update(f"{kind} {facts}, {count} thread(s)")
                # A call of decode takes about a millisecond, one of prefill about a second.
                rounds = 5 * repeats if kind == "decode" else repeats
                results += attention(kind, problem, isas, ceilings, rounds)
            if merge_tokens:
                for dtype in dtypes:
                    for partials in (2, 4):
                        status.update(f"merge of {partials}, {dtype}")
                        results.append(
                            merge(
                                partials,
                                merge_tokens,
                                max(h for h, _ in heads),
                                max(head_dim),
                                DTYPES[dtype],
                                4 * repeats,
                            )
                        )
    draw(results, Console(width=None if log.is_terminal else 170, highlight=False))
    for count in threads:
        rates = [r["ceilings"] for r in results if r["case"] == "prefill" and r["threads"] == count]
        for name in STEPS:
            medians = [r[name]["median"] for r in rates if r[name]]
            if medians:
                rate = math.fsum(medians) / len(medians) / 1e12
                log.print(f"{name}: {rate:.3f} TFLOP/s on {count} thread(s)")
    if json_file:
        json_file.write_text(json.dumps({**head, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
