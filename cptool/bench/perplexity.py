"""Perplexity of a text: exp of the mean negative log-likelihood of its tokens, window by window.

A text longer than a window is cut into windows that begin `stride` tokens apart. Each token is
scored in the first window that it is in, given the tokens before it there; the first token of a
window without an earlier one that holds it follows nothing, so it has no score.

- `stride` less than `window` is the sliding window of Hugging Face's "Perplexity of fixed-length
  models": from the second window on, a token has at least `window - stride` tokens before it.
- `stride` equal to `window` is the protocol of GPTQ (Frantar et al., 2022, arXiv:2210.17323),
  which also leaves out the last window unless it is whole. Its text of WikiText-2 is the lines of
  the data set, empty ones included, joined by blank lines.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cptool.engine.setup.loading import Setup, check_memory, load_for
from cptool.errors import OptionError

if TYPE_CHECKING:
    from cptool.checkpoint import Checkpoint
    from cptool.distributed.world import World
    from cptool.engine.engine import Engine

PHASE = "perplexity, window"
"""What the ranks' status board says meanwhile."""

WINDOW = 2048
"""Tokens of a window, in a model with room for them. The published figures of quantisation papers
are of this length, and only figures of one length compare: a longer context predicts better."""

_TOGETHER = 2048
"""Tokens that are read together, so that short windows do not make thin matrices."""


@dataclass(frozen=True)
class Window:
    """Tokens [start, stop) of a text, of which those from `first` on are scored."""

    start: int
    stop: int
    first: int

    @property
    def scored(self) -> int:
        return self.stop - self.first


def windows(tokens: int, *, window: int, stride: int, whole: bool = False) -> list[Window]:
    """Return the windows of a text of so many tokens, but those in which nothing is scored.

    whole: leave out a last window of less than `window` tokens.

    Raises OptionError for a stride that would leave tokens out, or a window without room for a
    token after another.
    """
    if window < 2:
        rule = "the first token of a window has no score; it must be at least 2"
        raise OptionError("window", window, rule)
    if not 1 <= stride <= window:
        rule = f"it must be 1 to the window of {window:,} tokens, or tokens would be left out"
        raise OptionError("stride", stride, rule)
    found, done = [], 0
    for start in range(0, tokens, stride):
        stop = min(start + window, tokens)
        first = max(done, start + 1)
        if first < stop and not (whole and stop - start < window):
            found.append(Window(start, stop, first))
        done = stop
        if stop == tokens:
            break
    return found


@dataclass(frozen=True, kw_only=True)
class Job:
    """A text's tokens, and the windows of it that are scored."""

    tokens: tuple[int, ...]
    windows: tuple[Window, ...]

    @property
    def batch(self) -> int:
        """Windows that are read together."""
        longest = max(window.stop - window.start for window in self.windows)
        return min(len(self.windows), max(1, _TOGETHER // longest))


class Sums:
    """Negative log-likelihoods in nats and how many tokens they are of, by the number of tokens
    before each in its window.
    """

    def __init__(self, window: int) -> None:
        self.nll, self.count = [0.0] * window, [0] * window

    def add(self, position: int, logprob: float) -> None:
        """Count a token."""
        self.nll[position] -= logprob
        self.count[position] += 1

    def of(self, first: int, stop: int) -> dict[str, Any]:
        """Return the fields of the tokens at positions [first, stop), of which there are some."""
        count = sum(self.count[first:stop])
        nll = math.fsum(self.nll[first:stop]) / count
        return {"scored": count, "nll": nll, "perplexity": _exp(nll)}

    def by_position(self) -> list[dict[str, Any]]:
        """Return the fields of each range of positions that has tokens: 1, 2 and 3, 4 to 7, ..."""
        first, found = 1, []
        while first < len(self.count):
            stop = min(2 * first, len(self.count))
            if any(self.count[first:stop]):
                found.append({"from": first, "to": stop - 1, **self.of(first, stop)})
            first = stop
        return found


def measure(world: World, setup: Setup, job: Job) -> dict[str, Any]:
    """Load the model of `setup`, score the job's windows, and return what rank 0 found; nothing on
    the others. Collective.

    Raises UserError, before anything is loaded, if a rank may not take the memory for it.
    """
    import torch

    began = time.perf_counter()
    longest = max(window.stop - window.start for window in job.windows)

    def check(checkpoint: Checkpoint) -> None:
        new = [longest] * job.batch
        check_memory(world, setup, setup.on(world, checkpoint, new=new, cached=[0] * job.batch))

    _, model = load_for(world, setup, before=check)
    loaded = time.perf_counter()
    sums = Sums(longest)
    variants: dict[str, int] = {}
    engine: Engine | None = None
    for done in range(0, len(job.windows), job.batch):
        world.report(PHASE, done, len(job.windows))
        some = job.windows[done : done + job.batch]
        if engine is None or len(engine.tokens) != len(some):
            engine = _engine(world, setup, model, batch=len(some))
        for variant, count in score(engine, job.tokens, some, sums).items():
            variants[variant] = variants.get(variant, 0) + count
    if world.rank:
        return {}
    return {
        **sums.of(0, longest),
        "results": sums.by_position(),
        "device": world.device.type,
        "threads": torch.get_num_threads(),
        "dtype": setup.dtype,
        "kv_dtype": setup.kv_dtype,
        "weights": setup.weights,
        "variants": variants,
        "load_s": loaded - began,
        "read_s": time.perf_counter() - loaded,
    }


def _engine(world: World, setup: Setup, model: Any, *, batch: int) -> Engine:
    """Return an engine that reports nothing, so that the windows are what progress counts."""
    from cptool.engine.engine import Engine
    from cptool.engine.world_profile import world_profile

    return Engine(model, world, batch=batch, options=setup.options, profile=world_profile(world))


def score(
    engine: Engine, tokens: Sequence[int], some: Sequence[Window], sums: Sums
) -> dict[str, int]:
    """Read some windows as a batch and add up the scores of rank 0; return how many forwards had
    each variant. Collective.
    """
    from cptool.engine.prefill.prompt import read

    engine.truncate([0] * len(some))
    texts = [tokens[window.start : window.stop] for window in some]
    first = [window.first - window.start for window in some]
    found = read(engine, texts, 0, scored_from=first)
    for row in found.scores or ():
        for position, score in enumerate(row):
            if score.logprob is not None:
                sums.add(position, score.logprob)
    return dict(found.variants)


def _exp(nll: float) -> float:
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf
