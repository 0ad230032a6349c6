"""The rows of `cptool bench levers`: what each switches on, and what all of them do."""

from __future__ import annotations

from dataclasses import dataclass

from cptool.quantisation import FP8_FEED_FORWARD, QUANTISED

WIDE = "dtype"
"""Weights in the dtype of the products, whatever the file has."""


@dataclass(frozen=True, kw_only=True)
class Lever:
    """A row: what is switched on.

    weights: WIDE, "file", or what they are quantised to. compiled: the feed-forward layers by
    `torch.compile`. The others are options of the engine and of the answer.
    """

    name: str
    weights: str = WIDE
    naive: bool = False
    static: bool = False
    compiled: bool = False
    draft: str = "off"
    ranks: int = 1

    @property
    def model(self) -> tuple[str, bool, bool]:
        """What tells its model from those of other rows."""
        return self.weights, self.compiled, self.ranks > 1


def levers(device: str, *, layers: int, stored: bool, ranks: int) -> list[Lever]:
    """Return the rows for a device: naive attention, and what is switched on instead.

    layers: of the model, of which a third drafts. stored: whether the file has weights in fewer
    bits than the dtype of the products, in which they can be read. ranks: of the row on several
    ones, if there are several.
    """
    found = [Lever(name="naive attention", naive=True), Lever(name="fused attention")]
    together = []
    if device == "cuda":
        found += [
            Lever(name="CUDA graph", static=True),
            Lever(name="torch.compile", static=True, compiled=True),
            Lever(name=FP8_FEED_FORWARD, weights=FP8_FEED_FORWARD, static=True),
        ]
    else:
        found.append(Lever(name="static memory", static=True))
        kinds = [*(["file"] if stored else []), *QUANTISED, FP8_FEED_FORWARD]
        found += [Lever(name=f"weights {kind}", weights=kind) for kind in kinds]
        found.append(Lever(name="lookup drafts", draft="lookup"))
        if layers > 1:
            draft = f"layers:{max(1, layers // 3)}"
            found.append(Lever(name=f"{draft} drafts", draft=draft))
        if stored:
            together = [Lever(name="file, drafts", weights="file", draft="lookup")]
    if ranks > 1:
        found.append(Lever(name=f"cp {ranks}", static=device == "cuda", ranks=ranks))
    return [*found, *together]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What every row does: read `prompt`, append `answer` tokens, and score `scored`.

    repeats: rounds that count.
    """

    model: str
    dtype: str
    levers: tuple[Lever, ...]
    prompt: tuple[int, ...]
    scored: tuple[int, ...]
    answer: int
    repeats: int
