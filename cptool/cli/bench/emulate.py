"""`cptool bench emulate`: one rank of one layer on one device, projected to a whole run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from cptool.cli import draw
from cptool.cli.figures.tables import wide_option
from cptool.cli.json_output import print_object
from cptool.cli.options import completion
from cptool.cli.options.common import device_option, json_option, threads_option
from cptool.cli.options.examples import examples
from cptool.cli.options.models import open_shape
from cptool.cli.options.ranks import VARIANT_WORDS, VARIANTS
from cptool.cli.options.records import as_object
from cptool.cli.options.types import TokenCount
from cptool.cli.progress import counted
from cptool.distributed.options import check_threads
from cptool.errors import OptionError
from cptool.model import shares

if TYPE_CHECKING:
    from cptool.emulation.layer import Scenario


@dataclass(frozen=True, kw_only=True)
class EmulationOptions:
    """The run that is emulated, and the device that does it."""

    shape: str
    cp: int
    tp: int
    context: int
    cached: int
    variant: str
    device: str
    dtype: str
    fp8: bool

    def scenario(self) -> Scenario:
        """Check the options and return what to emulate; UserError if it cannot be."""
        from cptool.distributed.devices import resolve_device

        if self.cached >= self.context:
            raise OptionError(
                "cached", self.cached, f"it must be less than `context` {self.context}"
            )
        config = open_shape(self.shape)
        shares.check(config, self.tp)
        device = resolve_device(self.device)

        import torch

        from cptool.emulation.layer import Scenario
        from cptool.ops.fp8 import check_fp8

        scenario = Scenario(
            config=config,
            cp=self.cp,
            tp=self.tp,
            new=self.context - self.cached,
            cached=self.cached,
            variant=self.variant,
            dtype=getattr(torch, self.dtype),
            device=torch.device(device, 0) if device == "cuda" else torch.device(device),
            fp8=self.fp8,
        )
        if scenario.fp8:
            check_fp8(scenario.device, scenario.dtype)
        return scenario


@click.command(
    short_help="One rank of one layer, projected to the whole model.",
    epilog=examples(
        "cptool bench emulate --shape llama3-8b --context 32K --cp 4",
        "cptool bench emulate --shape llama3-405b --context 1M --cp 128 --tp 8",
    ),
)
@as_object(
    "asked",
    EmulationOptions,
    [
        click.option(
            "--shape",
            shell_complete=completion.shapes,
            required=True,
            metavar="NAME",
            help="A shape such as llama3-405b, a config.json, or a model.",
        ),
        click.option(
            "--cp",
            type=click.IntRange(min=1),
            default=1,
            metavar="N",
            show_default=True,
            help="Context-parallel ranks of the run, of which one is emulated.",
        ),
        click.option(
            "--tp",
            type=click.IntRange(min=1),
            default=1,
            metavar="M",
            show_default=True,
            help="Tensor-parallel ranks for each context-parallel one.",
        ),
        click.option(
            "--context", type=TokenCount(), required=True, help="Tokens in all, such as 128K or 1M."
        ),
        click.option(
            "--cached",
            type=TokenCount(0),
            default=0,
            metavar="TOKENS",
            help="Tokens of the context whose KV is cached already.",
        ),
        click.option(
            "--variant",
            type=click.Choice(VARIANTS),
            default="pass-kv",
            show_default=True,
            help=VARIANT_WORDS,
        ),
        device_option,
        click.option(
            "--dtype",
            type=click.Choice(["bfloat16", "float16", "float32"]),
            default="bfloat16",
            show_default=True,
            help="Type of weights, KV and products.",
        ),
        click.option("--fp8", is_flag=True, help="Feed-forward layers in row-wise scaled FP8."),
    ],
)
@click.option(
    "--hardware",
    shell_complete=completion.hardware,
    metavar="NAME|FILE",
    help="Profile whose links are taken, such as gtt-h100.  [default: "
    "measured here, or the device's default]",
)
@threads_option
@click.option(
    "--repeats",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    help="Passes over the layer; one more warms up.",
)
@json_option
@wide_option
def emulate(
    asked: EmulationOptions,
    hardware: str | None,
    threads: int | None,
    repeats: int,
    as_json: bool,
) -> None:
    """Run one rank of one layer with real kernels, and project the time to the first token.

    The rank is the CP rank with the most work; its links come from a hardware profile. Attention
    runs over a block of every source's size and positions, linear layers at their width under TP.
    """
    from cptool.engine.world_profile import machine_profile
    from cptool.planning.profiles import find_profile

    check_threads(threads)
    scenario = asked.scenario()

    import torch

    from cptool.cli.bench import emulation_report
    from cptool.emulation.projection import emulate as project

    if threads:
        torch.set_num_threads(threads)
    profile = find_profile(hardware) if hardware else machine_profile(scenario.device.type)
    passes = repeats + 1  # the first one warms up
    with counted("emulate, pass", passes) as show:
        result = project(scenario, profile, repeats, lambda done, _: show(done))
    report = emulation_report.Report(
        shape=asked.shape, scenario=scenario, profile=profile, result=result
    )
    if as_json:
        print_object(report.fields())
    else:
        draw.table(report.rows())
