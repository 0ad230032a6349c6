"""The model `cptool` of lm-evaluation-harness: its requests, answered by a `cptool.LLM`.

Requests become tokens, and tokens become scores, as the harness's own model `hf` has them, so that
both give the same results. That includes control tokens: where a request spells one, it is one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from cptool.errors import OptionError, UserError
from cptool.llm.llm import LLM
from cptool.llm.scoring import scores

_T = TypeVar("_T")

_MOST_TOGETHER, _TOKENS_TOGETHER = 64, 4096
"""Requests of a batch at most, and their tokens, where the batch size is left to cptool. A batch
has no padding, so that more only takes more memory."""

_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names of the limit of an answer's tokens, the first one that is given counts."""

_SAMPLED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
"""Arguments of a generation that `LLM.generate` has too."""

_Scored = tuple[Any, list[int], list[int]]
"""A request, the tokens of its context, and those of what is scored after it."""


@register_model("cptool")
class CptoolLM(TemplateLM):
    """A model on cptool's ranks.

        results = lm_eval.simple_evaluate(CptoolLM("MODEL", cp=2), tasks=["arc_easy"])

    pretrained: the model, as `cptool.LLM` takes it.
    batch_size: requests that are read together, or "auto".
    max_batch_size: no use is made of it.
    max_length: tokens of a context; by default the model's own.
    max_gen_toks: tokens of an answer, where a task does not say.
    prefix_token_id: the token before a text without a context; by default BOS, or else EOS.
    options: keyword arguments of `cptool.LLM`: cp, tp, device, dtype, weights, kv_dtype, ... The
        device is a GPU if there is one, unless it is "cpu".

    Raises what `cptool.LLM` does, and OptionError for values that cannot be.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        prefix_token_id: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.batch_size, self._together = batch_size, _batch_size(batch_size)
        if str(options.get("device", "cuda")).startswith("cuda"):
            options["device"] = "auto"  # cuda:0 is what the harness's command line says by default
        self.llm = LLM(str(pretrained), **options)
        self._encoder = self.llm.tokenizer
        context = self.llm.checkpoint.config.max_position_embeddings
        if max_length is not None and not 2 <= max_length <= context:
            rule = f"it must be 2 to the model's context of {context:,}"
            raise OptionError("max_length", max_length, rule)
        self.max_length = max_length or context
        self.max_gen_toks = max_gen_toks
        self._encoder.context = None  # a text beyond it is cut here, or scored in windows
        self._prefix = prefix_token_id

    def close(self) -> None:
        """End the ranks."""
        self.llm.close()

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        found = self._encoder.eos_id
        if found is None:
            found = next(iter(self.llm.checkpoint.eos_ids), None)
        if found is None:
            raise UserError(f"{self.llm.checkpoint.path} names no token that ends a text")
        return found

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without a context."""
        if self._prefix is not None:
            return self._prefix
        begin = self._encoder.bos_id
        return self.eot_token_id if begin is None else begin

    @property
    def tokenizer_name(self) -> str:
        """What tells caches of requests apart."""
        return str(self.llm.checkpoint.path).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Return the model's template, "" if it has none or none is wanted."""
        return (self._encoder.chat_template or "") if chat_template else ""

    def apply_chat_template(
        self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return a conversation as the template writes it; without a generation prompt, up to the
        end of the last message, which the answer goes on with.
        """
        text = self._encoder.chat_text(chat_history, add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].strip()
        return text[: text.rindex(last) + len(last)]

    def get_model_info(self) -> dict[str, Any]:
        """Return what a file of results says of the model."""
        llm = self.llm
        return {
            "model_dtype": llm.dtype,
            "model_kv_dtype": llm.kv_dtype,
            "model_weights": llm.weights,
            "model_sha": llm.checkpoint.fingerprint,
        }

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Return the tokens of a text, with those that begin a sequence unless the text has them or
        `add_special_tokens` is False.
        """
        return self._encoder.encode(string, bos=add_special_tokens is not False, parse=True)

    def _loglikelihood_tokens(
        self, requests: Sequence[_Scored], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Return the sum of the log-probabilities of each continuation, and whether it is what
        greedy decoding gives.
        """
        found = []
        with tqdm(total=len(requests), disable=disable_tqdm, desc="loglikelihood") as bar:
            for batch in self._batches(requests, lambda r: len(r[1]) + len(r[2])):
                rows = [
                    [*before, *scored][-self.max_length - 1 :] for _asked, before, scored in batch
                ]
                first = [len(row) - len(r[2]) for row, r in zip(rows, batch, strict=True)]
                if min(first) < 1:
                    rule = f"a continuation must fit in {self.max_length:,} tokens after one other"
                    raise UserError(f"`max_length`: {rule}; allow more")
                results = scores(self.llm, rows, first=first, top=1)
                for (asked, _before, _scored), result in zip(batch, results, strict=True):
                    answer = (
                        sum(score.logprob for score in result if score.logprob is not None),
                        all(score.token == score.top[0][0] for score in result),
                    )
                    if asked is not None:
                        self.cache_hook.add_partial("loglikelihood", asked, answer)
                    found.append(answer)
                bar.update(len(batch))
        return found

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-probability of each text, cut into windows of `max_length`."""
        windows: list[_Scored] = []
        owners = []
        for owner, request in enumerate(requests):
            (text,) = request.args
            cut = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, scored in map(make_disjoint_window, cut):
                windows.append((None, context, scored))
                owners.append(owner)
        found = [0.0] * len(requests)
        results = self._loglikelihood_tokens(windows, disable_tqdm)
        for owner, (value, _) in zip(owners, results, strict=True):
            found[owner] += value
        for request, value in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the answer to each request, up to the first of its stop texts."""
        texts: list[str] = [""] * len(requests)
        asked = [(n, *request.args) for n, request in enumerate(requests)]
        with tqdm(total=len(asked), disable=disable_tqdm, desc="generate_until") as bar:
            for arguments, group in _grouped(asked):
                options, until = self._generation(arguments)
                for batch in self._batches(group, lambda row: len(row[1])):
                    room = self.max_length - options["max_tokens"]
                    whole = [
                        self.tok_encode(text) or [self.prefix_token_id] for _, text, _ in batch
                    ]
                    prompts = [tokens[-room:] for tokens in whole]
                    answers = self.llm.generate(prompts, **options)
                    for (n, text, _), answer in zip(batch, answers, strict=True):
                        texts[n] = _up_to(self._encoder.decode(answer.token_ids), until)
                        self.cache_hook.add_partial("generate_until", (text, arguments), texts[n])
                    bar.update(len(batch))
        return texts

    def _generation(self, arguments: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """Return the options of `LLM.generate` for a task's generation, and its stop texts."""
        given = dict(arguments)
        until = given.pop("until", None) or []
        until = [until] if isinstance(until, str) else [text for text in until if text]
        lengths = [given.pop(name, None) for name in _LENGTHS]
        limit = int(next((n for n in lengths if n is not None), self.max_gen_toks))
        if not 0 < limit < self.max_length:
            rule = f"an answer must leave room for a prompt in {self.max_length:,} tokens"
            raise OptionError("max_gen_toks", limit, rule)
        sample = given.pop("do_sample", None)
        options = {name: given.pop(name) for name in _SAMPLED if name in given}
        if given:
            rule = (
                f"no such argument of a generation; there are {', '.join((*_LENGTHS, *_SAMPLED))}"
            )
            raise UserError(f"`gen_kwargs` {', '.join(given)}: {rule}")
        temperature = float(options.get("temperature", 1.0 if sample else 0.0))
        options["temperature"] = 0.0 if sample is False else temperature
        return {**options, "max_tokens": limit, "stop": until}, until

    def _batches(self, rows: Sequence[_T], size: Any) -> Iterator[list[_T]]:
        """Yield rows in order, as many together as the batch size allows; size(row) is its number
        of tokens, or of characters.
        """
        batch: list[_T] = []
        held = 0
        for row in rows:
            most = self._together or _MOST_TOGETHER
            long = self._together is None and held + size(row) > _TOKENS_TOGETHER
            if batch and (len(batch) >= most or long):
                yield batch
                batch, held = [], 0
            batch.append(row)
            held += size(row)
        if batch:
            yield batch


def _batch_size(given: int | str) -> int | None:
    """Return a number, None for "auto", of which the harness has forms such as "auto:4"."""
    if str(given).startswith("auto"):
        return None
    if not str(given).isdecimal() or int(given) < 1:
        raise OptionError("batch_size", given, "it must be a number of requests, or auto")
    return int(given)


def _grouped(
    asked: Iterable[tuple[int, str, Mapping[str, Any]]],
) -> list[tuple[Mapping[str, Any], list[tuple[int, str, Mapping[str, Any]]]]]:
    """Group requests, (number, text, arguments), by their arguments, the longest text first."""
    groups: dict[str, list[tuple[int, str, Mapping[str, Any]]]] = {}
    for row in asked:
        groups.setdefault(repr(sorted(row[2].items())), []).append(row)
    return [(g[0][2], sorted(g, key=lambda row: -len(row[1]))) for g in groups.values()]


def _up_to(text: str, until: Sequence[str]) -> str:
    """Return a text up to the first of some others, none of which is empty."""
    for stop in until:
        text = text.partition(stop)[0]
    return text
