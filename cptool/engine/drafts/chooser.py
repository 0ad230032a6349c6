"""Choosing drafts by the rule by which the answer's own tokens are chosen."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from cptool.engine.answers.sampler import Sampler
from cptool.engine.drafts.source import Draft

if TYPE_CHECKING:
    import torch

    from cptool.engine.answers.records import AnswerOptions
    from cptool.engine.engine import Engine

_SURE = 0.2, 0.4, 0.6, 0.8, 0.9, 0.97
"""Bounds of the kinds of drafts, by the probability that their source gives them."""

PRIORS = 0.15, 0.3, 0.5, 0.65, 0.8, 0.9, 0.95
"""Part of the drafts of each kind that come true at first."""

_LARGEST = 1e30
"""A bound of logits that leaves room for penalties."""


class Chooser:
    """Chooses from the logits of a source what the answer's rule would choose from them, with the
    draw of that place: where the source is close to the model, so are their choices.

    texts[b]: the tokens of sequence b, of which known[b] had come when drafting began, and drafts
        that follow.
    """

    def __init__(self, engine: Engine, options: AnswerOptions) -> None:
        self._tokens = engine.tokens
        self.texts = [list(said) for said in engine.tokens]
        self.known = list(map(len, self.texts))
        self._sampling = options.sampling
        self._sampler = Sampler(options.sampling, self.texts, options.draws, engine.samples)

    def begin(self, sequences: Collection[int]) -> None:
        """Take back the drafts of these sequences, and append what they have now."""
        for b in sequences:
            known = self.known[b]
            self.texts[b][known:] = self._tokens[b][known:]
            self.known[b] = len(self._tokens[b])
            self._sampler.forget(b)

    def append(self, tokens: Mapping[int, int]) -> None:
        """Append the next token of each of these sequences, known or drafted."""
        for b, token in tokens.items():
            self.texts[b].append(token)

    def choose(self, logits: Mapping[int, torch.Tensor]) -> dict[int, Draft]:
        """Return a draft after each text of `logits`, float32 [vocabulary] each."""
        # No draft is an error: what is not finite, or would not be after a penalty, is replaced.
        rows = {b: row.nan_to_num().clamp(-_LARGEST, _LARGEST) for b, row in logits.items()}
        temperature = self._sampling.temperature or 1.0
        found = {}
        for b, token in self._sampler.picks(rows).items():
            scaled = rows[b] / temperature
            sure = math.exp(float(scaled[token] - scaled.logsumexp(0)))
            found[b] = token, sum(sure >= bound for bound in _SURE)
        return found
