"""Committing the chunks of a prompt to its session while the next ones are computed.

A chunk is a beginning of a turn (`cptool.session.unfinished`). What is held never changes while
more is appended, so a thread of each rank writes it from where it lies; the threads agree on the
commit among themselves, in a group of their own, while the ranks compute.
"""

from __future__ import annotations

import copy
import datetime
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from cptool.engine.saving import State, save_unfinished
from cptool.engine.state import OnDisk
from cptool.errors import RunError
from cptool.session.manifest import Manifest, ModelIdentity
from cptool.session.manifest import Sequence as Saved

if TYPE_CHECKING:
    from cptool.distributed.group import Group
    from cptool.engine.engine import Engine

_PATIENCE = datetime.timedelta(hours=1)
"""How long a rank's thread waits for those whose disk is slower. Ranks that end are noticed by
others."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a turn is kept while it is read.

    every: the most seconds between two commits, where chunks do not take longer. before: the
    sequences of the session before this turn. keep: how many tokens of each were said before it.
    """

    directory: Path
    identity: ModelIdentity
    every: float
    before: tuple[Saved, ...]
    keep: tuple[int, ...]


class Keeper:
    """Commits what `engine` computes of a turn; all ranks call its methods together.

    manifest: what the session has as far as this rank knows, None before the first commit of a new
        one.
    """

    def __init__(self, engine: Engine, place: Place, manifest: Manifest | None) -> None:
        self.engine, self.place, self.manifest = engine, place, manifest
        self._kept = list(engine.computed)
        self._began = self._border = time.monotonic()
        self._group: Group | None = None
        self._saving: _Saving | None = None

    def between_chunks(self) -> None:
        """Begin a commit if it would be late after the next chunk, which may take as long as the
        last one. Collective.
        """
        now = time.monotonic()
        late = 2 * now - self._border - self._began >= self.place.every
        self._border = now
        idle = self._saving is None or not self._saving.is_alive()
        # Rank 0 decides for all.
        begin = late and idle and self.engine.world.rank == 0
        if self.engine.world.group.sum_of([int(begin)])[0]:
            self.settle()
            self._begin(now)

    def keep_all(self) -> int:
        """Commit everything that is computed, and return how many tokens of the turn that is.
        Collective. Raises RunError or OSError on all ranks if it cannot be saved.
        """
        self.settle()
        if self.engine.computed != self._kept:
            self._begin(time.monotonic())
            self.settle(raises=True)
        return sum(max(0, n - k) for n, k in zip(self._kept, self.place.keep, strict=True))

    def settle(self, *, raises: bool = False) -> None:
        """Block until the commit under way has ended. Collective.

        Without `raises`, one that failed is forgotten: its tokens are part of the next one.
        """
        saving, self._saving = self._saving, None
        if saving is None:
            return
        saving.join()
        if saving.manifest is not None:
            self.manifest, self._kept = saving.manifest, saving.snapshot.computed
            self.engine.on_disk.update(saving.snapshot.cache.lengths, self._kept)
        elif raises or not isinstance(saving.failure, (RunError, OSError)):
            assert saving.failure is not None  # it has no manifest
            raise saving.failure

    def _begin(self, now: float) -> None:
        self._began = now
        if self._group is None:
            self._group = self.engine.world.group_for_a_thread(_PATIENCE)
        snapshot = Snapshot(self.engine, self._group, self.place.keep)
        self._saving = _Saving(snapshot, self.place, self.manifest)
        self._saving.start()


class Snapshot(State):
    """What an engine holds at this moment, in memory that does not change while it reads on."""

    def __init__(self, engine: Engine, group: Group, keep: Sequence[int]) -> None:
        self.world = replace(engine.world, group=group)
        self.model, self.dtype, self.options = engine.model, engine.dtype, engine.options
        self.cache = copy.copy(engine.cache)
        self.tokens, self.ended = [list(said) for said in engine.tokens], list(engine.ended)
        self.computed = list(engine.computed)
        # Those of sequences that the turn adds to are not what the session's next turn needs.
        self.logits = {b: row for b, row in engine.logits.items() if len(self.tokens[b]) == keep[b]}
        self.on_disk = OnDisk(len(self.tokens))
        self.on_disk.update(engine.on_disk.rows, engine.on_disk.positions)


class _Saving(threading.Thread):
    """Saves a snapshot. manifest: that of the commit, None if there is a `failure`."""

    def __init__(self, snapshot: Snapshot, place: Place, previous: Manifest | None) -> None:
        super().__init__(name="cptool-saving", daemon=True)
        self.snapshot, self.place, self.previous = snapshot, place, previous
        self.manifest: Manifest | None = None
        self.failure: BaseException | None = None

    def run(self) -> None:
        place = self.place
        try:
            self.manifest = save_unfinished(
                self.snapshot,
                place.directory,
                self.previous,
                place.identity,
                before=place.before,
                keep=place.keep,
            )
        except BaseException as failure:
            self.failure = failure
