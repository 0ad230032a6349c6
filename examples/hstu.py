"""The block of HSTU over sequences that ranks share by context, against its formula in float64.

    python examples/hstu.py                              # one process
    torchrun --nproc-per-node 2 examples/hstu.py         # two, with half of the tokens each

HSTU is the recommender of "Actions Speak Louder than Words" (Zhai et al., 2024). A sequence is a
user's history, followed by target items to be ranked, of which each sees the history and itself.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import silu

import cptool

Counts = Sequence[int]


class HSTUBlock(nn.Module):
    """One layer of HSTU, with N = `max_len`:

    U, V, Q, K = split(LayerNorm(x) W + b), U = SiLU(U)
    A = SiLU(Q K^T / sqrt(head_dim)) / N, masked
    y = x + [U, A V, U * LayerNorm(A V)] W_o

    window: how many positions a token sees, its own the last; None for all before it.
    """

    def __init__(
        self, width: int, heads: int, head_dim: int, *, max_len: int, window: int | None = None
    ) -> None:
        super().__init__()
        self.heads, self.head_dim, self.max_len, self.window = heads, head_dim, max_len, window
        inner = heads * head_dim
        self.input_norm = nn.LayerNorm(width, eps=1e-6)
        self.uvqk = nn.Linear(width, 4 * inner)
        self.attention_norm = nn.LayerNorm(inner, eps=1e-6)
        self.output = nn.Linear(3 * inner, width, bias=False)

    def forward(
        self, x: Tensor, lengths: Counts, targets: Counts, group: dist.ProcessGroup | None = None
    ) -> Tensor:
        """Return y `[T_local, width]` from x, this rank's tokens as `cptool.shard` deals them.

        lengths, targets: tokens of each sequence of the whole batch, and how many of its last ones
        are targets.
        """
        u, *vqk = self.uvqk(self.input_norm(x)).chunk(4, dim=-1)
        v, q, k = (part.unflatten(-1, (self.heads, self.head_dim)) for part in vqk)
        attended = cptool.hstu_attention(
            q,
            k,
            v,
            lengths,
            group,
            max_len=self.max_len,
            targets=targets,
            window=self.window,
        )
        return self._output(x, silu(u), attended.flatten(1))

    def formula(self, x: Tensor, lengths: Counts, targets: Counts) -> Tensor:
        """Return y of the whole batch with plain torch, in the type of x and the parameters."""
        u, *vqk = self.uvqk(self.input_norm(x)).chunk(4, dim=-1)
        v, q, k = (part.unflatten(-1, (self.heads, self.head_dim)) for part in vqk)
        attended, first = torch.zeros_like(v), 0
        for length, own in zip(lengths, targets, strict=True):
            rows, history = slice(first, first + length), length - own
            # A target counts as standing at the end of the history.
            stands = torch.arange(length).clamp(max=history)
            distance = stands[:, None] - stands[None, :]
            sees = (distance > 0) | torch.eye(length, dtype=torch.bool)
            if self.window is not None:
                sees &= distance < self.window
            scores = torch.einsum("ihd,jhd->hij", q[rows], k[rows]) * self.head_dim**-0.5
            weights = (silu(scores) / self.max_len).masked_fill(~sees, 0)
            attended[rows] = torch.einsum("hij,jhd->ihd", weights, v[rows])
            first += length
        return self._output(x, silu(u), attended.flatten(1))

    def _output(self, x: Tensor, u: Tensor, attended: Tensor) -> Tensor:
        gated = u * self.attention_norm(attended)
        return x + self.output(torch.cat([u, attended, gated], dim=-1))


@torch.no_grad()
def compare(
    lengths: Counts,
    targets: Counts,
    group: dist.ProcessGroup | None = None,
    *,
    window: int | None = None,
) -> tuple[float, float]:
    """Return how far two blocks over the ranks of `group` are from the formula in float64, and how
    far the formula in float32 is.
    """
    torch.manual_seed(0)
    layers = [HSTUBlock(96, 4, 64, max_len=256, window=window) for _ in range(2)]
    x = torch.randn(sum(lengths), 96)
    mine = cptool.shard(x, lengths, group)
    for layer in layers:
        mine = layer(mine, lengths, targets, group)
    found = cptool.unshard(mine, lengths, group)
    exact, plain = x.double(), x
    for layer in layers:
        exact = copy.deepcopy(layer).double().formula(exact, lengths, targets)
        plain = layer.formula(plain, lengths, targets)
    return float((found - exact).abs().max()), float((plain - exact).abs().max())


def main() -> int:
    """Print both errors; return 1 if that of the ranks is more than twice that of float32."""
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    error, plain = compare([150, 1, 37, 0], [20, 1, 0, 0], window=90)
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(f"2 blocks on {ranks} ranks: {error:.2g} from float64; plain float32: {plain:.2g}")
    if dist.is_initialized():
        dist.destroy_process_group()
    return int(error > 2 * plain)


if __name__ == "__main__":
    sys.exit(main())
