"""Choosing the next token from logits."""

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cptool.errors import OptionError, RunError

if TYPE_CHECKING:
    import torch

    from cptool.checkpoint.sampling import SamplingDefaults


@dataclass(frozen=True)
class Sampling:
    """Greedy at temperature 0; otherwise one draw from the nucleus `top_p` of softmax(logits /
    temperature).

    A draw depends on the seed, the sequence's index and the token's position alone: not on the
    number of ranks, the batch it shares, or where a session was saved in between.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise OptionError(
                "temperature", self.temperature, "it must be 0 (greedy) or a positive number"
            )
        if not 0 < self.top_p <= 1:
            raise OptionError("top_p", self.top_p, "it must lie in (0, 1]", "1 keeps every token")

    def picks(self, logits: "dict[int, torch.Tensor]", positions: list[int]) -> dict[int, int]:
        """Return `pick` for each sequence of `logits`, at its entry of `positions`.

        Greedy picks come from the device together: each way there and back costs as much as a small
        kernel.
        """
        import torch

        if self.temperature == 0 and len(logits) > 1:
            tokens = _likeliest(torch.stack(list(logits.values()))).tolist()
            return {
                b: _finite(token, b, positions[b]) for b, token in zip(logits, tokens, strict=True)
            }
        return {b: self.pick(row, sequence=b, position=positions[b]) for b, row in logits.items()}

    def pick(self, logits: "torch.Tensor", *, sequence: int, position: int) -> int:
        """Return the token for `position` of sequence `sequence`, from its logits float32
        [vocabulary].

        RunError where they have no finite largest.
        """
        import torch

        token = _finite(int(_likeliest(logits)), sequence, position)
        if self.temperature == 0:
            return token
        # Relative to the largest, so that no temperature however small makes an infinity of it.
        relative = logits.double() - logits.max()
        probabilities = torch.softmax(relative / self.temperature, dim=-1)
        ordered, tokens = probabilities.sort(descending=True, stable=True)
        # A token stays while the mass before it is within top_p, so the likeliest always stays
        # (Llama's reference rule).
        kept = ordered * (ordered.cumsum(-1) - ordered <= self.top_p)
        key = hashlib.sha256(f"{self.seed}/{sequence}/{position}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little", signed=True))
        return int(tokens[int(torch.multinomial(kept.cpu(), 1, generator=generator))])


def resolve(
    author: "SamplingDefaults", temperature: float | None, top_p: float | None, *, seed: int
) -> Sampling:
    """Return the sampling with the author's temperature and top-p in place of None.

    Greedy if the author gives no temperature either. Raises OptionError for a value out of range.
    """
    temperature = author.temperature if temperature is None else temperature
    top_p = author.top_p if top_p is None else top_p
    return Sampling(
        temperature=0.0 if temperature is None else temperature,
        top_p=1.0 if top_p is None else top_p,
        seed=seed,
    )


def _likeliest(logits: "torch.Tensor") -> "torch.Tensor":
    """Return the index of the largest value along the last dimension, -1 if it is not finite; a NaN
    counts as the largest.
    """
    tokens = logits.argmax(-1, keepdim=True)
    return tokens.where(logits.gather(-1, tokens).isfinite(), -1).squeeze(-1)


def _finite(token: int, sequence: int, position: int) -> int:
    if token < 0:
        raise RunError(
            f"sequence {sequence + 1}: the logits after {position} tokens are not finite; use "
            "another `dtype` (float16 overflows at 65504), or fetch the checkpoint again"
        )
    return token
