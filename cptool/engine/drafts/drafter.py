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
from cptool.engine.drafts.layers import LayerDrafts
from cptool.engine.drafts.lookup import LookupDrafts
from cptool.engine.drafts.names import layers_of, model_of
from cptool.engine.drafts.pace import Budget, StepTime
from cptool.engine.drafts.small import ModelDrafts, SmallModel
from cptool.engine.drafts.source import Source
from cptool.ops.rows import independent_queries

if TYPE_CHECKING:
    from cptool.engine.answers.records import AnswerOptions
    from cptool.engine.engine import Engine
    from cptool.planning.strategy import Choice

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
    """Drafts for the sequences in `active`, from where `options` requests them.

    variant: the one of the steps. small: the model that drafts, if one does.
    drafted: what became of them.
    """

    def __init__(
        self,
        engine: Engine,
        options: AnswerOptions,
        active: Collection[int],
        *,
        variant: str | Choice,
        small: SmallModel | None = None,
    ) -> None:
        asked = options.draft
        off = None if asked == "off" else why_not(engine, active)
        self.drafted = Drafted(asked=asked, off=off)
        self.on = asked != "off" and off is None
        self._engine = engine
        self._rows, queries = most_rows(engine) if self.on else (1, 1)
        self._queries = queries // engine.samples
        self._times = StepTime()
        self._source: Source | None = None
        if self.on:
            if (layers := layers_of(asked)) is not None:
                self._source = LayerDrafts(engine, options, layers, variant)
            elif model_of(asked) is None:
                self._source = LookupDrafts(engine.tokens, active)
            else:
                assert small is not None  # the caller has loaded it
                self._source = ModelDrafts(engine, options, active, small)

    def came(self, b: int, token: int) -> bool:
        """Take note of a token of an answer. Return whether it was drafted: then it is appended,
        and what follows it is known.
        """
        if self._source is None:
            return False
        self._source.came(b, token)
        accepted = self._engine.accept(b, token)
        self.drafted.accepted += accepted
        return accepted

    @contextmanager
    def step(
        self, picks: Mapping[int, int], left: Mapping[int, int]
    ) -> Iterator[dict[int, list[int]]]:
        """Give the body the drafts to compute with `picks`, the next token of each sequence, and
        measure the time that both take. Collective: what rank 0 measures counts.

        left[b]: tokens that the answer of sequence b may still have.
        """
        if self._source is not None:
            self._source.prepare()
        tried = 0 if self._source is None else self._source.tried
        # Alone, this thread's own time: other programs that interrupt it would make steps of more
        # rows, which take longer, look worse than they are. Ranks also wait for each other.
        clock = time.thread_time if self._engine.world.size == 1 else time.perf_counter
        began = clock()
        drafts = self._drafts(picks, left)
        yield drafts
        spent = clock() - began
        self.drafted.steps += 1
        if self._source is None:
            return
        self.drafted.proposed += sum(map(len, drafts.values()))
        world = self._engine.world
        if world.size > 1:
            spent = 1e-9 * world.group.sum_of([round(1e9 * spent) if world.rank == 0 else 0])[0]
        self._times.record(len(left) + self._source.tried - tried, spent)

    def _drafts(self, picks: Mapping[int, int], left: Mapping[int, int]) -> dict[int, list[int]]:
        """Return the tokens to compute beyond the next of each sequence, the same on every rank."""
        if self._source is None:
            return {}
        room = self._rows - len(left)
        most = {b: max(0, min(self._queries - 1, room, n - 1)) for b, n in left.items()}
        return self._source.find(picks, most, Budget(len(left), self._times, room=room))
