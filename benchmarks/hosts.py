"""Ranks on two hosts over links of several rates: what overlap hides, and what `auto` makes of it.

    python benchmarks/hosts.py --rate none --rate 1gbit --miss-rate 1
    python benchmarks/hosts.py --rate 100mbit --rate 1gbit --rate 10gbit --miss-rate 0.1

The hosts are network namespaces of this machine (namespaces.py), one rank in each, on a core and a
thread of its own. Each rank limits its own interface, so the rates take turns in every round, as
the variants do. For each rate the hardware is calibrated first, in this run and over that link:
`auto` chooses by what it sees. The limit that held is what a plain TCP stream measured.

The model is one layer of random weights; all layers are alike.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported

import checkout  # noqa: F401
import click
import namespaces

from cptool.model.shapes import llama_config
from cptool.variants import names

SIZES = (1 << 10, 1 << 20, 8 << 20)


def on_rank(world, plan: dict) -> dict[str, object]:
    import torch

    from cptool.bench import link
    from cptool.bench.timing import summary
    from cptool.calibration import measure as calibrate
    from cptool.calibration.rig import hold, predicted_s, random_model
    from cptool.engine.engine import Engine
    from cptool.planning.cost.forward import Forward
    from cptool.planning.cost.layer import predict
    from cptool.planning.strategy import choose

    heads, kv_heads, head_dim = plan["heads"]
    width, dtype = heads * head_dim, plan["dtype"]
    shape = llama_config(
        hidden=width,
        layers=1,
        heads=heads,
        kv_heads=kv_heads,
        ffn=3 * width,
        vocab_size=1024,
        head_dim=head_dim,
        max_position_embeddings=1 << 20,
        tie_word_embeddings=True,
    )
    model = random_model(shape, getattr(torch, dtype), world)
    rates = {rate: None if rate == "none" else rate for rate in plan["rates"]}
    profiles, links = {}, {}
    for name, rate in rates.items():
        namespaces.limit(rate)
        profiles[name] = calibrate(world, (dtype,))
        links[name] = link.measure(world, list(SIZES), list(link.PATTERNS), 3, overlap=True)
    cells = []
    for miss in plan["miss_rates"]:
        new = max(1, round(miss * plan["context"]))
        cached = plan["context"] - new
        engine = Engine(model, world, profile=profiles[next(iter(rates))])
        hold(engine, cached)
        seconds: dict[tuple[str, str], list[float]] = {}
        exposed: dict[tuple[str, str], list[float]] = {}
        for repeat in range(plan["repeats"] + 1):
            for name, rate in rates.items():
                world.barrier()
                namespaces.limit(rate)
                for variant in plan["variants"]:
                    took, blocked = _once(world, engine, variant, new, cached)
                    if repeat:
                        seconds.setdefault((name, variant), []).append(took)
                        exposed.setdefault((name, variant), []).append(blocked)
        for name in rates:
            profile = profiles[name]
            forward = Forward(
                config=shape, dtype=dtype, new=new, cached=cached, ranks=world.cp, active=world.cp
            )
            auto = choose("auto", forward, profile)
            medians = {v: summary(seconds[name, v])["median"] for v in plan["variants"]}
            best = min(medians, key=medians.get)
            cell = {
                "rate": name,
                "new": new,
                "cached": cached,
                "miss_rate": new / (new + cached),
                "variants": {},
                "best": best,
                "auto": auto.variant,
                "auto_active": auto.active,
                "reason": auto.reason,
                "regret": medians[auto.variant] / medians[best] - 1
                if auto.active == world.cp and auto.variant in medians
                else None,
            }
            for variant in plan["variants"]:
                layer = predict(variant, forward, profile)
                cell["variants"][variant] = {
                    "ttft_seconds": summary(seconds[name, variant]),
                    "exposed_seconds": summary(exposed[name, variant]),
                    "predicted_s": predicted_s(_as(auto, variant, world.cp), forward, profile),
                    "predicted_exposed_s": layer.exposed_s,
                    "sent_bytes": layer.bytes,
                }
            cells.append(cell)
    namespaces.limit(None)
    base = {
        (c["new"], v): r["ttft_seconds"]["median"]
        for c in cells
        if c["rate"] == "none"
        for v, r in c["variants"].items()
    }
    for cell in cells:
        for variant, result in cell["variants"].items():
            if (cell["new"], variant) in base:
                unlimited = base[cell["new"], variant]
                result["of_unlimited_speed"] = unlimited / result["ttft_seconds"]["median"]
    return {
        "model": asdict(shape),
        "links": links,
        "profiles": {name: asdict(profile) for name, profile in profiles.items()},
        "cells": cells,
    }


def _as(choice, variant: str, ranks: int):
    from dataclasses import replace

    return replace(choice, variant=variant, active=ranks)


def _once(world, engine, variant: str, new: int, cached: int) -> tuple[float, float]:
    """Seconds to the first token on the slowest rank, and the most that one waited; the engine is
    as it was."""
    from cptool.engine.answers.decode import next_tokens
    from cptool.engine.sampling import Sampling

    world.barrier()
    exposed, began = engine.ring.exposed_s, time.perf_counter()
    engine.extend([[1] * (new - 1)], variant=variant)
    next_tokens(engine, Sampling())
    took = time.perf_counter() - began
    exposed = engine.ring.exposed_s - exposed
    engine.truncate([cached + 1])
    return tuple(max(values) for values in zip(*world.gather((took, exposed)), strict=True))


def draw(result: dict[str, object]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=150, highlight=False)
    for name, rows in result["links"].items():
        big = [r for r in rows if r["size"] == max(SIZES)]
        tcp = big[0]["size"] / big[0]["tcp_seconds"]["median"]
        told = ", ".join(f"{r['pattern']} {8 * r['rate'] / 1e9:.3g}" for r in big)
        steals = next((r["steals"] for r in big if "steals" in r), None)
        console.print(
            f"{name}: plain TCP {8 * tcp / 1e9:.3g} Gbit/s each way, {told}; compute loses "
            f"{steals:.0%} of a transfer's time"
        )
    table = Table(box=None, header_style="bold", padding=(0, 1))
    for column in (
        "rate",
        "new",
        "cached",
        "variant",
        "ms (least to most)",
        "predicted",
        "exposed",
        "pred. exposed",
        "of unlimited",
        "",
    ):
        table.add_column(column, justify="right")
    for cell in result["cells"]:
        for variant, r in cell["variants"].items():
            time_ = r["ttft_seconds"]
            marks = ["best"] * (variant == cell["best"])
            if variant == cell["auto"]:
                few = "" if cell["auto_active"] == 2 else f" on {cell['auto_active']}"
                lost = "" if cell["regret"] is None else f", regret {cell['regret']:.1%}"
                marks.append(f"auto{few}{lost}")
            table.add_row(
                cell["rate"],
                f"{cell['new']:,}",
                f"{cell['cached']:,}",
                variant,
                " ".join(f"{1e3 * time_[k]:.4g}" for k in ("median", "min", "max")),
                f"{1e3 * r['predicted_s']:.4g}",
                f"{1e3 * r['exposed_seconds']['median']:.3g}",
                f"{1e3 * r['predicted_exposed_s']:.3g}",
                f"{r['of_unlimited_speed']:.1%}" if "of_unlimited_speed" in r else "",
                ", ".join(marks),
            )
    console.print(table)


@click.command(help=__doc__.partition("\n\n")[0], context_settings={"show_default": True})
@click.option(
    "--rate",
    "rates",
    multiple=True,
    default=("none", "1gbit"),
    help="Of each direction, as tc writes it; none leaves the link unlimited.",
)
@click.option("--context", type=click.IntRange(min=2), default=32768, help="Tokens, T + P.")
@click.option(
    "--miss-rate",
    "miss_rates",
    type=click.FloatRange(0, 1, min_open=True),
    multiple=True,
    default=(1.0,),
    help="T / (T + P).",
)
@click.option("--variant", "variants", type=click.Choice(names()), multiple=True, default=names())
@click.option(
    "--heads",
    nargs=3,
    type=click.IntRange(min=1),
    default=(8, 2, 64),
    metavar="Q KV D",
    help="Query heads, KV heads, their size.",
)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="bfloat16")
@click.option("--repeats", type=click.IntRange(min=1), default=3)
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--on-rank", "plan", hidden=True)
def main(rates, context, miss_rates, variants, heads, dtype, repeats, json_file, plan) -> None:
    from cptool.distributed.launch import run
    from cptool.distributed.options import RankOptions

    if plan is not None:  # in a host
        result = run(on_rank, json.loads(plan), ranks=RankOptions(cp=2, device="cpu", threads=1))
        if os.environ["RANK"] == "0":
            print(json.dumps(result))
        return
    for rate in rates:
        if rate != "none":
            namespaces.bits(rate)
    if reason := namespaces.missing():
        raise click.ClickException(reason)
    from cptool.bench.timing import circumstances

    head = circumstances()
    plan = {
        "rates": rates,
        "context": context,
        "miss_rates": miss_rates,
        "variants": variants,
        "heads": heads,
        "dtype": dtype,
        "repeats": repeats,
    }
    command = [sys.executable, str(Path(__file__).resolve()), "--on-rank", json.dumps(plan)]
    with namespaces.Hosts(2) as hosts:
        told = hosts.run(command, timeout=600)
    result = {**head, "plan": plan, "congestion_control": namespaces.CONGESTION_CONTROL}
    result |= json.loads(told)
    draw(result)
    if json_file:
        json_file.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
