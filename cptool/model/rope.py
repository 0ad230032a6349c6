"""Rotary position embedding (Su et al., 2021) in the half-split layout of Hugging Face."""

import math

import torch

from cptool.model.config import LlamaConfig


def inverse_frequencies(config: LlamaConfig) -> torch.Tensor:
    """Return the radians per position of each rotated pair, stretched by `config.rope_scaling`.

    f[j] = theta^(-2j / D) for j in [0, D/2), then scaling as `RopeScaling` states it. Every
    operation is float32 in the order of `transformers`, so the frequencies equal its own bit by
    bit.

    Returns: float32 [D/2] on the CPU.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu")
    frequencies = 1.0 / (config.rope_theta ** (exponents / config.head_dim))
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    stretched = frequencies / scaling.factor
    if scaling.kind == "linear":
        return stretched
    wavelengths = 2 * math.pi / frequencies
    longest_kept = scaling.original_context / scaling.high_freq_factor
    shortest_stretched = scaling.original_context / scaling.low_freq_factor
    keep = (scaling.original_context / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    blended = (1 - keep) * frequencies / scaling.factor + keep * frequencies
    return torch.where(
        wavelengths < longest_kept,
        frequencies,
        torch.where(wavelengths > shortest_stretched, stretched, blended),
    )


def rotary_tables(
    positions: torch.Tensor, frequencies: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosines and sines of `positions [T]` times `frequencies [D/2]`.

    The angle is the float32 product of position and frequency, as the models were trained.

    Returns: two float32 [T, 1, D/2].
    """
    angles = (positions.to(torch.float32)[:, None] * frequencies)[:, None]
    return angles.cos(), angles.sin()
