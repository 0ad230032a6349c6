"""The Python front door: a model on its ranks, generation for a batch, sessions on disk.

The model is loaded once, onto `cp` x `tp` ranks of this machine, and stays there until the `LLM` is
closed. Importing this module imports no torch.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from cptool.checkpoint.tokenizer.stops import StopStream, before_stop
from cptool.distributed.devices import resolve_device
from cptool.distributed.environment import launched_size
from cptool.distributed.options import RankOptions
from cptool.engine.answers.records import AnswerOptions, Emit
from cptool.engine.requests import Answer, Continue
from cptool.engine.setup.loading import Setup
from cptool.engine.setup.types import resolve_types
from cptool.errors import RunError, UserError, explain
from cptool.llm.answers import Generation, Keep, Stream, Tokens, is_whole
from cptool.llm.options import (
    Answering,
    EngineSettings,
    GenerateOptions,
    check_dtype,
    check_samples,
    describes_options,
    engine_options,
    takes_options,
)
from cptool.llm.prompts import Prompt, before_answers, encoded, tokenizer_of
from cptool.llm.running import Running, Turns
from cptool.llm.session import Session
from cptool.model import shares
from cptool.model.context import answer_limit

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from cptool.checkpoint import Checkpoint
    from cptool.checkpoint.tokenizer.tokenizer import Tokenizer
    from cptool.engine.resident import Resident

_T = TypeVar("_T")


class LLM:
    """A model loaded on local ranks; a context manager that ends them.

        with cptool.LLM("smollm2-135m-instruct", cp=2) as llm:
            for result in llm.generate(["The capital of France is"], max_tokens=8):
                print(result.text)

    `generate` continues a batch of prompts, `stream` gives one answer piece by piece, and `session`
    keeps sequences and conversations on disk. A prompt is a text, a list of token ids taken as they
    are, or a list of chat messages, {"role": "user", "content": "..."}, for the model's template.

    model: a directory in the Hugging Face or Meta layout, a .gguf file, a catalogue name, or a hub
        id, as for the commands.
    cp, tp: context-parallel ranks, and tensor-parallel ranks per context-parallel rank.
    device: "auto", "cpu" or "cuda".
    dtype: "auto", "float32", "bfloat16" or "float16".
    variant: attention variant, or "auto" to choose one for each forward.
    kv_dtype: type in which keys and values are stored and sent, "auto" for `dtype`; products in
        float32 on a CPU also take "bfloat16" and "float16", to which they are rounded once.
    weights: "file", or "q8_0", "int8", "fp8-ffn" to quantise while loading, or "auto".
    chunk: tokens of the prompts of a call that go through the model at a time, or "auto".
    memory, kv_memory: bytes per rank in all that "auto" may use, None for what there is; and bytes
        of KV per rank that stay in memory, None for all: the rest lies in a file.
    threads: CPU threads per rank; by default the machine's cores divided among the ranks.
    context_length: allow this many positions, whatever the model's files say.

    Results do not depend on the number of ranks or on earlier calls. Calls from several threads run
    one after another. KeyboardInterrupt stops the ranks within a layer and leaves the LLM usable; a
    second one, while they stop, ends them. The ranks end with `close`, at the end of a `with`
    block, when the object is garbage collected, and when the process ends, however it does.

    Raises UserError for arguments that cannot be, before any rank starts, and RunError if the ranks
    fail to start; no rank is left then.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        cp: int = 1,
        tp: int = 1,
        device: str = "auto",
        dtype: str = "auto",
        variant: str = "auto",
        threads: int | None = None,
        context_length: int | None = None,
        **settings: Unpack[EngineSettings],
    ) -> None:
        from cptool.checkpoint import open_checkpoint
        from cptool.engine.resident import Resident

        if launched_size() is not None:
            raise UserError("cptool.LLM starts its own ranks; run the script without a launcher")
        check_dtype("dtype", dtype)
        asked = engine_options(variant, settings)
        ranks = RankOptions(cp=cp, tp=tp, device=device, threads=threads)
        ranks.check()
        self.checkpoint: Checkpoint = open_checkpoint(os.fspath(model), context_length, watch=None)
        shares.check(self.checkpoint.config, tp)
        ranks = replace(ranks, device=resolve_device(device, ranks.count))
        self.dtype, options = resolve_types(dtype, asked, self.checkpoint, ranks.device)
        self.kv_dtype, self.weights = options.kv_dtype, options.weights
        setup = Setup(
            model=str(self.checkpoint.path),
            dtype=self.dtype,
            options=options,
            state=self.checkpoint.state,
        )
        self._turns = Turns()
        self._slots = itertools.count(1)
        self._resident: Resident = Resident(setup, ranks)
        with _one_line():
            self._resident.start()
        self._ended = weakref.finalize(self, _end, self._resident)

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the ranks and block until they have ended. Does nothing the second time."""
        self._ended()

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer. Raises UserError if it has none."""
        return tokenizer_of(self.checkpoint)

    @describes_options
    @takes_options
    def generate(
        self, prompts: Sequence[Prompt], *, samples: int = 1, **options: Unpack[GenerateOptions]
    ) -> list[Generation]:
        """Continue each prompt, as one batch.

        samples: answers to each prompt, with other draws each; the prompt is read once, and its KV
            is held once. Those to the same prompt follow one another in the list, so that prompt b
            has `results[b * samples : (b + 1) * samples]`.

        Raises UserError for a prompt that is empty, too long or not of the model's vocabulary, and
        for an option out of range.
        """
        check_samples(samples)
        answering = Answering.of(options, self.checkpoint)
        tokens = encoded(prompts, self.checkpoint, begin=True)
        if not tokens:
            return []
        request = replace(self._request(tokens, answering), samples=samples)
        before = before_answers(prompts, tokens)
        return self._answers(request, [ids for ids in before for _ in range(samples)])

    @takes_options
    def stream(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Stream:
        """Continue one prompt; return an iterator of pieces that come while the model generates.

            with llm.stream("Once upon a time", max_tokens=50) as stream:
                for piece in stream:
                    print(piece.text, end="", flush=True)
            print(stream.result.stopped)

        Options and tokens are those of `generate` for one answer. Raises what it does.
        """
        answering = Answering.of(options, self.checkpoint)
        tokens = encoded([prompt], self.checkpoint, begin=True)
        return self._stream(self._request(tokens, answering), before_answers([prompt], tokens))

    def session(self, directory: str | os.PathLike[str]) -> Session:
        """Open the session in `directory`, or begin a new one there.

        A session that was saved on any number of ranks can be opened. Raises UserError if it is
        damaged, is another model's, or has KV of another dtype.
        """
        return Session(self, directory)

    def _request(
        self, tokens: Sequence[Sequence[int]], answering: Answering, slot: str = ""
    ) -> Continue:
        """Return the request to continue `tokens`; with a slot, KV that it holds is used again."""
        limit = answer_limit(
            answering.max_tokens,
            self.checkpoint.config,
            new=list(map(len, tokens)),
            held=[0] * len(tokens),
        )
        wanted = dict(answering.wanted)
        return Continue(
            tokens=tuple(map(tuple, tokens)),
            prompt_logprobs=wanted.pop("prompt_logprobs"),
            options=AnswerOptions(
                limit=limit,
                sampling=answering.sampling,
                stop_ids=self.checkpoint.answer_ends(*tokens),
                **wanted,
            ),
            slot=slot,
            fresh=not slot,
        )

    def _answers(
        self,
        request: Continue,
        after: Sequence[Sequence[int]],
        keep: Keep | None = None,
    ) -> list[Generation]:
        """Return the answers to a request; see `_tokens`."""
        results: list[Generation] = []
        with contextlib.closing(self._tokens(request, after, results, keep)) as tokens:
            for _ in tokens:
                pass
        return results

    def _stream(
        self,
        request: Continue,
        after: Sequence[Sequence[int]],
        keep: Keep | None = None,
        within: contextlib.AbstractContextManager[None] | None = None,
    ) -> Stream:
        """Return the pieces of the answer to a request for one sequence; see `_tokens`.

        within: entered before the first token, and left once the answer is kept.
        """
        results: list[Generation] = []
        tokens = _within(within, self._tokens(request, after, results, keep))
        tokenizer = self.checkpoint.tokenizer()
        stops = request.options.stop_texts
        text = StopStream(tokenizer.stream(after[0]), stops) if tokenizer else None
        return Stream(tokens, results, text)

    def _tokens(
        self,
        request: Continue,
        after: Sequence[Sequence[int]],
        results: list[Generation],
        keep: Keep | None,
    ) -> Tokens:
        """Yield sequence and token as they come, then put the answers into `results` and `keep`.

        Closed or interrupted before, it stops the ranks first; answers without any token are then
        dropped.

        after: for each answer, the tokens whose text it goes on with.
        """
        if request.options.stop_texts:
            options = replace(request.options, after=tuple(map(len, after)))
            request = replace(request, options=options)
        try:
            with self._running(lambda ranks, emit: ranks.answer(request, emit)) as running:
                try:
                    yield from running.tokens()
                    if "interrupted" in running.result().stopped:
                        raise RunError(_CLOSED)  # `close` in another thread ended it
                finally:
                    running.stop()
                    if running.sent:
                        answer = running.result()
                        if any(answer.token_ids) or "interrupted" not in answer.stopped:
                            results += self._generations(request, answer, after)
        finally:
            if results and keep is not None and self._ended.alive:
                keep(results)

    def _generations(
        self, request: Continue, answer: Answer, after: Sequence[Sequence[int]]
    ) -> list[Generation]:
        tokenizer, stops = self.checkpoint.tokenizer(), request.options.stop_texts
        results = []
        for n, (ids, how) in enumerate(zip(answer.token_ids, answer.stopped, strict=True)):
            b = n // request.samples
            text = tokenizer.text(ids, after[n], ended=is_whole(how)) if tokenizer else None
            results.append(
                Generation(
                    text=before_stop(text, stops) if text and how == "stop" else text,
                    token_ids=ids,
                    prompt_tokens=len(request.tokens[b]),
                    stopped=how,
                    logprobs=answer.logprobs[n] if answer.logprobs else None,
                    prompt_logprobs=answer.prompt_logprobs[b] if answer.prompt_logprobs else None,
                )
            )
        return results

    def _call(self, request: Callable[[Resident], _T]) -> _T:
        """Return what the ranks reply."""
        with self._running(lambda ranks, _: request(ranks)) as running:
            return running.result()

    @contextlib.contextmanager
    def _running(self, request: Callable[[Resident, Emit], _T]) -> Iterator[Running[_T]]:
        """Have the ranks work on a request while the body runs, and stop if it ends before.

        Close this LLM if they failed, or if a second interrupt did not wait for them.
        """
        with self._turns.next(), _one_line():
            if not self._ended.alive:
                raise RunError(_CLOSED)
            running = Running(self._resident, request)
            try:
                running.start()
                yield running
            finally:
                try:
                    running.stop()
                finally:
                    if not (running.leaves_ranks_ready and self._resident.serving):
                        self._ended.detach()
                        self._resident.abandon()


def _within(context: contextlib.AbstractContextManager[None] | None, tokens: Tokens) -> Tokens:
    """Yield the tokens from within a context, which is left after they are closed."""
    with context or contextlib.nullcontext(), contextlib.closing(tokens):
        yield from tokens


_CLOSED = "this LLM is closed, so its ranks have ended; make another one"


def _end(resident: Resident) -> None:
    """End the ranks of an LLM that is closed, was garbage collected, or whose process ends."""
    try:
        resident.stop()
        resident.end_within(10.0)
    finally:
        resident.abandon()


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    """Raise any exception but UserError and RunError as a RunError of one line."""
    try:
        yield
    except (UserError, RunError):
        raise
    except Exception as error:
        raise RunError(explain(error)) from error
