"""How far the reading of a prompt is, over all its chunks.

Work is counted in visible pairs of a query and a key, for which attention takes its time, and in
tokens, for everything else: the same chunk takes longer the more tokens are cached before it. The
cost model says what a pair and a token take until layers of this very prompt have said it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cptool.engine.prefill import chunks
from cptool.planning.chunks import plan_chunk
from cptool.planning.cost.counts import visible_pairs

if TYPE_CHECKING:
    from cptool.engine.prefill.forwards import Forwards
    from cptool.model.config import LlamaConfig
    from cptool.planning.cost.forward import Prediction


@dataclass
class Seconds:
    """What takes a layer's time: attention, with its transfers, and everything else."""

    attention: float
    others: float

    @staticmethod
    def of(layer: Prediction) -> Seconds:
        """Return the two parts of a layer as predicted."""
        attention = layer.attention_s + layer.merge_s + layer.exposed_s
        return Seconds(attention, layer.seconds - attention)


class Course:
    """The work of a prompt, and how much of it is done.

    tokens, chunks: of the whole prompt. began: when its reading did, on the monotonic clock.
    chunk: index of the one under way. done: tokens of those before it.

    left: tokens of each sequence to compute over `computed[b]` ones, in chunks of `most`.
    predicted: of a layer of the chunk in the middle of the prompt. config: of the model, None for
        one without windows.
    """

    def __init__(
        self,
        left: Sequence[int],
        computed: Sequence[int],
        *,
        most: int,
        predicted: Seconds,
        config: LlamaConfig | None = None,
    ) -> None:
        self._config = config
        self.tokens, self.chunks = sum(left), chunks.count(left, most)
        self.began = time.monotonic()
        self.chunk, self.done = -1, 0
        self._pairs, self._pairs_done = self._visible(left, computed), 0
        self._now = (0, 0)
        self._predicted = predicted
        # Sums over layers that have run: their time, and the pairs and tokens that they were for.
        self._measured = Seconds(0.0, 0.0)
        self._counted = (0, 0)
        self._share = 0.0

    @staticmethod
    def of(engine: Forwards, left: Sequence[int], most: int) -> Course:
        """Return the course of a prompt that `engine` is about to read."""
        whole = engine.forward(left)
        new = min(whole.new, most)
        middle = replace(whole, new=new, cached=whole.cached + (whole.new - new) // 2)
        planned = plan_chunk(middle, engine.profile, variant=engine.variant)
        layer = Seconds.of(planned.estimate.layer)
        return Course(left, engine.computed, most=most, predicted=layer, config=whole.config)

    def begin(self, lengths: Sequence[int], computed: Sequence[int]) -> None:
        """Begin a chunk of `lengths[b]` tokens over `computed[b]` ones."""
        self.done += self._now[1]
        self._pairs_done += self._now[0]
        self._now = (self._visible(lengths, computed), sum(lengths))
        self.chunk += 1

    def took(self, attention_s: float, others_s: float) -> None:
        """Take what a whole layer of this chunk took."""
        self._measured.attention += attention_s
        self._measured.others += others_s
        self._counted = (self._counted[0] + self._now[0], self._counted[1] + self._now[1])

    @property
    def attention(self) -> float:
        """The share of attention in a layer of this chunk."""
        attention, whole = self._weight(self._now[0], 0), self._weight(*self._now)
        return attention / whole if whole else 0.5

    @property
    def part(self) -> float:
        """The share of this chunk in the whole prompt."""
        whole = self._weight(self._pairs, self.tokens)
        return self._weight(*self._now) / whole if whole else 1.0

    def share(self, within: float) -> float:
        """Return the share of the prompt's work that is done once `within` of this chunk is."""
        whole = self._weight(self._pairs, self.tokens)
        before = self._weight(self._pairs_done, self.done) / whole if whole else 0.0
        # New weights of pairs and tokens may put what is done a little lower.
        self._share = max(self._share, min(1.0, before + self.part * within))
        return self._share

    def _weight(self, pairs: int, tokens: int) -> float:
        """Return the seconds per layer of so many pairs and tokens, all chunks together."""
        seconds, of = self._measured, self._counted
        if not (all(of) and seconds.attention + seconds.others > 0):
            seconds = self._predicted
            of = (max(1, self._pairs // self.chunks), max(1, self.tokens // self.chunks))
        return seconds.attention * pairs / of[0] + seconds.others * tokens / of[1]

    def _visible(self, lengths: Sequence[int], computed: Sequence[int]) -> int:
        """Return the pairs of a new token and a key that it sees, of the mean layer."""
        pairs = list(zip(lengths, computed, strict=True))
        if self._config is None or self._config.windows is None:
            return sum(n * before + n * (n + 1) // 2 for n, before in pairs)
        seen = sum(visible_pairs(self._config, n, before) for n, before in pairs)
        return seen // self._config.num_hidden_layers
