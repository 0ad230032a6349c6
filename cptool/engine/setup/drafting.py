"""The model that drafts beside the one that answers: the memory that it takes, and loading it.
Imports no torch until then.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cptool.engine.drafts.names import model_of
from cptool.engine.setup.types import mean_weight_size
from cptool.planning.prediction import Work, memory_of
from cptool.planning.strategy import AUTO

if TYPE_CHECKING:
    from cptool.distributed.world import World
    from cptool.engine.drafts.small import SmallModel
    from cptool.engine.setup.loading import Setup
    from cptool.planning.hardware import HardwareProfile

PIECE = 2048
"""Tokens that the model that drafts reads at a time."""


def bytes_of(setup: Setup, draft: str, work: Work, profile: HardwareProfile) -> float:
    """Return the bytes that the model `draft` takes on rank 0 beside the turn `work` of `setup`; 0
    if another source drafts.
    """
    path = model_of(draft)
    if path is None or profile.device != "cpu":
        return 0.0
    lengths = [new + cached for new, cached in zip(work.new, work.cached, strict=True)]
    alone = _work(setup, path, lengths, answer=work.answer, samples=work.samples)
    parts = memory_of(alone, AUTO, profile, chunk=PIECE, limit=math.inf)
    return sum(parts.values()) - parts["process"]


def _work(setup: Setup, path: str, lengths: Sequence[int], *, answer: int, samples: int) -> Work:
    """Return what the model at `path` computes of texts of these lengths, as the cost model
    describes it.
    """
    from cptool.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(path)
    return Work(
        config=checkpoint.config,
        dtype=setup.dtype,
        new=lengths,
        cached=[0] * len(lengths),
        answer=answer,
        samples=samples,
        weight_size=mean_weight_size(checkpoint, setup.dtype, "cpu"),
        local=1,
    )


def load(world: World, setup: Setup, draft: str) -> SmallModel | None:
    """Load the model `draft` on rank 0; return None if another source drafts, or where none can.
    Collective.
    """
    path = model_of(draft)
    if path is None or world.device.type != "cpu":
        return None
    import torch

    from cptool.engine.drafts.small import SmallModel

    world.report("load the model that drafts")
    return SmallModel(world, path, getattr(torch, setup.dtype))
