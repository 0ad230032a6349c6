"""Rotary position embedding (Su et al., 2021) in the half-split layout of Hugging Face."""

import math

import torch

from cptool.model.config import LlamaConfig


def inverse_frequencies(config: LlamaConfig) -> torch.Tensor:
    """Radians per position of each rotated pair, stretched as the checkpoint asks.

    f[j] = theta^(-2j / D) for j in [0, D/2), then `config.rope_scaling` as `RopeScaling` states
    it. Every operation is float32 in the order of `transformers`, so that the frequencies are
    its own to the bit.

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
    """Cosines and sines of `positions [T]` times `frequencies [D/2]`: two float32 [T, 1, D/2].

    The angle is the float32 product of position and frequency, as the models were trained.
    """
    angles = (positions.to(torch.float32)[:, None] * frequencies)[:, None]
    return angles.cos(), angles.sin()
