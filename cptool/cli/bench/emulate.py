"""`cptool bench emulate`: one rank of one layer on one device, projected to a whole run."""

import json

import click

from cptool import units
from cptool.cli import draw
from cptool.cli.options import VARIANTS, json_option
from cptool.cli.types import TokenCount
from cptool.errors import UserError
from cptool.units import duration
from cptool.variants import find


@click.command(short_help="One rank of one layer, projected to the whole model.")
@click.option(
    "--shape",
    required=True,
    metavar="NAME",
    help="A shape such as llama3-405b, a config.json, or a model.",
)
@click.option("--cp", type=click.IntRange(min=1), default=1, metavar="N", show_default=True)
@click.option("--tp", type=click.IntRange(min=1), default=1, metavar="M", show_default=True)
@click.option(
    "--context", type=TokenCount(), required=True, help="Tokens in all, such as 128K or 1M."
)
@click.option(
    "--cached", type=TokenCount(0), default=0, metavar="TOKENS", help="Of them, with KV already."
)
@click.option("--variant", type=click.Choice(VARIANTS), default="pass-kv", show_default=True)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto")
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16", "float32"]),
    default="bfloat16",
    show_default=True,
)
@click.option("--fp8", is_flag=True, help="Feed-forward layers in row-wise scaled FP8.")
@click.option(
    "--hardware",
    metavar="NAME|FILE",
    help="Whose links, such as gtt-h100.  [default: measured here, or the device's default]",
)
@click.option("--threads", type=click.IntRange(min=1), metavar="N", help="CPU threads.")
@click.option("--repeats", type=click.IntRange(min=1), default=5, show_default=True)
@json_option
def emulate(
    shape, cp, tp, context, cached, variant, device, dtype, fp8, hardware, threads, repeats, as_json
) -> None:
    """Run one rank of one layer with real kernels, and project the time to the first token.

    Of the CP ranks the one with the most work; its links come from a hardware profile. Attention
    runs over a block of every source's size and positions, linear layers at their width under TP.
    """
    from cptool.checkpoint.shapes import find_shape
    from cptool.distributed import devices, options
    from cptool.model import shares

    if cached >= context:
        raise UserError(f"--cached {cached}: it must be less than --context {context}")
    config = find_shape(shape)
    shares.check(config, tp)
    options.check_threads(threads)
    device = devices.resolve_device(device)

    import torch

    from cptool.emulation.layer import Scenario
    from cptool.emulation.projection import emulate
    from cptool.model.fp8 import check_fp8
    from cptool.planning.profiles import find_profile, load_profile

    if threads:
        torch.set_num_threads(threads)
    scenario = Scenario(
        config,
        cp,
        tp,
        context - cached,
        cached,
        variant,
        getattr(torch, dtype),
        torch.device(device, 0) if device == "cuda" else torch.device(device),
        fp8,
    )
    if fp8:
        check_fp8(scenario.device, scenario.dtype)
    profile = find_profile(hardware) if hardware else load_profile(device)
    result = emulate(scenario, profile, repeats)
    if as_json:
        click.echo(json.dumps(_json(shape, scenario, profile, result)))
    else:
        draw.table(_rows(shape, scenario, profile, result))


def _device_name(device) -> str:
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def _assumptions(scenario, profile, result) -> list[str]:
    """What of the projection nobody measured here."""
    told = [
        f"all {result.layers} layers take what this one took, and all ranks at most what rank "
        f"{result.rank} did",
    ]
    if scenario.cp > 1:
        link = profile.link(scenario.cp * scenario.tp)
        told.append(
            f"links of {profile.name}: {units.size(link.bandwidth)}/s one way, "
            f"{duration(link.latency_s)} a message"
        )
    if scenario.tp > 1:
        link = profile.link(scenario.tp)
        told.append(
            f"two all-reduces a layer in ring form at {units.size(link.bandwidth)}/s, not hidden"
        )
    told.append(
        "feed-forward in row-wise FP8, activations scaled as they come"
        if scenario.fp8
        else f"linear layers in {str(scenario.dtype).removeprefix('torch.')}"
    )
    if scenario.cp > 1 and profile.transfer_steals:
        told.append(f"a transfer takes {profile.transfer_steals:.0%} of its time from compute")
    return told


def _memory(scenario, result) -> dict[str, int]:
    """Bytes that the weights and the KV of a real rank take."""
    from cptool.planning.cost.counts import kv_bytes, matrix_parameters

    config, size = scenario.config, scenario.dtype.itemsize
    ffn = 3 * config.hidden_size * config.intermediate_size * config.num_hidden_layers
    others = matrix_parameters(config) - ffn
    tables = (1 if config.tie_word_embeddings else 2) * config.vocab_size * config.hidden_size
    weights = (others * size + ffn * (1 if scenario.fp8 else size)) // scenario.tp + tables * size
    heads = config.num_key_value_heads
    return {
        "weights": weights,
        "kv": kv_bytes(config, result.keys, size) * scenario.kv_heads // heads,
    }


def _json(shape, scenario, profile, result) -> dict:
    config = scenario.config
    return {
        "shape": shape,
        "layers": config.num_hidden_layers,
        "cp": scenario.cp,
        "tp": scenario.tp,
        "tokens": scenario.new,
        "cached": scenario.cached,
        "variant": result.variant,
        "reason": result.reason,
        "device": str(scenario.device),
        "device_name": _device_name(scenario.device),
        "dtype": str(scenario.dtype).removeprefix("torch."),
        "fp8_feed_forward": scenario.fp8,
        "hardware": profile.name,
        "rank": result.rank,
        "queries": result.queries,
        "keys": result.keys,
        "layer": {
            "parts": [
                {
                    "name": part.name,
                    "seconds": part.seconds,
                    "fastest_s": part.fastest_s,
                    "slowest_s": part.slowest_s,
                    "flops": part.flops,
                    "tflops": _rate(part.flops, part.seconds),
                }
                for part in result.parts
            ],
            "attention": [
                {
                    "source": segment.source,
                    "pairs": segment.pairs,
                    "seconds": segment.seconds,
                    "tflops": _rate(_flops(scenario, segment.pairs), segment.seconds),
                }
                for segment in result.segments
            ],
            "compute_s": result.compute_s,
            "wire_bytes": result.sent_bytes,
            "transfer_s": result.transfer_s,
            "exposed_s": result.exposed_s,
            "waiting_s": result.waiting_s,
            "allreduce_bytes": result.allreduce_bytes,
            "allreduce_s": result.allreduce_s,
            "seconds": result.layer_s,
        },
        "once_s": result.once,
        "ttft_s": result.ttft_s,
        "planned_ttft_s": result.planned_s,
        "flops": result.flops,
        "tflops_per_rank": result.flops_per_rank / 1e12,
        "memory_bytes_per_rank": _memory(scenario, result),
        "emulated_bytes": result.emulated_bytes,
        "assumptions": _assumptions(scenario, profile, result),
    }


def _flops(scenario, pairs: int) -> int:
    return 4 * scenario.heads * scenario.config.head_dim * pairs


def _rate(flops: float, seconds: float) -> float | None:
    return flops / seconds / 1e12 if flops and seconds else None


def _rows(shape, scenario, profile, result) -> list[tuple[str, str]]:
    total = scenario.new + scenario.cached
    rows = [
        (
            "model",
            f"{shape}, {total:,} tokens"
            + (f", {scenario.cached:,} of them cached" if scenario.cached else "")
            + f", {scenario.cp} cp x {scenario.tp} tp",
        ),
        ("device", f"{_device_name(scenario.device)}, as rank {result.rank} of the cp ranks"),
        ("variant", f"{result.variant} ({result.reason})"),
        ("holds", f"{result.queries:,} queries, {result.keys:,} keys of {scenario.kv_heads} heads"),
    ]
    for part in result.parts:
        rate = _rate(part.flops, part.seconds)
        rows.append(
            (
                part.name.partition(",")[0] if part.flops else "other",
                f"{duration(part.seconds)} ({duration(part.fastest_s)} to "
                f"{duration(part.slowest_s)})"
                + (f", {rate:.4g} TFLOP/s" if rate else f": {part.name}"),
            )
        )
    ring = [segment for segment in result.segments if segment.source is not None]
    if len(ring) > 1:
        slow, fast = (
            pick(ring, key=lambda s: s.pairs / s.seconds if s.seconds else 0.0)
            for pick in (min, max)
        )
        rows.append(
            (
                "ring steps",
                f"{len(ring)}, "
                + ", ".join(
                    f"{word} {duration(s.seconds)} over source {s.source}'s "
                    f"{'keys' if find(result.variant).keys_travel else 'queries'} "
                    f"({_rate(_flops(scenario, s.pairs), s.seconds) or 0:.4g} TFLOP/s)"
                    for word, s in (("slowest rate", slow), ("fastest", fast))
                ),
            )
        )
    if scenario.cp > 1:
        rows.append(
            (
                "exchange",
                f"{units.size(result.sent_bytes)} sent, {duration(result.transfer_s)}, of which "
                f"{duration(result.exposed_s)} exposed; ranks wait for each other "
                f"{duration(result.waiting_s)}",
            )
        )
    if scenario.tp > 1:
        rows.append(
            (
                "all-reduce",
                f"{units.size(result.allreduce_bytes)}, {duration(result.allreduce_s)}",
            )
        )
    memory = _memory(scenario, result)
    rows += [
        ("a layer", duration(result.layer_s)),
        ("once", ", ".join(f"{n} {duration(s)}" for n, s in result.once.items())),
        (
            "first token",
            f"{duration(result.ttft_s)} projected for {result.layers} layers, "
            f"{result.flops_per_rank / 1e12:.4g} TFLOP/s a rank; cptool plan predicts "
            f"{duration(result.planned_s)} on {profile.name}",
        ),
        (
            "memory",
            f"a rank holds {units.size(memory['weights'])} of weights and "
            f"{units.size(memory['kv'])} of KV",
        ),
        ("assumed", "; ".join(_assumptions(scenario, profile, result))),
    ]
    return rows
