"""Choosing the tokens that follow a batch of sequences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from cptool.engine.sampling import Sampling, check_finite, likeliest


class Sampler:
    """Chooses tokens under a sampling, and keeps count of those that it penalises.

    tokens: those of each sequence, which the caller appends to; what is appended from now on is the
        answer.
    draws: the index that each prompt's draws depend on; by default its place in the batch.
    samples: answers to each prompt, which follow one another in the batch.
    """

    def __init__(
        self,
        sampling: Sampling,
        tokens: Sequence[Sequence[int]],
        draws: Sequence[int] | None = None,
        samples: int = 1,
    ) -> None:
        self.sampling, self._tokens, self._samples = sampling, tokens, samples
        self._draws = range(len(tokens)) if draws is None else draws
        self._begins = list(map(len, tokens))
        self._counts: dict[int, _Counts] = {}

    def picks(self, logits: Mapping[int, torch.Tensor]) -> dict[int, int]:
        """Return the token that follows each sequence of `logits`, float32 [vocabulary] each.

        The largest logits of all sequences come from the device together: each way there and back
        costs as much as a small kernel. RunError where one is not finite.
        """
        if not logits:
            return {}
        rows = [self._penalised(b, row) for b, row in logits.items()]
        largest = likeliest(torch.stack(rows) if len(rows) > 1 else rows[0][None]).tolist()
        picks = {}
        for b, row, token in zip(logits, rows, largest, strict=True):
            position, (prompt, sample) = len(self._tokens[b]), divmod(b, self._samples)
            picks[b] = check_finite(token, prompt, position)
            if self.sampling.temperature:
                index = self._draws[prompt]
                picks[b] = self.sampling.draw(row, sequence=index, sample=sample, position=position)
        return picks

    def forget(self, b: int) -> None:
        """Count the tokens of sequence b anew: some that it had were taken back."""
        self._counts.pop(b, None)

    def _penalised(self, b: int, logits: torch.Tensor) -> torch.Tensor:
        if not self.sampling.counts_tokens:
            return self.sampling.penalised(logits)
        if b not in self._counts:
            self._counts[b] = _Counts(logits, self._begins[b])
        counts = self._counts[b]
        counts.read(self._tokens[b])
        return self.sampling.penalised(logits, counts.seen, counts.answered)


class _Counts:
    """Which tokens a sequence has, and how often its answer has each; both [vocabulary]."""

    def __init__(self, logits: torch.Tensor, begin: int) -> None:
        self.seen = torch.zeros_like(logits, dtype=torch.bool)
        self.answered = torch.zeros_like(logits)
        self._begin, self._read = begin, 0

    def read(self, tokens: Sequence[int]) -> None:
        """Count the tokens that were appended since the last call."""
        new = torch.tensor(tokens[self._read :], dtype=torch.int64, device=self.seen.device)
        self.seen[new] = True
        answered = new[max(self._begin - self._read, 0) :]
        self.answered.index_add_(0, answered, torch.ones_like(answered, dtype=torch.float32))
        self._read = len(tokens)
