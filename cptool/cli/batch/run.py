"""Answering a file of prompts, a batch at a time, on ranks that keep the model."""

from __future__ import annotations

import contextlib
import shlex
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cptool.cli import draw, json_output
from cptool.cli.answers.report import text
from cptool.cli.answers.stopping import stopping
from cptool.cli.batch.answers import Answers, Printed, check_writable, kept_in
from cptool.cli.batch.lines import Line, read_lines
from cptool.cli.batch.options import STANDARD_OUTPUT, BatchRequest
from cptool.cli.batch.progress import Progress
from cptool.cli.options.models import say_reading
from cptool.cli.progress import drawn_bar
from cptool.cli.turn_report import types_of
from cptool.engine.answers.records import Drafted
from cptool.units import duration, some, token_rate

if TYPE_CHECKING:
    from cptool.checkpoint import Checkpoint
    from cptool.cli.options.prompts import Prompts
    from cptool.distributed.options import RankOptions
    from cptool.engine.answers.request import AnswerRequest
    from cptool.engine.options import EngineOptions
    from cptool.engine.requests import Answer
    from cptool.engine.resident import Resident
    from cptool.engine.sampling import Sampling
    from cptool.engine.sampling_request import SamplingRequest


@dataclass(frozen=True, kw_only=True)
class Job:
    """A file of prompts, and how to answer it.

    texts: what becomes of a text. wanted: where answers end and what is reported of their tokens.
    answering: the fields of a request that say so.
    """

    batch: BatchRequest
    texts: Prompts
    wanted: AnswerRequest
    answering: dict[str, Any]
    checkpoint: Checkpoint
    sampling: Sampling
    dtype: str
    ranks: RankOptions
    options: EngineOptions

    @property
    def kv_dtype(self) -> str:
        """Type in which keys and values are stored."""
        return self.options.kv_dtype

    @property
    def weights(self) -> str:
        """What weights are quantised to, or "file"."""
        return self.options.weights or "file"

    def origin(self, line: Line) -> dict[str, Any]:
        """Return the fields that identify the answer to a line: what it answers, and how."""
        return {
            "index": line.index,
            "id": line.id,
            "prompt_tokens": len(line.tokens),
            "prompt_sha256": line.digest,
            "max_tokens": line.limit,
            "fingerprint": self.checkpoint.fingerprint,
            "dtype": self.dtype,
            "kv_dtype": self.kv_dtype,
            "weights": self.weights,
            "sampling": asdict(self.sampling),
            "stop": list(self.wanted.stop),
            "top_logprobs": self.wanted.logprobs,
            "top_prompt_logprobs": self.wanted.prompt_logprobs,
        }


def answer_file(job: Job, sampler: SamplingRequest, *, count: int, as_json: bool) -> None:
    """Answer every line of the file that has no answer yet, then print what was done.

    sampler: what `job.sampling` came from. count: tokens of an answer at most. as_json: print one
    object, not a table.

    Raises UserError, before the model is loaded, for lines that cannot be used and for an output
    that is not of this run; KeyboardInterrupt if Ctrl-C ended the run, once what was answered is
    written.
    """
    source, destination = str(job.batch.source), job.batch.destination
    printed = destination == STANDARD_OUTPUT
    if not printed:
        check_writable(Path(destination))
    lines = read_lines(source, job.checkpoint, job.texts, count)
    say_reading(job.checkpoint)
    origins = [job.origin(line) for line in lines]
    opened = contextlib.nullcontext(Printed()) if printed else kept_in(Path(destination), origins)
    with opened as answers:
        run = _Run(job, lines, origins, answers)
        if answers.done == len(lines):
            draw.say(f"{destination}: all {some(len(lines), 'prompt')} are answered")
        else:
            if answers.done:
                draw.say(f"{destination}: {answers.done:,} of {len(lines):,} prompts are answered")
            run.run()
    if as_json:
        json_output.print_object(run.fields())
    elif run.written:
        draw.table(run.rows(sampler.describe(job.sampling)), to_stderr=True)


class _Run:
    """One run over the prompts that have no answer yet."""

    def __init__(
        self,
        job: Job,
        lines: Sequence[Line],
        origins: Sequence[dict[str, Any]],
        answers: Answers,
    ) -> None:
        self.job, self.origins, self.answers = job, origins, answers
        self.lines, self.before = lines, answers.done
        self.written = self.batches = 0
        self.load_s = 0.0
        self.ends: Counter[str] = Counter()
        self.drafts = Drafted(asked=job.wanted.draft)
        self.under_way: Sequence[Line] = ()
        self.progress: Progress | None = None

    def run(self) -> None:
        """Answer the prompts that are left."""
        from cptool.engine.resident import Resident
        from cptool.engine.setup.loading import Setup

        job, left = self.job, self.lines[self.before :]
        setup = Setup(
            model=str(job.checkpoint.path),
            dtype=job.dtype,
            options=job.options,
            state=job.checkpoint.state,
        )
        try:
            began = time.monotonic()
            with drawn_bar() as bar, Resident(setup, job.ranks) as resident:
                self.load_s = time.monotonic() - began
                self.progress = Progress(bar, left, self.before)
                with stopping(resident) as stopped:
                    for batch in job.batch.batches(left):
                        if stopped() or not self.answer(resident, batch, self.progress):
                            break
        except Exception:
            if self.under_way:
                first, last = self.under_way[0].number, self.under_way[-1].number
                draw.say(f"it failed within lines {first} to {last}; {self._so_far()}", always=True)
            raise
        if self.before + self.written < len(self.lines):
            raise KeyboardInterrupt(f"interrupted; {self._so_far()}")

    def answer(self, resident: Resident, batch: Sequence[Line], progress: Progress) -> bool:
        """Answer a batch and write it; return False if Ctrl-C ended it before its end."""
        from cptool.engine.answers.records import AnswerOptions
        from cptool.engine.requests import Continue

        answering = dict(self.job.answering)
        prompt_logprobs = answering.pop("prompt_logprobs")
        request = Continue(
            tokens=tuple(tuple(line.tokens) for line in batch),
            options=AnswerOptions(
                limit=tuple(line.limit for line in batch),
                sampling=self.job.sampling,
                draws=tuple(line.index for line in batch),
                stop_ids=batch[0].ends,
                after=tuple(len(line.tokens) if line.continued else 0 for line in batch),
                **answering,
            ),
            prompt_logprobs=prompt_logprobs,
            fresh=True,
        )
        self.under_way = batch
        progress.begin(batch)
        answer = resident.answer(request, progress.emit, progress.watch)
        progress.end()
        # In order: what follows an answer that was interrupted is left for the next run.
        whole = (*answer.stopped, "interrupted").index("interrupted")
        self.drafts.add(answer.drafts)
        if whole:
            self.answers.append([self._fields(batch[b], answer, b) for b in range(whole)])
            self.ends.update(answer.stopped[:whole])
            self.written += whole
            self.batches += 1
        return whole == len(batch)

    def _fields(self, line: Line, answer: Answer, b: int) -> dict[str, Any]:
        origin = self.origins[line.index]
        names = ("index", "id")
        scores = {"logprobs": answer.logprobs, "prompt_logprobs": answer.prompt_logprobs}
        return {
            **{name: origin[name] for name in names},
            "text": self._text(line, answer.token_ids[b], answer.stopped[b]),
            "token_ids": answer.token_ids[b],
            "stopped": answer.stopped[b],
            **{name: [s.fields() for s in each[b]] for name, each in scores.items() if each},
            **{name: value for name, value in origin.items() if name not in names},
        }

    def _text(self, line: Line, ids: Sequence[int], why: str) -> str | None:
        tokenizer = self.job.checkpoint.tokenizer()
        if tokenizer is None:
            return None
        stop = self.job.answering.get("stop_texts", ())
        after = line.tokens if line.continued else ()
        return text(ids, why, stop, tokenizer=tokenizer, after=after)

    def _so_far(self) -> str:
        done, total = self.before + self.written, len(self.lines)
        if self.job.batch.destination == STANDARD_OUTPUT:
            return f"{done:,} of {total:,} prompts were answered"
        path = shlex.quote(self.job.batch.destination)
        return f"{done:,} of {total:,} prompts are answered in {path}; the same command goes on"

    def fields(self) -> dict[str, Any]:
        """Return what --json prints."""
        progress, ranks = self.progress, self.job.ranks
        return {
            "prompts": len(self.lines),
            "answered_before": self.before,
            "answered": self.written,
            "output": self.job.batch.destination,
            "batches": self.batches,
            "tokens": progress.prompt_tokens if progress else 0,
            "answer_tokens": progress.answer_tokens if progress else 0,
            "stopped": dict(self.ends),
            "cp": ranks.cp,
            "tp": ranks.tp,
            "device": ranks.device,
            "dtype": self.job.dtype,
            "kv_dtype": self.job.kv_dtype,
            "weights": self.job.weights,
            "sampling": asdict(self.job.sampling),
            **self.drafts.fields(),
            "load_s": self.load_s,
            "read_s": progress.read_s if progress else 0.0,
            "answer_s": progress.answer_s if progress else 0.0,
        }

    def rows(self, described: str) -> draw.Rows:
        """Return the table of what was done."""
        progress, ranks = self.progress, self.job.ranks
        assert progress is not None  # something was written
        before = f" after {self.before:,} that were answered before" if self.before else ""
        named = {
            "eos": "by the model",
            "stop": "at a stop text",
            "length": "at their limit of tokens",
        }
        ends = ", ".join(f"{n:,} {named.get(why, why)}" for why, n in self.ends.items())
        rows = [
            (
                "prompts",
                f"{self.written:,}{before}, of {some(progress.prompt_tokens, 'token')} together",
            ),
            ("ranks", f"{ranks.cp} cp x {ranks.tp} tp on {ranks.device}, {types_of(self.job)}"),
            ("batches", f"{self.batches:,}, of {_most(self.job.batch)}"),
            (
                "reading",
                f"{duration(progress.read_s)} to the first tokens, "
                f"{token_rate(progress.prompt_tokens / progress.read_s)}",
            ),
        ]
        if progress.answer_s:
            rows.append(
                (
                    "answering",
                    f"{duration(progress.answer_s)}, {some(progress.answer_tokens, 'token')}, "
                    f"{token_rate(progress.answer_tokens / progress.answer_s)}",
                )
            )
        drafts = self.drafts
        if drafts.asked != "off" and drafts.proposed:
            came = f"{drafts.accepted:,} of {some(drafts.proposed, 'token')} came true"
            rows.append(("drafts", f"{came}, in {some(drafts.steps, 'step')}"))
        elif drafts.asked not in ("off", "auto") and drafts.off:
            rows.append(("drafts", f"none: {drafts.off}"))
        return [
            *rows,
            ("answers", f"ended {ends}"),
            ("loading", f"{duration(self.load_s)} for the ranks and the weights"),
            ("sampling", described),
            ("output", self.job.batch.destination),
        ]


def _most(batch: BatchRequest) -> str:
    from cptool.cli.batch.options import DEFAULT_SIZE, DEFAULT_TOKENS_TOGETHER

    if batch.size is not None:
        return f"up to {some(batch.size, 'prompt')}"
    return f"up to {DEFAULT_SIZE} prompts or {DEFAULT_TOKENS_TOGETHER:,} tokens"
