"""Single options that several subcommands share."""

from __future__ import annotations

import os
from pathlib import Path

import click

from cptool.cli.options import completion
from cptool.cli.options.types import Bytes, Chunk
from cptool.cli.options.variables import VariableOption
from cptool.distributed.options import DEFAULT_TIMEOUT_S
from cptool.errors import OptionError
from cptool.quantisation import AUTO, WEIGHTS

DTYPES = ("auto", "float32", "bfloat16", "float16")


device_option = click.option(
    "--device",
    cls=VariableOption,
    envvar="CPTOOL_DEVICE",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    help="Where to run.  [default: auto]",
)


threads_option = click.option(
    "--threads",
    cls=VariableOption,
    envvar="CPTOOL_THREADS",
    type=click.IntRange(min=1),
    metavar="N",
    help="CPU threads per rank.  [default: the cores divided among the ranks]",
)


timeout_option = click.option(
    "--timeout",
    cls=VariableOption,
    envvar="CPTOOL_TIMEOUT",
    type=click.FloatRange(min=1),
    default=DEFAULT_TIMEOUT_S,
    metavar="S",
    help="Seconds to wait for another rank.  [default: 300]",
)


dtype_option = click.option(
    "--dtype",
    cls=VariableOption,
    envvar="CPTOOL_DTYPE",
    type=click.Choice(DTYPES),
    default="auto",
    help="Compute in this type.  [default: auto, the checkpoint's own; float32 on a CPU that is "
    "slow in it]",
)


weights_option = click.option(
    "--weights",
    cls=VariableOption,
    envvar="CPTOOL_WEIGHTS",
    type=click.Choice((*WEIGHTS, AUTO)),
    help="Keep weights as the file stores them, or quantise float matrices while loading to int8 "
    "with a scale for each 32 weights (q8_0) or each row (int8): fewer bytes for a CPU to read, "
    "and other results. auto: q8_0 for the matrices whose products it makes faster here, by "
    "measuring. fp8-ffn: feed-forward layers in FP8, their activations too, with a scale for each "
    "row; slow but on CUDA devices of compute capability 8.9 or later.  [default: file, or what "
    "the session was computed with]",
)


kv_dtype_option = click.option(
    "--kv-dtype",
    cls=VariableOption,
    envvar="CPTOOL_KV_DTYPE",
    type=click.Choice(DTYPES),
    default="auto",
    help="Store and send keys and values in this type, rounded once; products are computed in the "
    "type of --dtype. A CPU that computes in float32 takes any, others that of --dtype alone.  "
    "[default: auto, that of --dtype, or of the session]",
)


chunk_option = click.option(
    "--chunk",
    type=Chunk(),
    metavar="N",
    help="Read a prompt in chunks of N tokens, over all prompts of a batch together: memory for a "
    "chunk instead of the whole, and the same tokens.  [default: auto, the largest that fits in "
    "memory and adds little to that of weights and KV; with a session, that takes no longer than "
    "--save-every]",
)


memory_option = click.option(
    "--memory",
    type=Bytes(),
    metavar="SIZE",
    help="Let --chunk auto use up to so much memory per rank in all, such as 4G.  [default: its "
    "part of what the machine or control group has left, or the GPU]",
)


kv_memory_option = click.option(
    "--kv-memory",
    cls=VariableOption,
    envvar="CPTOOL_KV_MEMORY",
    type=Bytes(),
    metavar="SIZE",
    help="Keep at most so much of each rank's KV in memory, such as 4G, and the rest in a file in "
    "the temporary directory (TMPDIR), read ahead of its use: each further token takes the time of "
    "reading that file.  [default: all in memory]",
)


moved_option = click.option(
    "--model",
    shell_complete=completion.models,
    help="Where the session's model is now, if it moved.",
)


profile_option = click.option(
    "--profile",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="Report where the time went, and trace all ranks to this file, for ui.perfetto.dev.",
)


json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print exactly one JSON object on standard output."
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
