"""What `cptool plan` looks for: the best layout of a workload on some hardware."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from cptool.errors import UserError
from cptool.planning import planner
from cptool.planning.hardware import HardwareProfile
from cptool.planning.planner import Answer, Plan, Workload


@dataclass(frozen=True, kw_only=True)
class Search:
    """A workload, its hardware, and the layouts to consider.

    cp, tp: fixed numbers of ranks, None for any. ranks: the most ranks to use. model: as the user
    named it.
    """

    model: str
    work: Workload
    profile: HardwareProfile
    cp: int | None
    tp: int | None
    variant: str
    ranks: int

    def plan(
        self, cp: int, tp: int, *, work: Workload | None = None, variant: str | None = None
    ) -> Plan:
        """Return the plan of one layout, for another workload or variant if they are given."""
        return planner.plan(
            work or self.work,
            cp,
            tp,
            variant=variant or self.variant,
            profile=self.profile,
        )

    def seconds(
        self, cp: int, tp: int, *, work: Workload | None = None, variant: str | None = None
    ) -> float | None:
        """Return the time to the first token, None where the memory of a rank is too small."""
        found = self.plan(cp, tp, work=work, variant=variant)
        return None if found.excess_bytes else found.ttft.seconds

    def cp_counts(self, tp: int) -> list[int]:
        """Return the numbers of CP ranks that there is room for, whatever was fixed."""
        return [cp for cp, _ in planner.layouts(self.work.config, None, tp, self.ranks)]

    def tensor_parallel(self) -> int:
        """Return the fixed number of TP ranks, else that of the fastest layout."""
        return self.tp or planner.best(self._plans(None)).best.tp

    def answer(self, ttft_below: float | None) -> Answer:
        """Return the best layout, and why the others are not; UserError where none fits."""
        plans = list(self._plans(self.tp))
        fixed = {name: n for name, n in (("cp", self.cp), ("tp", self.tp)) if n}
        if not plans:
            given = " ".join(f"`{name}` {n}" for name, n in fixed.items())
            raise UserError(
                f"`max_gpus` {self.ranks}: no layout with {given} has so few ranks; raise it"
            )
        fp8_helps = self.work.feed_forward is None and "float8" in self.profile.linear_flops
        return planner.best(plans, ttft_below, list(fixed), fp8_helps)

    def fits_in_fp8_alone(self) -> bool:
        """Return whether no layout fits as the work is, and one does with its feed-forward layers
        in FP8.
        """
        if self.work.feed_forward is not None or "float8" not in self.profile.linear_flops:
            return False
        if not all(plan.excess_bytes for plan in self._plans(self.tp)):
            return False
        narrow = dataclasses.replace(self, work=self.with_work(feed_forward="float8"))
        return not all(plan.excess_bytes for plan in narrow._plans(narrow.tp))

    def with_work(self, **changes: Any) -> Workload:
        """Return the workload with some fields changed."""
        return dataclasses.replace(self.work, **changes)

    def _plans(self, tp: int | None) -> Iterable[Plan]:
        layouts = planner.layouts(self.work.config, self.cp, tp, self.ranks)
        return (self.plan(c, t) for c, t in layouts)
