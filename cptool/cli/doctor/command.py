"""`cptool doctor`: what was built, what the machine offers, and whether the kernels are right."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from cptool.cli import draw, verbosity
from cptool.cli.draw import Rows
from cptool.cli.figures.tables import wide_option
from cptool.cli.json_output import print_object
from cptool.cli.options.common import json_option
from cptool.cli.options.examples import examples

if TYPE_CHECKING:
    from cptool.exactness.selftest import Check

_WRONG = "WRONG"


@dataclass(frozen=True, kw_only=True)
class Result:
    """What testing one kernel gave; `fault` where its process broke.

    group: the kernel, or what else is tested together.
    """

    group: str
    device: str
    check: Check | None = None
    fault: str | None = None

    @property
    def passed(self) -> bool:
        return self.check is not None and self.check.passed

    def fields(self) -> dict[str, Any]:
        """Return the fields for --json."""
        check = self.check
        return {
            "name": check.name if check else self.group,
            "device": self.device,
            "error": check.error if check else None,
            "allowed": check.allowed if check else None,
            "fault": self.fault,
            "passed": self.passed,
        }

    def row(self) -> tuple[str, str]:
        """Return the row of the table that has all."""
        verdict = "ok" if self.passed else _WRONG
        if self.check is None:
            return verdict, f"{self.group} on {self.device}: {self.fault}"
        found = f"error {self.check.error:.2e}, allowed {self.check.allowed:.2e}"
        return verdict, f"{self.check.name} on {self.device}: {found}"


@click.command(
    short_help="Show the build and the machine, and test the kernels here.",
    epilog=examples(
        "cptool doctor",
        "cptool doctor -v",
        "cptool doctor --json",
    ),
)
@json_option
@wide_option
def doctor(as_json: bool) -> None:
    """Show the build and the machine, and test all kernels against float64 on this machine.

    Exits with 1 if a kernel is wrong here; of a GPU's, it then names the fastest that is right.
    -v lists every check.
    """
    from cptool.cli.doctor import facts

    found = facts.collect()
    if not as_json:
        draw.table(facts.rows(found))
    results, best = _tested(on_gpu=bool(found["gpus"] or _has_gpu()) and bool(found["cuda_archs"]))
    failed = sum(not result.passed for result in results)
    if as_json:
        print_object({**found, "checks": [r.fields() for r in results], "passed": not failed})
    else:
        draw.table([r.row() for r in results] if verbosity.verbose() else _summary(results))
    if failed:
        draw.say(
            f"cptool doctor: {failed} of {len(results)} checks failed; results on this machine are "
            f"not to be trusted{_remedy(best) if any(r.device == 'cuda' for r in results) else ''}",
            always=True,
        )
        sys.exit(1)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _tested(*, on_gpu: bool) -> tuple[list[Result], str | None]:
    """Test all kernels; return the results, and the fastest one to use on the GPU, if any.

    That one is right, and so are all slower ones, which do what it does not support. Each runs in a
    process of its own, because one that breaks the device would break it for the others. Later runs
    go by the results. A process that does not come to have the device tests nothing: later runs use
    its kernel and faster ones, unless a slower one is wrong.
    """
    import torch

    from cptool.exactness import selftest
    from cptool.ops import trials
    from cptool.ops.kernels import cuda_kernels

    faults: dict[str, str | None] = {}
    started = True
    results = list(_named(selftest.run("cpu"), "cpu"))
    best, sound = None, True
    for kernel in cuda_kernels() if on_gpu else ():
        try:
            of_kernel = list(_named(selftest.run_apart("cuda", kernel), "cuda"))
        except trials.NotStarted as error:
            started, fault = False, f"not tested: {error}"
            of_kernel = [Result(group=kernel, device="cuda", fault=fault)]
        except RuntimeError as error:
            of_kernel = [Result(group=kernel, device="cuda", fault=str(error))]
        results += of_kernel
        if started:
            faults[kernel] = next((r.row()[1] for r in of_kernel if not r.passed), None)
        sound = sound and all(result.passed for result in of_kernel)
        if sound:
            best = kernel
    wrong = any(faults.values())
    if faults and (started or wrong) and torch.cuda.device_count():
        trials.remember(0, faults)
    return results, best if started or wrong else kernel


def _named(checks: Iterator[Check] | list[Check], device: str) -> Iterator[Result]:
    for check in checks:
        yield Result(group=check.name.partition(",")[0], device=device, check=check)


def _summary(results: list[Result]) -> Rows:
    """Return a row for each kernel whose checks passed, and one for each check that did not."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.group, result.device), []).append(result)
    rows = []
    for (group, device), members in groups.items():
        ratios = [r.check.error / r.check.allowed for r in members if r.check and r.passed]
        if ratios:
            count = f"{len(ratios)} checks, " if len(ratios) > 1 else ""
            rows.append(
                ("ok", f"{group} on {device}: {count}error up to {max(ratios):.0%} of the allowed")
            )
        rows += [result.row() for result in members if not result.passed]
    return rows


def _remedy(best: str | None) -> str:
    """Return what to do about wrong kernels of the GPU, of which `best` is the fastest to use."""
    from cptool.ops.kernels import cuda_kernels

    if best is None:
        return "; no kernel is right on the GPU: use --device cpu"
    if best != cuda_kernels()[-1]:
        return (
            f"; the fastest right one on the GPU is {best}, and cptool is limited to it from now "
            f"on, as by CPTOOL_CUDA_KERNEL={best}"
        )
    return ""
