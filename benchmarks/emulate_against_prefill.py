"""What `bench emulate` projects from one rank of one layer, against whole prefills on real ranks.

    python benchmarks/emulate_against_prefill.py --cp 2 --tokens 4096 --tokens 16384 --json FILE

A random-weight model (hidden 1024, FFN 2816, 8 layers, 8/2 heads of 128, vocabulary 32000). In
every round all ranks run the prefill and then the first one emulates alone, so that both meet the
same machine; the link is calibrated in the same run.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

import checkout  # noqa: F401
import click

from cptool.model.shapes import llama_config

MODEL = llama_config(
    hidden=1024, layers=8, heads=8, kv_heads=2, ffn=2816, max_position_embeddings=1 << 20
)


def compare(world, lengths, variant, dtype, rounds):
    import torch

    from cptool.calibration import measure
    from cptool.calibration.rig import random_model
    from cptool.emulation.layer import Scenario
    from cptool.emulation.projection import emulate
    from cptool.engine.answers.decode import next_tokens
    from cptool.engine.engine import Engine
    from cptool.engine.options import EngineOptions
    from cptool.engine.sampling import Sampling

    profile = measure(world, (dtype,), repeats=3)
    model = random_model(MODEL, getattr(torch, dtype), world)
    results = []
    for tokens in lengths:
        scenario = Scenario(
            config=MODEL,
            cp=world.cp,
            tp=1,
            new=tokens,
            cached=0,
            variant=variant,
            dtype=getattr(torch, dtype),
            device=world.device,
        )
        measured, projected, exposed, told = [], [], [], []
        for _ in range(rounds + 1):
            engine = Engine(model, world, options=EngineOptions(variant=variant))
            prompt = [(7 * i) % 31999 for i in range(tokens)]
            world.barrier()
            began = time.perf_counter()
            engine.extend([prompt])
            next_tokens(engine, Sampling())
            measured.append(max(world.gather(time.perf_counter() - began)))
            exposed.append(max(world.gather(engine.ring.exposed_s)))
            if world.rank == 0:
                result = emulate(scenario, profile, repeats=3)
                projected.append(result.ttft_s)
                told.append(result.layers * result.exposed_s)
            world.barrier()
        if world.rank == 0:
            medians = [statistics.median(values[1:]) for values in (measured, projected)]
            results.append(
                {
                    "tokens": tokens,
                    "cp": world.cp,
                    "variant": variant,
                    "measured_s": measured[1:],
                    "projected_s": projected[1:],
                    "projected_over_measured": medians[1] / medians[0],
                    "exposed_measured_s": exposed[1:],
                    "exposed_projected_s": told[1:],
                }
            )
            print(
                f"{tokens} tokens, {world.cp} ranks: prefill {medians[0]:.3f} s, projected "
                f"{medians[1]:.3f} s, ratio {medians[1] / medians[0]:.3f}",
                flush=True,
            )
    return results


@click.command(help=__doc__.partition("\n\n")[0])
@click.option("--cp", type=click.IntRange(min=1), multiple=True, default=(1, 2))
@click.option("--tokens", type=click.IntRange(min=2), multiple=True, default=(4096, 16384))
@click.option("--variant", default="pass-kv", show_default=True)
@click.option("--dtype", default="bfloat16", show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path))
def main(cp, tokens, variant, dtype, rounds, json_file) -> None:
    from cptool.distributed import launch
    from cptool.distributed.options import RankOptions

    results = []
    for ranks in cp:
        arguments = (tokens, variant, dtype, rounds)
        results += launch.run(
            compare, *arguments, ranks=RankOptions(cp=ranks, device="cpu", threads=1)
        )
    if json_file:
        from cptool.bench.timing import circumstances

        head = {**circumstances(), "threads_per_rank": 1}
        json_file.write_text(json.dumps({**head, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
