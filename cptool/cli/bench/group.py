"""`cptool bench`: the group of commands that measure the machine."""

import click

from cptool.cli.bench.attention import attention
from cptool.cli.bench.calibrate import calibrate
from cptool.cli.bench.decode import decode
from cptool.cli.bench.emulate import emulate
from cptool.cli.bench.link import link
from cptool.cli.bench.merge import merge
from cptool.cli.bench.prefill import prefill


@click.group()
def bench() -> None:
    """Measure the machine."""


for command in (attention, merge, link, prefill, decode, emulate, calibrate):
    bench.add_command(command)
