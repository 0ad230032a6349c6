"""What writes answers to standard output: text as it comes, whole answers, or JSON.

`prompts` are the texts to write before the answers, none without --echo.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cptool.cli import json_output
from cptool.cli.answers import report as reports
from cptool.cli.answers.stream import AnswerStream, Output

if TYPE_CHECKING:
    from cptool.checkpoint.tokenizer.tokenizer import Tokenizer
    from cptool.engine.turn import Report, Turn


def shown(ids: Sequence[int], tokenizer: Tokenizer | None, *, control: bool = False) -> str:
    """Return tokens as text, or as numbers without a tokenizer.

    control: whether control tokens are shown.
    """
    return tokenizer.decode(ids, control=control) if tokenizer else " ".join(map(str, ids))


class OneText:
    """The answer of one sequence, as text while it comes, after the text `prompt`."""

    def __init__(self, tokenizer: Tokenizer, prompt: str) -> None:
        self._stream = AnswerStream(tokenizer, lead=prompt)

    def emit(self, sequence: int, token_id: int) -> None:
        self._stream.emit(sequence, token_id)

    def finish(self, report: Report) -> None:
        self._stream.finish()


class Texts:
    """The answers of a batch: each whole, after its number and its prompt, in order, as soon as it
    and those before it have ended. Token ids without a tokenizer.
    """

    def __init__(self, turn: Turn, tokenizer: Tokenizer | None, prompts: Sequence[str]) -> None:
        self._turn, self._tokenizer, self._prompts = turn, tokenizer, prompts
        self._answers: list[list[int]] = [[] for _ in turn.prompts]
        self._written = 0
        self._output = Output()
        self.emit = self._take if len(turn.prompts) > 1 else None

    def _take(self, sequence: int, token_id: int) -> None:
        self._answers[sequence].append(token_id)
        while self._written < len(self._answers) and self._ended(self._answers[self._written]):
            self._write(self._answers[self._written])

    def finish(self, report: Report) -> None:
        for answer in report.token_ids[self._written :]:
            self._write(answer)
        self._output.check()

    def _ended(self, answer: list[int]) -> bool:
        if not answer:
            return False
        return len(answer) == self._turn.max_new_tokens or answer[-1] in self._turn.stop_ids

    def _write(self, answer: Sequence[int]) -> None:
        prompt = self._prompts[self._written] if self._prompts else ""
        self._written += 1
        self._output.write(f"[{self._written}] {prompt}{shown(answer, self._tokenizer)}\n")


class OneObject:
    """The one object of --json, at the end."""

    emit = None

    def __init__(self, turn: Turn, tokenizer: Tokenizer | None, prompts: Sequence[str]) -> None:
        self._turn, self._tokenizer, self._prompts = turn, tokenizer, prompts

    def finish(self, report: Report) -> None:
        fields = reports.fields(report, self._turn, self._tokenizer)
        if self._prompts:
            fields["prompt"] = list(self._prompts)
        json_output.print_object(fields)


class JsonLines:
    """Lines of JSON: each token with the text that is certain with it, then the result."""

    def __init__(self, turn: Turn, tokenizer: Tokenizer | None, prompts: Sequence[str]) -> None:
        self._turn, self._tokenizer, self._output = turn, tokenizer, Output()
        self._streams = [tokenizer.stream() for _ in turn.prompts] if tokenizer else None
        self._prompts: Sequence[str] = prompts

    def emit(self, sequence: int, token_id: int) -> None:
        self._write_prompts()
        text = self._streams[sequence].push(token_id) if self._streams else None
        self._write({"type": "token", "sequence": sequence, "token": token_id, "text": text})

    def finish(self, report: Report) -> None:
        self._write_prompts()
        for sequence, stream in enumerate(self._streams or ()):
            if text := stream.flush():  # the answer ends inside a character
                self._write({"type": "token", "sequence": sequence, "token": None, "text": text})
        fields = {"type": "result", **reports.fields(report, self._turn, self._tokenizer)}
        self._output.write(json_output.line(fields) + "\n")
        self._output.check()

    def _write_prompts(self) -> None:
        """Write the prompts, the first time."""
        for sequence, prompt in enumerate(self._prompts):
            self._write({"type": "prompt", "sequence": sequence, "text": prompt})
        self._prompts = ()

    def _write(self, fields: dict[str, Any]) -> None:
        self._output.write(json_output.plain_line(fields) + "\n")
