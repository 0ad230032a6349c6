"""Drafting: which tokens a step of decode computes beyond the known one, in the hope that they come
next.

A drafted token counts if it is the one that is chosen at its place, by the same rule, from the same
logits and with the same draw as without drafts; its row of the step has the bits that it would have
alone (`cptool.ops.rows`), and its KV lies where it would lie (`cptool.sharding.dealt`). So drafts
change how long an answer takes, and nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from cptool.engine.answers.records import Drafted
from cptool.engine.drafts.lookup import Lookup
from cptool.engine.drafts.pace import Acceptance, StepTime, worthwhile
from cptool.ops.rows import independent_queries

if TYPE_CHECKING:
    from cptool.engine.engine import Engine

_MOST_TP = 2
"""Ranks whose sums do not depend on a value's place in a message: two terms have one order."""


def most_rows(engine: Engine) -> tuple[int, int]:
    """Return up to how many rows a step may have, and how many of them one sequence or the samples
    of one prompt, so that none of them changes the bits of another.
    """
    model = engine.model
    queries = independent_queries(
        engine.dtype,
        engine.cache.dtype,
        head_dim=model.config.head_dim,
        group=model.num_heads // model.num_kv_heads,
    )
    return model.independent_rows, queries


def why_not(engine: Engine, active: Collection[int]) -> str | None:
    """Return why a batch cannot be drafted for, None if it can."""
    if engine.world.device.type != "cpu" or engine.static:
        return "a step computes each row by itself on CPUs alone, outside static memory"
    if engine.world.tp > _MOST_TP:
        return f"sums over {engine.world.tp} tensor-parallel ranks depend on the rows of a step"
    rows, queries = most_rows(engine)
    if len(active) >= rows:
        return f"{len(active)} sequences leave no row of the {rows} that do not affect each other"
    if engine.samples >= queries:
        return f"{engine.samples} samples leave no query of the {queries} that share a prompt's KV"
    return None


class Drafter:
    """Drafts for the sequences in `active`, looked up in what each has said.

    drafted: what became of them.
    """

    def __init__(self, engine: Engine, asked: str, active: Collection[int]) -> None:
        off = None if asked == "off" else why_not(engine, active)
        self.drafted = Drafted(asked=asked, off=off)
        self.on = asked != "off" and off is None
        self._engine = engine
        self._rows, queries = most_rows(engine) if self.on else (1, 1)
        self._queries = queries // engine.samples
        self._lookups = {b: Lookup(engine.tokens[b]) for b in active} if self.on else {}
        self._times, self._acceptance = StepTime(), Acceptance()
        self._open: dict[int, tuple[int, Iterator[int]]] = {}

    def came(self, b: int, token: int) -> bool:
        """Take note of a token of an answer. Return whether it was drafted: then it is appended,
        and what follows it is known.
        """
        if not self.on:
            return False
        self._lookups[b].push(token)
        kind, following = self._open.get(b, (0, iter(())))
        expected = next(following, None)
        if expected is not None:
            self._acceptance.record(kind, true=token == expected)
            if token != expected:
                del self._open[b]
        accepted = self._engine.accept(b, token)
        self.drafted.accepted += accepted
        return accepted

    @contextmanager
    def step(self, left: Mapping[int, int]) -> Iterator[dict[int, list[int]]]:
        """Give the body the drafts to compute with the next token of each sequence, and measure the
        step that it takes. Collective: what rank 0 measures counts.

        left[b]: tokens that the answer of sequence b may still have.
        """
        drafts = self._drafts(left)
        began = time.perf_counter()
        yield drafts
        spent = time.perf_counter() - began
        self.drafted.steps += 1
        if not self.on:
            return
        count, world = sum(map(len, drafts.values())), self._engine.world
        self.drafted.proposed += count
        if world.size > 1:
            spent = 1e-9 * world.group.sum_of([round(1e9 * spent) if world.rank == 0 else 0])[0]
        self._times.record(len(left) + count, spent)

    def _drafts(self, left: Mapping[int, int]) -> dict[int, list[int]]:
        """Return the tokens to compute beyond the next of each sequence, the same on every rank."""
        if not self.on:
            return {}
        most = min(self._queries, self._rows - len(left) + 1)
        found = {b: self._lookups[b].find(min(most, n - 1)) for b, n in left.items()}
        matches = {b: match for b, match in found.items() if match is not None}
        kinds = {b: self._acceptance.kind(match.length) for b, match in matches.items()}
        counts = worthwhile(
            {b: self._acceptance.chance(kind) for b, kind in kinds.items()},
            {b: min(len(match.tokens), most - 1) for b, match in matches.items()},
            len(left),
            self._times,
            room=self._rows - len(left),
        )
        self._open = {b: (kinds[b], iter(match.tokens)) for b, match in matches.items()}
        return {b: list(matches[b].tokens[:n]) for b, n in counts.items() if n}
