"""How an answer is generated: the keyword arguments of every method that generates."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

from cptool import variants
from cptool.engine.answers.request import AnswerRequest
from cptool.engine.options import EngineOptions
from cptool.engine.prefill.chunks import check_chunk
from cptool.engine.sampling import Sampling
from cptool.engine.sampling_request import SamplingRequest
from cptool.errors import OptionError
from cptool.quantisation import AUTO, WEIGHTS, is_known
from cptool.session.manifest import DTYPES

if TYPE_CHECKING:
    from cptool.checkpoint import Checkpoint

DEFAULT_TOKENS = 128
"""Tokens that a call generates at most by default."""

_Method = TypeVar("_Method", bound=Callable[..., Any])


class EngineSettings(TypedDict, total=False):
    """Options of `cptool.LLM` for its memory:

    kv_dtype: type in which keys and values are stored and sent: "auto" for that of the products,
        or with float32 products on a CPU also "bfloat16" or "float16".
    weights: "file" to keep weights as the file stores them, "q8_0" or "int8" to quantise float
        matrices while loading, or "auto" to do so where it makes their products faster; "fp8-ffn"
        for feed-forward layers in FP8, their activations too, which other devices than CUDA ones
        from compute capability 8.9 on compute slowly.
    chunk: tokens of a prompt, over all prompts of a call together, that go through the model at a
        time, or "auto" for the largest number that fits in memory and adds little to that of
        weights and KV.
    memory: bytes per rank in all that "auto" may use, None for its part of what there is.
    kv_memory: bytes of KV per rank that stay in memory; the rest lies in a file in the temporary
        directory, which each further token reads. None for all in memory.
    """

    kv_dtype: str
    weights: str
    chunk: int | str
    kv_memory: int | None
    memory: int | None


def engine_options(variant: str, settings: EngineSettings) -> EngineOptions:
    """Return the options of the engines of an LLM.

    Raises OptionError for a value that is not allowed, TypeError for a name that is no option.
    """
    for name in settings:
        if name not in EngineSettings.__annotations__:
            raise TypeError(f"unexpected keyword argument {name!r}")
    if variant not in (known := ("auto", *variants.names())):
        raise OptionError("variant", variant, f"it must be one of {', '.join(known)}")
    kv_dtype = settings.get("kv_dtype", "auto")
    check_dtype("kv_dtype", kv_dtype)
    weights = settings.get("weights", "file")
    if weights not in (*WEIGHTS, AUTO) and not is_known(weights):
        raise OptionError("weights", weights, f"it must be one of {', '.join((*WEIGHTS, AUTO))}")
    chunk: Any = settings.get("chunk", "auto")
    check_chunk(chunk if chunk != "auto" else None)
    return EngineOptions(
        variant=variant,
        kv_dtype=kv_dtype,
        weights=weights,
        chunk=None if chunk == "auto" else chunk,
        kv_memory=_checked_memory("kv_memory", settings.get("kv_memory")),
        memory=_checked_memory("memory", settings.get("memory")),
    )


def _checked_memory(name: str, value: Any) -> int | None:
    if value is not None and (type(value) is not int or value < 1):
        raise OptionError(name, value, "it must be a number of bytes, or None")
    return value


def check_dtype(name: str, value: str) -> None:
    """Raise OptionError unless the option `name` is "auto" or a type to compute or store in."""
    if value not in ("auto", *DTYPES):
        raise OptionError(name, value, f"it must be auto or one of {', '.join(DTYPES)}")


class GenerateOptions(TypedDict, total=False):
    """Options, all of them keyword arguments:

    max_tokens: generate up to this many tokens, fewer if the context is full before; 0 reads the
        prompt alone.
    temperature: 0 is greedy.
    top_p: draw from the likeliest tokens of this mass; 1 is all.
    top_k: draw from this many likeliest tokens; 0 is all.
    min_p: draw from tokens at least this many times as likely as the likeliest; 0 is all.
    repetition_penalty: above 1, tokens of the prompt and the answer become less likely.
    presence_penalty: lower the logits of tokens that the answer has by this, -2 to 2.
    frequency_penalty: lower a token's logit by this for each time that the answer has it, -2 to 2.
    logit_bias: a dict of token ids and what is added to their logits.
    stop: a text or several that end an answer, which is shown up to it.
    logprobs: report the log-probability of each token, and this many of the likeliest in its place.
    prompt_logprobs: report the same of each token that the call reads.
    draft: "lookup" to compute several tokens in a step where the last ones occurred before, prompt
        or answer: what came next there is checked, and kept if it comes next here. "layers:E" has
        the first E layers of the model draft, and the name of a small model with the same
        vocabulary that model. The answers are the same. "off", or "auto": lookup where the batch
        and the ranks allow it.
    seed: of the draws, which depend on it, the sequence's index and the token's position alone.

    Where the default is None, it is the value of the model's author, if there is one. Without any,
    the most likely token is taken.
    """

    max_tokens: int
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    stop: str | Sequence[str]
    logprobs: int | None
    prompt_logprobs: int | None
    draft: str
    seed: int


@dataclass(frozen=True)
class Answering:
    """The options of a call: complete, in range, and as the ranks take them.

    wanted: what `AnswerRequest.fields` returns.
    """

    max_tokens: int
    sampling: Sampling
    wanted: Mapping[str, Any]

    @staticmethod
    def of(options: GenerateOptions, checkpoint: Checkpoint) -> Answering:
        """Complete `options` for a model.

        Raises OptionError for a value out of range, TypeError for a name that is no option.
        """
        given: dict[str, Any] = dict(options)
        for name in given:
            if name not in GenerateOptions.__annotations__:
                known = ", ".join(GenerateOptions.__annotations__)
                raise TypeError(f"unexpected keyword argument {name!r}; the options are {known}")
        count = given.pop("max_tokens", DEFAULT_TOKENS)
        if type(count) is not int or count < 0:
            raise OptionError(
                "max_tokens",
                count,
                "it must be a whole number of tokens",
                "0 reads the prompt alone",
            )
        bias = given.pop("logit_bias", {})
        if not isinstance(bias, Mapping):
            rule = "it must be a dict of token ids and numbers"
            raise OptionError("logit_bias", bias, rule, "such as {198: -5.5}")
        stop = given.pop("stop", ())
        if not isinstance(stop, Sequence):
            raise OptionError("stop", stop, "it must be a text or a list of texts", "leave it out")
        wanted = AnswerRequest(
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            logprobs=given.pop("logprobs", None),
            prompt_logprobs=given.pop("prompt_logprobs", None),
            draft=given.pop("draft", "off"),
        ).fields(checkpoint)
        request = SamplingRequest(**given, logit_bias=tuple(bias.items()))
        return Answering(count, request.resolve(checkpoint), wanted)


def check_samples(samples: int) -> None:
    """Raise OptionError for a number of answers to each prompt that cannot be."""
    if type(samples) is not int or samples < 1:
        rule = "it must be a whole number of answers to each prompt"
        raise OptionError("samples", samples, rule, "1 is one answer")


def takes_options(method: _Method) -> _Method:
    """Show the options in the signature of a method that takes `**options`."""
    defaults = {**vars(SamplingRequest()), **vars(AnswerRequest())}
    defaults |= {"max_tokens": DEFAULT_TOKENS, "logit_bias": {}}
    signature = inspect.signature(method)
    shown = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    for name, kind in GenerateOptions.__annotations__.items():
        text = getattr(kind, "__forward_arg__", kind)
        shown.append(
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=defaults[name], annotation=text
            )
        )
    method.__signature__ = signature.replace(parameters=shown)  # type: ignore[attr-defined]
    return method


def describes_options(method: _Method) -> _Method:
    """Append the description of the options to a method's help."""
    method.__doc__ = f"{inspect.getdoc(method)}\n\n{inspect.getdoc(GenerateOptions)}"
    return method
