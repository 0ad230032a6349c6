"""Options that several subcommands share, and what they mean."""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cptool import units, variants
from cptool.distributed.options import RankOptions
from cptool.errors import UserError
from cptool.host.processor import has_bfloat16_products

if TYPE_CHECKING:
    from cptool.checkpoint import Checkpoint
    from cptool.model.config import LlamaConfig

VARIANTS = ("auto", *variants.names(baselines=True))
PARTIALS = ("float32", "working")
DTYPES = ("auto", "float32", "bfloat16", "float16")


def stack(*decorators: Callable) -> Callable:
    """One decorator of several, in the order in which help lists their options."""

    def apply(command: Callable) -> Callable:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return apply


device_option = click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    help="Where to run.  [default: auto]",
)
threads_option = click.option(
    "--threads",
    type=click.IntRange(min=1),
    metavar="N",
    help="CPU threads a rank.  [default: the cores, shared out]",
)
timeout_option = click.option(
    "--timeout",
    type=click.FloatRange(min=1),
    default=300.0,
    metavar="S",
    help="Seconds to wait for another rank.  [default: 300]",
)


def ranks_by_default(cp: str, tp: str = "1") -> Callable:
    """`--cp` and `--tp` of a command, and what they are where they are not given."""
    return stack(
        click.option(
            "--cp",
            type=click.IntRange(min=1),
            metavar="N",
            help=f"Context-parallel ranks.  [default: {cp}]",
        ),
        click.option(
            "--tp",
            type=click.IntRange(min=1),
            metavar="M",
            help=f"Tensor-parallel ranks for each of them.  [default: {tp}]",
        ),
    )


run_options = stack(
    device_option,
    click.option(
        "--variant",
        type=click.Choice(VARIANTS),
        default="auto",
        help="How attention crosses ranks.  [default: auto]",
    ),
    click.option(
        "--partials",
        type=click.Choice(PARTIALS),
        default="float32",
        help="Where queries travel, send partial outputs back in float32, or in the working dtype: "
        "fewer bytes, one more rounding.  [default: float32]",
    ),
    threads_option,
    timeout_option,
)
rank_options = stack(ranks_by_default("1, or what the launcher started"), run_options)

dtype_option = click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    default="auto",
    help="Compute and cache in this type.  [default: auto, the checkpoint's own; float32 on a "
    "CPU that is not fast in it]",
)
sampling_options = stack(
    click.option("--temperature", type=float, default=0.0, help="0 is greedy.  [default: 0]"),
    click.option(
        "--top-p",
        type=float,
        default=1.0,
        help="Draw from the likeliest tokens of this mass.  [default: 1]",
    ),
    click.option("--seed", type=int, default=0, help="Of the draws.  [default: 0]"),
)
moved_option = click.option("--model", help="Where the session's model is now, if it moved.")
profile_option = click.option(
    "--profile",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="Tell where the time went, and trace all ranks to this file, for ui.perfetto.dev.",
)
json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print exactly one JSON object on standard output."
)


def check_room(directory: Path, config: "LlamaConfig", tokens: int, batch: int, dtype: str) -> None:
    """Refuses a disk without room for the KV of `tokens` more tokens and the logits after them."""
    from cptool.planning.cost.counts import kv_bytes
    from cptool.planning.cost.forward import ELEMENT_BYTES

    needed = kv_bytes(config, tokens, ELEMENT_BYTES[dtype]) + 4 * config.vocab_size * batch
    place = next(p for p in (directory, *directory.absolute().parents) if p.is_dir())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UserError(
            f"{directory} has {units.size(free)} free, the KV of {tokens:,} tokens needs "
            f"{units.size(needed)}; make room, or name another place"
        )


def check_profile(profile: str | None) -> None:
    """Refuses a file for the trace that could not be written to, before the run."""
    if profile is None:
        return
    path = Path(profile).absolute()
    if not path.parent.is_dir():
        raise UserError(
            f"--profile {profile}: {Path(profile).parent} is no directory; make it first"
        )
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"--profile {profile}: it cannot be written; name another place")


def resolve_ranks(
    *,
    cp: int | None,
    tp: int | None,
    device: str,
    threads: int | None,
    timeout: float,
    config: "LlamaConfig",
) -> RankOptions:
    """Checks the ranks asked for against the launcher, the model and the machine."""
    from cptool.distributed import devices
    from cptool.distributed.environment import launched
    from cptool.model import shares

    seat, tp = launched(), tp or 1
    if cp is None:
        cp = 1 if seat is None else max(1, seat.size // tp)
    shares.check(config, tp)
    ranks = RankOptions(cp=cp, tp=tp, device=device, threads=threads, timeout=timeout)
    ranks.check()
    local = seat.local_size if seat else ranks.count
    return replace(ranks, device=devices.resolve_device(device, local))


def resolve_dtype(asked: str, checkpoint: "Checkpoint", device: str) -> str:
    """The type to compute in; `auto` is the checkpoint's own where `device` is fast in it.

    No processor that cptool knows is fast in float16, and those without bfloat16 products take
    several times as long in bfloat16 as in float32, which loses nothing.
    """
    if asked != "auto":
        return asked
    own = checkpoint.matrix_dtype or "float32"
    if device != "cpu":
        return own
    return own if own == "bfloat16" and has_bfloat16_products() else "float32"
