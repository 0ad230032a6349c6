"""How much time `auto` loses against the best variant, over a grid of T and P.

    python benchmarks/auto_regret.py --cp 2 --cp 4

A model with random weights runs T new tokens over P cached ones under every variant and with fewer
active ranks, interleaved, so that drift of the machine meets all alike. The regret of a cell is the
median time of what `auto` picks over that of the fastest, less one.
"""

import argparse
import dataclasses
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported

NEW = (1, 16, 128, 1024, 4096)
CACHED = (0, 512, 4096)
RESULTS = Path(__file__).parent / "results"


def model_config():
    from cptool.model.config import LlamaConfig

    return LlamaConfig(
        vocab_size=1024,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        max_position_embeddings=16384,
        tie_word_embeddings=True,
    )


def random_model(dtype: str, device):
    import torch

    from cptool.model.llama import Llama

    torch.manual_seed(0)
    model = Llama(model_config(), device="cpu")
    for parameter in model.parameters():
        parameter.normal_(std=0.05)
    return model.to(getattr(torch, dtype)).to(device)


def measure(world, dtype: str, repeats: int, news: list[int], cacheds: list[int]) -> tuple[list[dict], dict]:
    from unittest import mock

    from cptool.engine import Engine
    from cptool.hardware import world_profile
    from cptool.session import ModelIdentity
    from cptool.strategy import VARIANTS, Choice, choose

    profile, config = world_profile(world), model_config()
    model = random_model(dtype, world.device)
    identity = ModelIdentity("random", "0", config.num_hidden_layers, 2, 64)
    folder = Path(world.gather(tempfile.mkdtemp())[0])
    cells = []
    for cached in cacheds:
        start = Engine(model, world, profile=profile)
        manifest, directory = None, folder / str(cached)
        if cached:
            start.extend([[i % 1000 for i in range(cached)]])
            manifest = start.save(directory, None, identity)
        for new in news:
            auto = choose(
                "auto", new=new, cached=cached, ranks=world.cp, config=config, dtype=dtype,
                profile=profile,
            )  # fmt: skip
            active = {world.cp, auto.active}
            active |= {n for n in (1, 2) if n < world.cp and n < new}
            choices = [
                Choice(variant, n, "", 0.0) for n in sorted(active) for variant in VARIANTS
            ]
            spent: dict = {(c.variant, c.active): [] for c in choices}
            for repeat in range(repeats + 1):
                for choice in choices:
                    engine = Engine(model, world, profile=profile)
                    if manifest is not None:
                        engine.restore(directory, manifest, reserve=2 * new)
                    with mock.patch("cptool.engine.choose", return_value=choice):
                        world.barrier()
                        began = time.perf_counter()
                        engine.extend([[i % 1000 for i in range(new)]])
                        took = max(world.gather(time.perf_counter() - began))
                    if repeat:  # the first round warms up
                        spent[choice.variant, choice.active].append(took)
            medians = {key: statistics.median(times) for key, times in spent.items()}
            best = min(medians, key=medians.get)
            picked = (auto.variant, auto.active)
            world.report(f"{new} tokens over {cached}", len(cells), len(news) * len(cacheds))
            cells.append(
                {
                    "ranks": world.cp,
                    "new": new,
                    "cached": cached,
                    "picked": list(picked),
                    "reason": auto.reason,
                    "best": list(best),
                    "regret": medians[picked] / medians[best] - 1,
                    "spread": statistics.median(
                        (max(t) - min(t)) / statistics.median(t) for t in spent.values()
                    ),
                    "milliseconds": {
                        f"{variant} on {n}": 1e3 * seconds
                        for (variant, n), seconds in medians.items()
                    },
                    "predicted_ms": {
                        f"{c.variant} on {c.active}": 1e3
                        * config.num_hidden_layers
                        * _predicted(c, new, cached, world.cp, dtype, profile)
                        for c in choices
                    },
                }
            )
    return cells, dataclasses.asdict(profile)


def _predicted(choice, new, cached, ranks, dtype, profile) -> float:
    from cptool.cost import Forward, predict

    forward = Forward(model_config(), dtype, new, cached, ranks, choice.active)
    return predict(choice.variant, forward, profile).seconds


def main() -> None:
    from cptool.distributed import run

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cp", type=int, action="append")
    parser.add_argument("--new", type=int, action="append", help=f"T; default {NEW}")
    parser.add_argument("--cached", type=int, action="append", help=f"P; default {CACHED}")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS / "auto_regret.json")
    arguments = parser.parse_args()
    cells, profile = [], None
    for ranks in arguments.cp or [2, 4]:
        measured, profile = run(
            measure, arguments.dtype, arguments.repeats, arguments.new or list(NEW),
            arguments.cached or list(CACHED), cp=ranks, device="cpu",
        )  # fmt: skip
        cells += measured
        for c in measured:
            print(
                f"N={ranks} T={c['new']:5} P={c['cached']:5}  picked {c['picked'][0]} on "
                f"{c['picked'][1]}, best {c['best'][0]} on {c['best'][1]}, "
                f"regret {c['regret']:.1%} (spread of a time {c['spread']:.0%})"
            )
    regrets = [c["regret"] for c in cells]
    print(f"median {statistics.median(regrets):.1%}, worst {max(regrets):.1%}")
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "command": f"python benchmarks/auto_regret.py {' '.join(sys.argv[1:])}".strip(),
        "date": datetime.date.today().isoformat(),
        "commit": commit,
        "processors": os.cpu_count(),
        "processor": _processor(),
        "profile": profile,
        "median_regret": statistics.median(regrets),
        "worst_regret": max(regrets),
        "cells": cells,
    }
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    fields = (line.partition(":") for line in lines)
    return next(value.strip() for name, _, value in fields if name.strip() == "model name")


if __name__ == "__main__":
    main()
