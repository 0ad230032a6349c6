"""`cptool bench`: the group of commands that measure the machine."""

import click

from cptool.cli.bench.attention import attention
from cptool.cli.bench.calibrate import calibrate
from cptool.cli.bench.decode import decode
from cptool.cli.bench.emulate import emulate
from cptool.cli.bench.levers import levers
from cptool.cli.bench.link import link
from cptool.cli.bench.merge import merge
from cptool.cli.bench.perplexity import perplexity
from cptool.cli.bench.prefill import prefill
from cptool.cli.options.examples import examples


@click.group(
    short_help="Measure the machine, or a model's levers and perplexity.",
    epilog=examples(
        "cptool bench calibrate",
        "cptool bench prefill llama3-8b --context 4K --cp 1 --cp 2",
        "cptool bench emulate --shape llama3-8b --context 32K --cp 4",
    ),
)
def bench() -> None:
    """Measure the machine (kernels, links, models of random weights), and a model: its levers, its
    perplexity.
    """


for command in (attention, merge, link, prefill, decode, levers, perplexity, emulate, calibrate):
    bench.add_command(command)
