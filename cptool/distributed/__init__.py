"""Worlds of ranks. `run` is for programs of users; cptool's own commands call `launch.run`."""

from collections.abc import Callable
from typing import Any


def run(entry: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Call entry(world, *args) on every rank and return what rank 0 returned.

    options: fields of `cptool.distributed.options.RankOptions`, such as cp=2 and device="cpu". The
    contract and the errors are those of `cptool.distributed.launch.run`.
    """
    from cptool.distributed.launch import run
    from cptool.distributed.options import RankOptions

    return run(entry, *args, ranks=RankOptions(**options))
