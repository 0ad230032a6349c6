"""How far a file of prompts is: a line on the bar, and the times of reading and answering."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cptool.cli.progress import Bar, clock, described
from cptool.distributed.status_board import IDLE
from cptool.units import token_rate

if TYPE_CHECKING:
    from cptool.cli.batch.lines import Line
    from cptool.distributed.status_board import Board
    from cptool.engine.answers.records import TokenLogprob


class Progress:
    """Times a run that answers `lines`, after `done` that were answered before, and draws it.

    Time left is that of reading the prompts that are left and of answering them, at the rates per
    prompt token and per answer so far; it is unknown before the first batch is answered.

    read_s, answer_s: seconds until the first tokens of all batches, and from there to their ends.
    prompt_tokens, answer_tokens: read and answered so far.
    """

    def __init__(self, bar: Bar, lines: Sequence[Line], done: int) -> None:
        self._bar, self._done, self._total = bar, done, done + len(lines)
        self._unread = sum(len(line.tokens) for line in lines)
        self._began = time.monotonic()
        self._batch: Sequence[Line] = ()
        self._batch_began = 0.0
        self._first: float | None = None
        self._answers: list[int] = []
        self._ended: set[int] = set()
        self._answered = 0
        self.read_s = self.answer_s = 0.0
        self.prompt_tokens = self.answer_tokens = 0

    def begin(self, batch: Sequence[Line]) -> None:
        """Note that the ranks get a batch."""
        self._batch, self._batch_began, self._first = batch, time.monotonic(), None
        self._answers, self._ended = [0] * len(batch), set()

    def emit(self, sequence: int, token: int, score: TokenLogprob | None) -> None:
        """Note a token of an answer in the batch."""
        if self._first is None:
            self._first = time.monotonic()
        line = self._batch[sequence]
        self._answers[sequence] += 1
        if token in line.ends or self._answers[sequence] == line.limit:
            self._ended.add(sequence)

    def end(self) -> None:
        """Note that the batch is answered."""
        now = time.monotonic()
        first = now if self._first is None else self._first
        self.read_s += first - self._batch_began
        self.answer_s += now - first
        tokens = sum(len(line.tokens) for line in self._batch)
        self._unread -= tokens
        self.prompt_tokens += tokens
        self.answer_tokens += sum(self._answers)
        self._answered += len(self._batch)
        self._batch, self._answers, self._ended = (), [], set()

    def watch(self, board: Board) -> None:
        """Draw what the board says of rank 0; to be called from time to time."""
        status = board.read(0)
        if not status.phase or self._bar.hidden:
            return
        if not self._batch or status.phase == IDLE:
            self._bar.draw(described(status), None, "")
            return
        now = time.monotonic()
        done = self._done + self._answered + len(self._ended)
        elapsed, left = now - self._began, self._left(now)
        share = done / self._total
        shown = [f"{int(100 * share)}%"]
        if said := self.answer_tokens + sum(self._answers):
            shown.append(token_rate(said / elapsed))
        shown.append(clock(elapsed))
        if left is not None:
            shown.append(f"{clock(left)} left")
        what = f"{done:,} of {self._total:,} answered, {described(status)}"
        self._bar.draw(what, share, ", ".join(shown))

    def _left(self, now: float) -> float | None:
        """Return the seconds that are left, None before a batch was answered."""
        if not self._answered:
            return None
        per_token = self.read_s / self.prompt_tokens
        per_answer = self.answer_s / self._answered
        tokens, count = sum(len(line.tokens) for line in self._batch), len(self._batch)
        reading, answering = per_token * tokens, per_answer * count
        if self._first is None:
            spent = min(reading, now - self._batch_began)
        else:
            spent = reading + min(answering, now - self._first)
        ahead = self._total - self._done - self._answered
        return per_token * self._unread + per_answer * ahead - spent
