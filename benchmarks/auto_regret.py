"""How much time `auto` loses against the best variant, over a grid of T and P.

    cptool bench calibrate
    python benchmarks/auto_regret.py --cp 2 --cp 4

A model with random weights runs T new tokens over P cached ones under every variant and with fewer
active ranks, interleaved, so that drift of the machine meets all alike. The regret of a cell is the
median time of what `auto` picks over that of the fastest, less one. Where those two medians differ
by less than they spread (the distance from the median of either that half of its times keep), the
cell is a tie that this machine cannot tell.

Up to FEW tokens the model has more layers than its weights would need to stay in a processor's last
cache from one forward to the next: no real model's do, and reading them is what few tokens cost.

`--merge FILE` keeps the cells of earlier runs for which this one has none: a grid may be measured
in pieces, and without --cp nothing more is. Cells say which profile picked.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported

import checkout  # noqa: F401

from cptool.model.shapes import llama_config

NEW = (1, 16, 128, 1024, 4096)
FEW, FEW_LAYERS, MANY_LAYERS = 128, 12, 4
CACHED = (0, 512, 4096)
RESULTS = Path(__file__).parent / "results"


def model_config(layers: int):
    return llama_config(
        hidden=512,
        layers=layers,
        heads=8,
        kv_heads=2,
        ffn=1536,
        vocab_size=1024,
        head_dim=64,
        max_position_embeddings=16384,
        tie_word_embeddings=True,
    )


def measure(world, dtype: str, repeats: int, seconds: float, grid) -> list[dict]:
    """One cell for each (T, P) of `grid`. Rounds go on for `seconds` a cell, at least `repeats`."""
    import torch

    from cptool.calibration.rig import hold, predicted_s, random_model
    from cptool.engine.engine import Engine
    from cptool.engine.world_profile import world_profile
    from cptool.planning.cost.forward import Forward
    from cptool.planning.strategy import Choice, choose
    from cptool.variants import names

    profile = world_profile(world)
    models = {
        layers: random_model(model_config(layers), getattr(torch, dtype), world)
        for layers in (FEW_LAYERS, MANY_LAYERS)
    }
    cells = []
    for new, cached in grid:
        model = models[FEW_LAYERS if new <= FEW else MANY_LAYERS]
        config = model.config
        forward = Forward(
            config=config,
            dtype=dtype,
            new=new,
            cached=cached,
            ranks=world.cp,
            active=world.cp,
        )
        auto = choose("auto", forward, profile)
        active = {world.cp, auto.active} | {n for n in _halves(world.cp) if n < new <= 4096}
        choices = [Choice(v, n, "", 0.0) for n in sorted(active) for v in names()]
        engine = Engine(model, world, profile=profile)
        mark = hold(engine, cached)
        spent: dict = {(c.variant, c.active): [] for c in choices}
        began, rounds = time.perf_counter(), 0
        while rounds <= repeats or max(world.gather(time.perf_counter() - began)) < seconds:
            for choice in choices:
                took = _once(engine, choice, new, mark)
                if rounds:  # the first round warms up
                    spent[choice.variant, choice.active].append(took)
            rounds += 1
        world.report(f"{new} tokens over {cached}", len(cells), len(grid))
        predicted = {
            f"{c.variant} on {c.active}": 1e3 * predicted_s(c, forward, profile) for c in choices
        }
        cells.append(
            {"ranks": world.cp, "new": new, "cached": cached, "layers": config.num_hidden_layers}
            | {"reason": auto.reason}
            | _judged(spent, (auto.variant, auto.active))
            | {"predicted_ms": predicted, "profile": profile.name}
        )
    return cells


def _halves(ranks: int) -> list[int]:
    return [ranks >> n for n in range(1, ranks.bit_length()) if ranks >> n]


def _once(engine, choice, new: int, mark) -> float:
    """Seconds of the slowest rank."""
    from cptool.engine.answers.decode import next_tokens
    from cptool.engine.sampling import Sampling

    engine.rewind(mark)
    engine.world.barrier()
    began = time.perf_counter()
    engine.extend([[1] * (new - 1)], variant=choice)
    next_tokens(engine, Sampling())
    took = time.perf_counter() - began
    return max(engine.world.gather(took))


def _judged(spent: dict, picked: tuple[str, int]) -> dict:
    medians = {key: statistics.median(times) for key, times in spent.items()}
    best = min(medians, key=medians.get)
    spread = max(_deviation(spent[key]) for key in (picked, best))
    gap = medians[picked] - medians[best]
    return {
        "picked": list(picked),
        "best": list(best),
        "regret": gap / medians[best],
        "spread": spread / medians[best],
        "tie": picked != best and gap < spread,
        "rounds": len(spent[picked]),
        "milliseconds": {f"{v} on {n}": 1e3 * t for (v, n), t in medians.items()},
        "least_milliseconds": {f"{v} on {n}": 1e3 * min(t) for (v, n), t in spent.items()},
    }


def _deviation(times: list[float]) -> float:
    middle = statistics.median(times)
    return statistics.median(abs(t - middle) for t in times)


def main() -> None:
    from cptool.bench.timing import circumstances
    from cptool.distributed.launch import run
    from cptool.distributed.options import RankOptions
    from cptool.planning.profiles import load_profile

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cp", type=int, action="append")
    parser.add_argument("--new", type=int, action="append", help=f"T; default {NEW}")
    parser.add_argument("--cached", type=int, action="append", help=f"P; default {CACHED}")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="at least, a cell")
    parser.add_argument("--merge", type=Path, action="append", default=[])
    parser.add_argument("--output", type=Path, default=RESULTS / "auto_regret.json")
    arguments = parser.parse_args()
    news, cacheds = arguments.new or NEW, arguments.cached or CACHED
    grid = [(new, cached) for cached in cacheds for new in news]
    runs, cells = [], {}
    for path in arguments.merge:
        earlier = json.loads(path.read_text())
        runs += earlier["runs"]
        cells |= {(c["ranks"], c["new"], c["cached"]): c for c in earlier["cells"]}
    for ranks in arguments.cp or ([] if arguments.merge else [2, 4]):
        for c in run(
            measure,
            arguments.dtype,
            arguments.repeats,
            arguments.seconds,
            grid,
            ranks=RankOptions(cp=ranks, device="cpu"),
        ):
            cells[c["ranks"], c["new"], c["cached"]] = c
            print(
                f"N={ranks} T={c['new']:5} P={c['cached']:5}  picked {c['picked'][0]} on "
                f"{c['picked'][1]}, best {c['best'][0]} on {c['best'][1]}, regret "
                f"{c['regret']:.1%} (spread {c['spread']:.1%}{', a tie' * c['tie']}), "
                f"{c['rounds']} rounds",
                flush=True,
            )
    regrets = [c["regret"] for c in cells.values()]
    clear = [0.0 if c["tie"] else c["regret"] for c in cells.values()]
    summary = {
        "cells": len(regrets),
        "median": statistics.median(regrets),
        "worst": max(regrets),
        "worst_beyond_spread": max(clear),
        "cells_over_10_percent": sum(r > 0.1 for r in regrets),
        "cells_over_10_percent_beyond_spread": sum(r > 0.1 for r in clear),
    }
    print(summary)
    if arguments.cp or not arguments.merge:
        runs.append({**circumstances(), "profile": dataclasses.asdict(load_profile("cpu"))})
    result = {"regret": summary, "runs": runs, "cells": [cells[key] for key in sorted(cells)]}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
