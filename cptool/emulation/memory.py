"""The memory that an emulated rank takes on its device, known before anything is allocated."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch

from cptool.errors import UserError
from cptool.host import memory
from cptool.planning.cost.memory import memory_per_rank
from cptool.planning.profiles import default_profile

if TYPE_CHECKING:
    from cptool.emulation.layer import Scenario
    from cptool.planning.cost.forward import Forward


def check(scenario: Scenario, variant: str, forward: Forward) -> int:
    """Return the bytes that the emulation needs. Raise UserError if the device has fewer free."""
    needed, free = needs(scenario, variant, forward), available(scenario.device)
    if needed > free:
        raise UserError(
            f"one rank's part of {scenario.cached + scenario.new:,} tokens needs "
            f"{needed / 1e9:.1f} GB on {scenario.device}, {free / 1e9:.1f} GB are free, "
            f"{(needed - free) / 1e9:.1f} GB too few; use more `cp` or `tp`, or a shorter `context`"
        )
    return needed


def available(device: torch.device) -> int:
    """Return the bytes that can be allocated on `device` now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return memory.available()


def needs(scenario: Scenario, variant: str, forward: Forward) -> int:
    """Return the bytes at the peak: those of a rank whose model is one layer and an embedding.

    forward: the scenario's. FP8 weights are made from those in its dtype.
    """
    config = dataclasses.replace(scenario.config, num_hidden_layers=1, tie_word_embeddings=True)
    alone = dataclasses.replace(forward, config=config, feed_forward=None, local=1)
    parts = memory_per_rank(variant, alone, default_profile(scenario.device.type))
    return round(sum(parts.values()))
