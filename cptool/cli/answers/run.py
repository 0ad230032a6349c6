"""Running a turn whose answers are written as they come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from cptool.cli import turn_report
from cptool.cli.answers import logprobs
from cptool.cli.answers.output import OutputRequest
from cptool.cli.answers.report import draw_table
from cptool.distributed.options import RankOptions

if TYPE_CHECKING:
    from cptool.checkpoint.tokenizer.tokenizer import Tokenizer
    from cptool.engine.turn import Turn
    from cptool.session.manifest import Manifest


def run_and_write(
    turn: Turn,
    ranks: RankOptions,
    output: OutputRequest,
    *,
    tokenizer: Tokenizer | None,
    prompts: Sequence[Sequence[int]],
    after: Sequence[Sequence[int]],
    sampling: str,
    manifest: Manifest | None = None,
) -> None:
    """Run the turn, write its answers to standard output and, for people, a table after them.

    prompts: the token ids that --echo shows. after: the tokens whose text each answer goes on
    with, none where it begins a text. sampling: one line on how tokens were sampled.
    manifest: of the session that the turn continues.

    Raises KeyboardInterrupt if Ctrl-C ended the answers, once they are written.
    """
    from cptool.cli.launch import check_whole, run_turn

    if turn.stop_texts:
        turn = replace(turn, after=tuple(map(len, after)))
    turn_report.say_what_comes(turn, ranks, manifest)
    writer = output.writer(turn, tokenizer, prompts, after)
    report = run_turn(turn, ranks, emit=writer.emit)
    if report is None:  # another process of the launcher writes
        return
    writer.finish(report)
    logprobs.say_cached(turn)
    check_whole(report, turn)
    if output.for_people:
        draw_table(report, turn, tokenizer, sampling)
