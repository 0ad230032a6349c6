"""How the next token is chosen: the values of a sampling, and what they make of logits.

`cptool.engine.answers.sampler` applies them to a batch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cptool.errors import OptionError, RunError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Greedy at temperature 0, otherwise one draw; each step as transformers' `generate` has it.

    In this order, logits get `logit_bias` ((id, value), ...) added, and are lowered by the
    `repetition_penalty` for tokens of the prompt and the answer, by `frequency_penalty` for each
    time that the answer has a token and by `presence_penalty` if it has it at all. The largest is
    the greedy token. A draw is from softmax(logits / temperature), of which the `top_k` likeliest
    tokens stay (0: all), then the nucleus `top_p`, then the tokens that are at least `min_p` times
    as likely as the likeliest.

    transformers has no presence and frequency penalty; these are those of OpenAI's API. An answer
    begins where the call began that generates it. The nucleus is that of Llama's reference code,
    which keeps a token if the mass of the likelier ones is at most `top_p`; transformers drops it
    where they are equal.

    A draw depends on the seed, the index of the prompt, that of the sample (the answer, if a prompt
    has several) and the token's position alone: not on the number of ranks, the batch it shares,
    the number of samples, or where a session was saved in between.

    Raises OptionError for a value out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        for name, (fits, rule, remedy) in _RANGES.items():
            value = getattr(self, name)
            if not _is_number(value) or not fits(value):
                raise OptionError(name, value, rule, remedy)
        if type(self.top_k) is not int or self.top_k < 0:
            raise OptionError(
                "top_k", self.top_k, "it must be a whole number of tokens", "0 keeps every token"
            )
        if type(self.seed) is not int:
            raise OptionError("seed", self.seed, "it must be a whole number")
        seen = set()
        for token, value in self.logit_bias:
            shown = f"{token}={value}"
            if type(token) is not int or token < 0:
                raise OptionError("logit_bias", shown, "the token must be an id, 0 or more")
            if not _is_number(value) or not math.isfinite(value):
                raise OptionError("logit_bias", shown, "the value must be a finite number")
            if token in seen:
                raise OptionError("logit_bias", shown, "this token has a bias already", "give one")
            seen.add(token)

    @property
    def counts_tokens(self) -> bool:
        """Whether the choice depends on which tokens came before."""
        return self.repetition_penalty != 1 or self.counts_answers

    @property
    def counts_answers(self) -> bool:
        """Whether the choice depends on how often the answer has each token."""
        return bool(self.presence_penalty or self.frequency_penalty)

    def penalised(
        self,
        logits: torch.Tensor,
        seen: torch.Tensor | None = None,
        counts: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return `logits` with the bias and the penalties.

        logits: float32 [vocabulary]. seen: bool [vocabulary], tokens of the sequence; needed with
        a repetition penalty. counts: float32 [vocabulary], how often the answer has each; needed
        with a presence or frequency penalty.
        """
        if self.logit_bias:
            tokens, values = map(list, zip(*self.logit_bias, strict=True))
            logits = logits.clone()
            logits[tokens] += logits.new_tensor(values)
        if self.repetition_penalty != 1:
            assert seen is not None  # required above
            penalty = self.repetition_penalty
            logits = logits.where(~seen, (logits * penalty).where(logits < 0, logits / penalty))
        if self.counts_answers:
            assert counts is not None  # required above
            logits = logits - self.frequency_penalty * counts - self.presence_penalty * (counts > 0)
        return logits

    def distribution(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what a token is drawn from, likeliest first: probabilities float64 [vocabulary],
        0 for what may not be drawn, not normalised, and the token ids int64 [vocabulary].

        logits: those of `penalised`, float32 [vocabulary]. The temperature is above 0.
        """
        import torch

        # Relative to the largest, so that no temperature however small makes an infinity of it.
        relative = logits.double() - logits.max()
        if 0 < self.top_k < len(relative):
            relative[relative < relative.topk(self.top_k).values[-1]] = -math.inf
        probabilities = torch.softmax(relative / self.temperature, dim=-1)
        ordered, tokens = probabilities.sort(descending=True, stable=True)
        kept = ordered * (ordered.cumsum(-1) - ordered <= self.top_p)
        return kept * (kept >= self.min_p * kept[0]), tokens

    def draw(self, logits: torch.Tensor, *, sequence: int, position: int, sample: int = 0) -> int:
        """Draw the token for `position` of a sample of sequence `sequence` from
        `distribution(logits)`.
        """
        import torch

        probabilities, tokens = self.distribution(logits)
        index = f"{sequence}.{sample}" if sample else f"{sequence}"
        key = hashlib.sha256(f"{self.seed}/{index}/{position}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little", signed=True))
        return int(tokens[int(torch.multinomial(probabilities.cpu(), 1, generator=generator))])


def likeliest(logits: torch.Tensor) -> torch.Tensor:
    """Return the index of the largest value along the last dimension, -1 if it is not finite; a NaN
    counts as the largest.
    """
    tokens = logits.argmax(-1, keepdim=True)
    return tokens.where(logits.gather(-1, tokens).isfinite(), -1).squeeze(-1)


def check_finite(token: int, sequence: int, position: int) -> int:
    """Return a token of `likeliest`; RunError if it is none."""
    if token < 0:
        raise RunError(
            f"sequence {sequence + 1}: the logits after {position} tokens are not finite; use "
            "another `dtype` (float16 overflows at 65504), or fetch the checkpoint again"
        )
    return token


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


_PENALTY = (lambda value: -2 <= value <= 2, "it must lie in [-2, 2]", "0 changes nothing")

_RANGES: dict[str, tuple[Callable[[float], bool], str, str]] = {
    "temperature": (
        lambda value: 0 <= value < math.inf,
        "it must be 0 (greedy) or a positive number",
        "",
    ),
    "top_p": (lambda value: 0 < value <= 1, "it must lie in (0, 1]", "1 keeps every token"),
    "min_p": (lambda value: 0 <= value <= 1, "it must lie in [0, 1]", "0 keeps every token"),
    "repetition_penalty": (
        lambda value: 0 < value < math.inf,
        "it must be a positive number",
        "1 changes nothing",
    ),
    "presence_penalty": _PENALTY,
    "frequency_penalty": _PENALTY,
}
"""Of each number: whether a value is in range, the rule, and the remedy."""
