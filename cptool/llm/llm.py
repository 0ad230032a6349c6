"""The Python front door: a model on its ranks, generation for a batch, sessions on disk.

    import cptool

    with cptool.LLM("smollm2-135m-instruct", cp=2) as llm:
        for result in llm.generate(["The capital of France is"], max_tokens=8):
            print(result.text)

The model is loaded once, onto `cp` x `tp` ranks of this machine, and stays there until the `LLM` is
closed. Importing this module imports no torch.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias, TypeVar, cast

from cptool import variants
from cptool.distributed.devices import resolve_device
from cptool.distributed.environment import launched_size
from cptool.distributed.options import RankOptions
from cptool.engine.answers.records import AnswerOptions
from cptool.engine.options import EngineOptions, resolve_dtype
from cptool.engine.requests import Continue
from cptool.engine.turn import Setup
from cptool.errors import OptionError, RunError, UserError, explain
from cptool.llm.options import Answering, GenerateOptions, takes_options
from cptool.llm.session import Session
from cptool.model import shares
from cptool.model.context import answer_limit
from cptool.session.manifest import DTYPES

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from cptool.checkpoint import Checkpoint
    from cptool.checkpoint.tokenizer.tokenizer import Tokenizer
    from cptool.engine.resident import Resident

Message: TypeAlias = Mapping[str, str]
"""A chat message: {"role": "user", "content": "..."}."""

Prompt: TypeAlias = "str | Sequence[int] | Sequence[Message]"
"""A text, token ids taken as they are, or chat messages for the model's own template."""

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What the model appended to one sequence.

    text: the tokens as text; None if the model has no tokenizer.
    token_ids: the tokens, a stop token included.
    prompt_tokens: number of tokens before them.
    stopped: "eos" after a token that ends an answer, "length" at the limit of tokens.
    """

    text: str | None
    token_ids: tuple[int, ...]
    prompt_tokens: int
    stopped: str


class LLM:
    """A model loaded on local ranks; a context manager that ends them.

    model: a directory in the Hugging Face or Meta layout, a .gguf file, a catalogue name, or a hub
        id, as for the commands.
    cp, tp: context-parallel ranks, and tensor-parallel ranks per context-parallel rank.
    device: "auto", "cpu" or "cuda".
    dtype: "auto", "float32", "bfloat16" or "float16".
    variant: attention variant, or "auto" to choose one for each forward.
    threads: CPU threads per rank; by default the machine's cores divided among the ranks.
    context_length: allow this many positions, whatever the model's files say.

    Results do not depend on the number of ranks or on earlier calls. Calls from several threads run
    one after another. The ranks end with `close`, at the end of a `with` block, when the object is
    garbage collected, and when the process ends, however it does.

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
    ) -> None:
        from cptool.checkpoint import open_checkpoint
        from cptool.engine.resident import Resident

        if launched_size() is not None:
            raise UserError("cptool.LLM starts its own ranks; run the script without a launcher")
        if dtype not in ("auto", *DTYPES):
            raise OptionError("dtype", dtype, f"it must be auto or one of {', '.join(DTYPES)}")
        if variant not in (known := ("auto", *variants.names())):
            raise OptionError("variant", variant, f"it must be one of {', '.join(known)}")
        ranks = RankOptions(cp=cp, tp=tp, device=device, threads=threads)
        ranks.check()
        self.checkpoint: Checkpoint = open_checkpoint(os.fspath(model), context_length, watch=None)
        shares.check(self.checkpoint.config, tp)
        ranks = replace(ranks, device=resolve_device(device, ranks.count))
        self.dtype = resolve_dtype(dtype, self.checkpoint, ranks.device)
        setup = Setup(
            model=str(self.checkpoint.path),
            dtype=self.dtype,
            options=EngineOptions(variant=variant),
            state=self.checkpoint.state,
        )
        self._lock = threading.Lock()
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
        tokenizer = self.checkpoint.tokenizer()
        if tokenizer is None:
            raise UserError(f"{self.checkpoint.path} has no tokenizer; give token ids")
        return tokenizer

    @takes_options
    def generate(
        self, prompts: Sequence[Prompt], **options: Unpack[GenerateOptions]
    ) -> list[Generation]:
        """Continue each prompt, as one batch.

        Raises UserError for a prompt that is empty, too long or not of the model's vocabulary, and
        for an option out of range.
        """
        answering = Answering.of(options, self.checkpoint)
        tokens = self._encoded(prompts, begin=True)
        return self._continued(tokens, answering) if tokens else []

    def session(self, directory: str | os.PathLike[str]) -> Session:
        """Open the session in `directory`, or begin a new one there.

        A session that was saved on any number of ranks can be opened. Raises UserError if it is
        damaged, is another model's, or has KV of another dtype.
        """
        return Session(self, directory)

    def _encoded(self, prompts: Sequence[Prompt], *, begin: bool) -> list[list[int]]:
        """Return the token ids of each prompt; `begin`: texts take the BOS that the model uses."""
        from cptool.checkpoint.tokenizer.input_checks import check_ids

        if isinstance(prompts, (str, Mapping)):
            raise UserError("`prompts` must be a list, with one prompt per sequence; add brackets")
        encoded = []
        for number, prompt in enumerate(prompts, 1):
            try:
                if isinstance(prompt, str):
                    ids = self.tokenizer.encode(prompt, bos=begin) if prompt else []
                elif prompt and isinstance(prompt[0], Mapping):
                    ids = self.tokenizer.chat(cast("Sequence[Message]", prompt))
                else:
                    ids = [int(token) for token in cast("Sequence[int]", prompt)]
                if not ids:
                    raise UserError("it is empty; give at least one token")
                check_ids(ids, self.checkpoint.config.vocab_size)
            except UserError as error:
                raise UserError(f"prompt {number}: {error}") from None
            encoded.append(ids)
        return encoded

    def _continued(
        self, tokens: list[list[int]], answering: Answering, slot: str = ""
    ) -> list[Generation]:
        """Return what follows `tokens`; with a slot, KV that it holds is used again."""
        limit = answer_limit(
            answering.max_tokens,
            self.checkpoint.config,
            new=list(map(len, tokens)),
            held=[0] * len(tokens),
        )
        request = Continue(
            tokens=tuple(map(tuple, tokens)),
            options=AnswerOptions(
                limit=limit,
                sampling=answering.sampling,
                stop_ids=self.checkpoint.answer_ends(*tokens),
            ),
            slot=slot,
            fresh=not slot,
        )
        answer = self._call(lambda ranks: ranks.answer(request, lambda sequence, token: None))
        tokenizer = self.checkpoint.tokenizer()
        return [
            Generation(
                text=tokenizer.decode(list(ids)) if tokenizer else None,
                token_ids=ids,
                prompt_tokens=len(said),
                stopped=stopped,
            )
            for said, ids, stopped in zip(tokens, answer.token_ids, answer.stopped, strict=True)
        ]

    def _call(self, request: Callable[[Resident], _T]) -> _T:
        """Return what the ranks reply; close this LLM if they failed or were interrupted."""
        with self._lock, _one_line():
            if not self._ended.alive:
                raise RunError("this LLM is closed, so its ranks have ended; make another one")
            try:
                return request(self._resident)
            except BaseException as error:
                if not (isinstance(error, (UserError, RunError)) and self._resident.serving):
                    self._ended.detach()
                    self._resident.abandon()
                raise


def _end(resident: Resident) -> None:
    """End the ranks of an LLM that is closed, was garbage collected, or whose process ends."""
    try:
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
