"""The options that say on which ranks a command runs, and how attention crosses them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from cptool import variants
from cptool.cli.options.common import (
    chunk_option,
    device_option,
    kv_dtype_option,
    kv_memory_option,
    threads_option,
    timeout_option,
    weights_option,
)
from cptool.cli.options.records import Decorator, as_object
from cptool.cli.options.variables import VariableOption
from cptool.distributed.options import DEFAULT_TIMEOUT_S, RankOptions
from cptool.engine.options import EngineOptions

if TYPE_CHECKING:
    from cptool.model.config import LlamaConfig
    from cptool.session.manifest import Manifest


VARIANTS = ("auto", *variants.names(baselines=True))


VARIANT_WORDS = (
    "How attention crosses ranks: keys and values travel, or queries do and partial results "
    "return; pass- is block by block around a ring, gather- is all at once; auto takes what is "
    "predicted to be fastest."
)
"""The help of --variant where no other sentence says it."""

PARTIALS = ("float32", "working")


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
                cls=VariableOption,
                envvar="CPTOOL_CP",
                type=click.IntRange(min=1),
                metavar="N",
                help=f"Context-parallel ranks, among which the tokens and their KV are divided.  "
                f"[default: {cp}]",
            ),
            click.option(
                "--tp",
                cls=VariableOption,
                envvar="CPTOOL_TP",
                type=click.IntRange(min=1),
                metavar="M",
                help=f"Tensor-parallel ranks for each of them, among which its layers' weights are "
                f"divided.  [default: {tp}]",
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
            cls=VariableOption,
            envvar="CPTOOL_VARIANT",
            type=click.Choice(VARIANTS),
            default="auto",
            help=f"{VARIANT_WORDS}  [default: auto]",
        ),
        click.option(
            "--partials",
            type=click.Choice(PARTIALS),
            default="float32",
            help="Where queries travel, return partial outputs in float32, or in the working "
            "dtype: fewer bytes, one more rounding.  [default: float32]",
        ),
        kv_dtype_option,
        weights_option,
        chunk_option,
        kv_memory_option,
    ],
)
