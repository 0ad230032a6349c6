"""How the tokens of a batch are dealt to the ranks of a user's group: the layout of
`cptool.functional`, which follows from the lengths of the sequences alone.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from cptool.errors import OptionError, UserError
from cptool.parallel.groups import group_of
from cptool.parallel.step import Step, only
from cptool.sharding import Placement, balanced

Lengths = int | Sequence[int] | torch.Tensor
"""Tokens of each sequence of the whole batch, the same on all ranks; an int is one sequence."""


@dataclass(frozen=True)
class Deal:
    """Which rank has which tokens of a batch.

    targets: how many of the last tokens of each sequence are targets: tokens that stand at the end
        of the history before them and whose keys no other token sees (`cptool.hstu_attention`).
    """

    lengths: tuple[int, ...]
    rank: int
    size: int
    targets: tuple[int, ...]

    @functools.cached_property
    def placements(self) -> tuple[Placement, ...]:
        """The tokens of each rank."""
        return balanced(self.lengths, self.size).placements()

    @functools.cached_property
    def sizes(self) -> list[int]:
        """Number of tokens per rank."""
        return [placement.tokens for placement in self.placements]

    @property
    def tokens(self) -> int:
        """Tokens of this rank."""
        return self.sizes[self.rank]

    @functools.cached_property
    def indices(self) -> torch.Tensor:
        """int64 [T_local]: where this rank's tokens lie in the whole batch."""
        return balanced(self.lengths, self.size).indices(self.rank)

    @functools.cached_property
    def order(self) -> torch.Tensor:
        """int64 [T]: where the batch's tokens lie in the ranks' tokens in rank order."""
        layout = balanced(self.lengths, self.size)
        return torch.cat([layout.indices(rank) for rank in range(self.size)]).argsort()

    def check_tokens(self, **tensors: torch.Tensor) -> None:
        """Raise UserError unless each tensor holds this rank's tokens."""
        for name, tensor in tensors.items():
            if tensor.dim() != 3 or tensor.shape[0] != self.tokens:
                raise OptionError(
                    name,
                    f"of shape {list(tensor.shape)}",
                    f"rank {self.rank} of {self.size} has {self.tokens} of the "
                    f"{sum(self.lengths)} tokens, so it must be [{self.tokens}, heads, head_dim]",
                    "cptool.shard deals the tokens",
                )

    @functools.cached_property
    def _steps(self) -> dict[tuple[torch.device, bool], Step]:
        return {}

    def step(self, device: torch.device, *, causal: bool = True) -> Step:
        """Return the step of a forward; without `causal`, every query stands at its sequence's end,
        where it sees all keys.

        Keys are those of the histories; `target_rows` alone see the others, each its own.
        """
        if (device, causal) not in self._steps:
            tokens = tuple(placement.to(device) for placement in self.placements)
            queries = keys = tokens
            if any(self.targets):
                queries = tuple(self._before_targets(placement) for placement in tokens)
                keys = tuple(only(p, self._rows(p, targets=False)) for p in tokens)
            elif not causal:
                last = torch.tensor(self.lengths, dtype=torch.int32, device=device) - 1
                queries = tuple(
                    replace(p, positions=last.repeat_interleave(p.cu_seqlens.diff()))
                    for p in tokens
                )
            self._steps[device, causal] = Step(self.rank, queries, keys)
        return self._steps[device, causal]

    def history_rows(self, device: torch.device) -> torch.Tensor | None:
        """Return int64 indices of this rank's tokens that are no targets; None for all."""
        if not any(self.targets):
            return None
        return self._own_rows(device, targets=False)

    def target_rows(self, device: torch.device) -> torch.Tensor:
        """Return int64 indices of this rank's targets."""
        return self._own_rows(device, targets=True)

    @functools.cached_property
    def _rows_on(self) -> dict[tuple[torch.device, bool], torch.Tensor]:
        return {}

    def _own_rows(self, device: torch.device, *, targets: bool) -> torch.Tensor:
        if (device, targets) not in self._rows_on:
            rows = self._rows(self.placements[self.rank], targets=targets)
            self._rows_on[device, targets] = rows.to(device)
        return self._rows_on[device, targets]

    def _before_targets(self, tokens: Placement) -> Placement:
        """Return the tokens with targets at the end of their history."""
        return replace(tokens, positions=torch.minimum(tokens.positions, self._histories(tokens)))

    def _rows(self, tokens: Placement, *, targets: bool) -> torch.Tensor:
        are = tokens.positions >= self._histories(tokens)
        return (are if targets else ~are).nonzero().flatten()

    def _histories(self, tokens: Placement) -> torch.Tensor:
        """Return int32 [T]: the length of the history in each token's sequence."""
        lengths = [n - own for n, own in zip(self.lengths, self.targets, strict=True)]
        of_sequence = torch.tensor(lengths, dtype=torch.int32, device=tokens.positions.device)
        return of_sequence.repeat_interleave(tokens.cu_seqlens.diff())


# All layers of a forward share one; a few more for batches that take turns.
_deal = functools.lru_cache(maxsize=8)(Deal)


def deal_of(
    lengths: Lengths, group: dist.ProcessGroup | None, targets: Lengths | None = None
) -> Deal:
    """Return how sequences of these lengths are dealt to the ranks of `group`.

    Raises UserError unless `lengths` are counts of tokens, and `targets` of some of them each.
    """
    process_group = group_of(group)
    rank, size = (process_group.rank(), process_group.size()) if process_group else (0, 1)
    counts = _counts("lengths", lengths)
    own = (0,) * len(counts) if targets is None else _counts("targets", targets)
    if len(own) != len(counts) or any(t > n for t, n in zip(own, counts, strict=True)):
        raise UserError(
            f"`targets` {list(own)}: each must be at most that of `lengths` {list(counts)}"
        )
    return _deal(counts, rank, size, own)


def _counts(name: str, lengths: Lengths) -> tuple[int, ...]:
    """Return `lengths` as a tuple. Raise UserError unless they are counts of tokens."""
    if isinstance(lengths, torch.Tensor):
        lengths = lengths.tolist()
    counts = (lengths,) if isinstance(lengths, int) else tuple(lengths)
    if not all(isinstance(count, int) and count >= 0 for count in counts):
        raise UserError(f"`{name}` {list(counts)}: they must be numbers of tokens, 0 or more")
    return counts
