"""Options that several subcommands share; a group of them reaches a command as one object."""

from __future__ import annotations

import dataclasses
import functools
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cptool import units, variants
from cptool.distributed.options import DEFAULT_TIMEOUT_S, RankOptions
from cptool.engine.options import EngineOptions
from cptool.errors import OptionError, UserError

if TYPE_CHECKING:
    from cptool.checkpoint import Checkpoint
    from cptool.engine.sampling import Sampling
    from cptool.model.config import LlamaConfig
    from cptool.session.manifest import Manifest

VARIANTS = ("auto", *variants.names(baselines=True))
PARTIALS = ("float32", "working")
DTYPES = ("auto", "float32", "bfloat16", "float16")

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def stack(decorators: Sequence[Decorator]) -> Decorator:
    """Combine decorators into one, in the order in which help lists their options."""

    def apply(command: Callable[..., Any]) -> Callable[..., Any]:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return apply


def as_object(name: str, record: type, options: Sequence[Decorator]) -> Decorator:
    """Give a command `options`, whose values it receives as one `record` in the argument `name`.

    Each option's parameter is a field of the dataclass `record`; fields without an option here keep
    their default.
    """
    fields = [field.name for field in dataclasses.fields(record)]

    def apply(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def call(**values: Any) -> Any:
            given = {field: values.pop(field) for field in fields if field in values}
            return command(**values, **{name: record(**given)})

        return stack(options)(call)

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
    help="CPU threads per rank.  [default: the cores divided among the ranks]",
)
timeout_option = click.option(
    "--timeout",
    type=click.FloatRange(min=1),
    default=DEFAULT_TIMEOUT_S,
    metavar="S",
    help="Seconds to wait for another rank.  [default: 300]",
)
dtype_option = click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    default="auto",
    help="Compute and cache in this type.  [default: auto, the checkpoint's own; float32 on a "
    "CPU that is slow in it]",
)
moved_option = click.option("--model", help="Where the session's model is now, if it moved.")
profile_option = click.option(
    "--profile",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="Report where the time went, and trace all ranks to this file, for ui.perfetto.dev.",
)
json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print exactly one JSON object on standard output."
)


@dataclass(frozen=True, kw_only=True)
class RankRequest:
    """The ranks that the user requested; `cp` and `tp` are None where that is left to cptool."""

    cp: int | None = None
    tp: int | None = None
    device: str = "auto"
    threads: int | None = None
    timeout: float = DEFAULT_TIMEOUT_S

    def resolve(self, config: LlamaConfig) -> RankOptions:
        """Check the request against the launcher, the model and the machine.

        Without `cp`, one context-parallel rank, or what the launcher's processes make.
        """
        from cptool.distributed import devices
        from cptool.distributed.environment import launched
        from cptool.model import shares

        seat, tp, cp = launched(), self.tp or 1, self.cp
        if cp is None:
            cp = 1 if seat is None else max(1, seat.size // tp)
        shares.check(config, tp)
        ranks = RankOptions(cp=cp, tp=tp, threads=self.threads, timeout=self.timeout)
        ranks.check()
        device = devices.resolve_device(self.device, seat.local_size if seat else ranks.count)
        return dataclasses.replace(ranks, device=device)

    def or_as_last(self, manifest: Manifest) -> RankRequest:
        """Return the request with the numbers of the session's last turn, unless the user or a
        launcher gave one.
        """
        from cptool.distributed.environment import launched_size

        if self.cp is not None or launched_size() is not None:
            return self
        tp = manifest.tp if self.tp is None else self.tp
        return dataclasses.replace(self, cp=manifest.cp, tp=tp)


def ranks_by_default(cp: str, tp: str = "1") -> Decorator:
    """Return a decorator with the options of a RankRequest, the argument `ranks`.

    cp, tp: the defaults, as help states them.
    """
    return as_object(
        "ranks",
        RankRequest,
        [
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
            device_option,
            threads_option,
            timeout_option,
        ],
    )


attention_options = as_object(
    "attention",
    EngineOptions,
    [
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
            help="Where queries travel, return partial outputs in float32, or in the working "
            "dtype: fewer bytes, one more rounding.  [default: float32]",
        ),
    ],
)


@dataclass(frozen=True, kw_only=True)
class SamplingRequest:
    """The sampling that the user requested; None where that is left to the model's author."""

    temperature: float | None = None
    top_p: float | None = None
    seed: int = 0

    def resolve(self, checkpoint: Checkpoint) -> Sampling:
        """Return the sampling; the author's temperature and top-p count where none was given.

        Greedy where the author gives no temperature either. Raises UserError for a value out of
        range.
        """
        from cptool.engine.sampling import resolve

        return resolve(checkpoint.sampling, self.temperature, self.top_p, seed=self.seed)

    def describe(self, sampling: Sampling) -> str:
        """Return one line with the values of `sampling`, the result of `resolve`, and who chose."""
        if not sampling.temperature:
            return "greedy"
        line = f"temperature {sampling.temperature:g}, top-p {sampling.top_p:g}"
        if self.temperature is None:
            line += " (the model author's; --temperature 0 is greedy)"
        return line


sampling_options = as_object(
    "sampler",
    SamplingRequest,
    [
        click.option(
            "--temperature",
            type=float,
            help="0 is greedy.  [default: the model author's, else 0]",
        ),
        click.option(
            "--top-p",
            type=float,
            help="Draw from the likeliest tokens of this mass.  [default: the model author's, else "
            "1]",
        ),
        click.option("--seed", type=int, default=0, help="Seed of the draws.  [default: 0]"),
    ],
)


def check_room(
    directory: Path, config: LlamaConfig, *, tokens: int, batch: int, dtype: str
) -> None:
    """Raise UserError for a disk without room for the KV of `tokens` more tokens of a batch, and
    the logits after them.
    """
    from cptool.planning.cost.counts import kv_bytes
    from cptool.planning.cost.forward import ELEMENT_BYTES

    needed = kv_bytes(config, tokens, ELEMENT_BYTES[dtype]) + 4 * config.vocab_size * batch
    place = next(p for p in (directory, *directory.absolute().parents) if p.is_dir())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UserError(
            f"{directory} has {units.size(free)} free, the KV of {tokens:,} tokens needs "
            f"{units.size(needed)}; make room, or name another directory"
        )


def check_profile(profile: str | None) -> None:
    """Raise UserError, before the run, for a trace file that could not be written."""
    if profile is None:
        return
    path = Path(profile).absolute()
    if not path.parent.is_dir():
        parent = Path(profile).parent
        raise OptionError("profile", profile, f"{parent} is not a directory", "create it first")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise OptionError("profile", profile, "it cannot be written", "name another file")
