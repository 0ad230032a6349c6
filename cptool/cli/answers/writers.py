"""What writes answers to standard output: text as it comes, whole answers, or JSON.

`prompts` are the texts to write before the answers, none without --echo. `after` are, for each
answer, the tokens whose text it goes on with: a character that they leave unfinished is written
with it, whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cptool.checkpoint.tokenizer.stops import StopStream
from cptool.cli import json_output
from cptool.cli.answers import logprobs
from cptool.cli.answers import report as reports
from cptool.cli.answers.numbers import number, places
from cptool.cli.answers.stream import AnswerStream, Output

if TYPE_CHECKING:
    from cptool.checkpoint.tokenizer.tokenizer import Tokenizer
    from cptool.engine.answers.records import TokenLogprob
    from cptool.engine.turn import Report, Turn


def shown(prompt: Sequence[int], tokenizer: Tokenizer | None) -> str:
    """Return a prompt as text, its control tokens too, or as numbers without a tokenizer."""
    if tokenizer is None:
        return " ".join(map(str, prompt))
    return tokenizer.text(prompt, ended=False, control=True)


def _streams(
    turn: Turn, tokenizer: Tokenizer | None, after: Sequence[Sequence[int]]
) -> list[StopStream] | None:
    """Return the text of each answer as its tokens come, None without a tokenizer."""
    if tokenizer is None:
        return None
    return [StopStream(tokenizer.stream(before), turn.stop_texts) for before in after]


class OneText:
    """The answer of one sequence, as text while it comes, after the text `prompt`."""

    def __init__(self, turn: Turn, tokenizer: Tokenizer, prompt: str, after: Sequence[int]) -> None:
        self._stream = AnswerStream(tokenizer, lead=prompt, after=after, stop=turn.stop_texts)

    def emit(self, sequence: int, token_id: int, score: TokenLogprob | None) -> None:
        self._stream.emit(sequence, token_id, score)

    def finish(self, report: Report) -> None:
        self._stream.finish(ended=reports.has_ended(report.stopped[0]))


class Texts:
    """Several answers: each whole, after its number and its prompt, in order, as soon as it and
    those before it have ended. Token ids without a tokenizer. The prompt of several samples stands
    once, on a line before them.
    """

    def __init__(
        self,
        turn: Turn,
        tokenizer: Tokenizer | None,
        prompts: Sequence[str],
        after: Sequence[Sequence[int]],
    ) -> None:
        self._turn, self._tokenizer, self._prompts, self._after = turn, tokenizer, prompts, after
        self._answers: list[list[int]] = [[] for _ in after]
        self._streams = _streams(turn, tokenizer, after)
        self._written = 0
        self._output = Output()
        self.emit = self._take if len(after) > 1 else None

    def _take(self, sequence: int, token_id: int, score: TokenLogprob | None) -> None:
        self._answers[sequence].append(token_id)
        if self._streams is not None:
            self._streams[sequence].push(token_id)
        while self._written < len(self._answers) and (why := self._ended(self._written)):
            self._write(self._answers[self._written], why)

    def finish(self, report: Report) -> None:
        for b in range(self._written, len(report.token_ids)):
            self._write(report.token_ids[b], report.stopped[b])
        self._output.check()

    def _ended(self, b: int) -> str | None:
        found = self._streams is not None and self._streams[b].found
        return self._turn.answers.ended(self._answers[b], self._turn.max_new_tokens, found=found)

    def _write(self, answer: Sequence[int], why: str) -> None:
        b, s = places(self._turn)[self._written]
        prompt = self._prompts[b] if self._prompts else ""
        if prompt and self._turn.samples > 1:
            if s == 0:
                self._output.write(f"[{b + 1}] {prompt}\n")
            prompt = ""
        if self._tokenizer is None:
            text = " ".join(map(str, answer))
        else:
            before, stop = self._after[self._written], self._turn.stop_texts
            text = reports.text(answer, why, stop, tokenizer=self._tokenizer, after=before)
        self._output.write(f"[{number(self._turn, self._written)}] {prompt}{text}\n")
        self._written += 1


class OneObject:
    """The one object of --json, at the end."""

    emit = None

    def __init__(
        self,
        turn: Turn,
        tokenizer: Tokenizer | None,
        prompts: Sequence[str],
        after: Sequence[Sequence[int]],
    ) -> None:
        self._turn, self._tokenizer, self._prompts, self._after = turn, tokenizer, prompts, after

    def finish(self, report: Report) -> None:
        fields = reports.fields(report, self._turn, self._tokenizer, self._after)
        if self._prompts:
            fields["prompt"] = list(self._prompts)
        json_output.print_object(fields)


class JsonLines:
    """Lines of JSON: each token with the text that is certain with it, then the result."""

    def __init__(
        self,
        turn: Turn,
        tokenizer: Tokenizer | None,
        prompts: Sequence[str],
        after: Sequence[Sequence[int]],
    ) -> None:
        self._turn, self._tokenizer, self._output, self._after = turn, tokenizer, Output(), after
        self._streams = _streams(turn, tokenizer, after)
        self._prompts: Sequence[str] = prompts

    def emit(self, sequence: int, token_id: int, score: TokenLogprob | None) -> None:
        self._write_prompts()
        text = self._streams[sequence].push(token_id) if self._streams else None
        scores = {} if score is None else logprobs.token_fields(score)
        self._write_token(sequence, token_id, text, scores)

    def finish(self, report: Report) -> None:
        self._write_prompts()
        for sequence, stream in enumerate(self._streams or ()):
            ended = reports.has_ended(report.stopped[sequence])
            if text := stream.flush(ended=ended):  # the answer ends within a character, say
                self._write_token(sequence, None, text, {})
        fields = {
            "type": "result",
            **reports.fields(report, self._turn, self._tokenizer, self._after),
        }
        self._output.write(json_output.line(fields) + "\n")
        self._output.check()

    def _write_prompts(self) -> None:
        """Write the prompts, the first time."""
        for sequence, prompt in enumerate(self._prompts):
            self._write({"type": "prompt", "sequence": sequence, "text": prompt})
        self._prompts = ()

    def _write_token(
        self, answer: int, token: int | None, text: str | None, scores: dict[str, Any]
    ) -> None:
        b, s = places(self._turn)[answer]
        fields = {"type": "token", "sequence": b, "sample": s, "token": token, "text": text}
        self._write({**fields, **scores})

    def _write(self, fields: dict[str, Any]) -> None:
        self._output.write(json_output.plain_line(fields) + "\n")
