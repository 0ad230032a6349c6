"""An answer as text on standard output while its tokens arrive."""

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cptool.checkpoint.tokenizer.stops import StopStream
from cptool.errors import RunError

if TYPE_CHECKING:
    from cptool.checkpoint.tokenizer.tokenizer import Tokenizer
    from cptool.engine.answers.records import TokenLogprob


class AnswerStream:
    """Writes the tokens of one sequence as text; `emit` is for `cptool.cli.launch.run_turn`.

    Output that fails stops no turn: `finish` reports it once the turn has been saved.

    lead: written before the first token, when the progress bar has gone.
    after: the tokens whose text the answer goes on with. stop: texts that end it.
    """

    def __init__(
        self,
        tokenizer: "Tokenizer",
        *,
        lead: str = "",
        after: Sequence[int] = (),
        stop: Sequence[str] = (),
    ) -> None:
        self._text = StopStream(tokenizer.stream(after), stop)
        self._output, self._lead = Output(), lead

    def emit(self, sequence: int, token_id: int, score: "TokenLogprob | None") -> None:
        """Write the text that is certain with this token."""
        self._write(self._text.push(token_id))

    def finish(self, *, ended: bool) -> None:
        """End the line. A character that lacks bytes is written as U+FFFD if the answer has
        `ended`; otherwise it belongs to the tokens to come.

        Raises RunError if standard output could not be written.
        """
        self._write(self._text.flush(ended=ended) + "\n")
        self._output.check()

    def _write(self, text: str) -> None:
        self._output.write(self._lead + text)
        self._lead = ""


class Output:
    """Standard output, or nowhere once it fails, because the turn is still to be saved.

    `fault` is why it failed, None if its reader merely closed it.
    """

    def __init__(self) -> None:
        self.fault: str | None = None

    def write(self, text: str) -> None:
        if sys.stdout is None:  # closed from the beginning
            return
        try:
            sys.stdout.write(text)
            sys.stdout.flush()
        except OSError as error:
            if not isinstance(error, BrokenPipeError):
                self.fault = error.strerror
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def check(self) -> None:
        """Raise RunError if standard output has failed."""
        if self.fault:
            raise RunError(
                f"standard output cannot be written ({self.fault}); the turn was computed"
            )
