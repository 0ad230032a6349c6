"""Rotary position embedding (Su et al., 2021) in the half-split layout of Hugging Face."""

import math
from dataclasses import replace

import torch

from cptool.model.config import LlamaConfig, RopeScaling


def inverse_frequencies(config: LlamaConfig) -> torch.Tensor:
    """Return the radians per position of each rotated pair, stretched by `config.rope_scaling`.

    f[j] = theta^(-2j / D) for j in [0, D/2), D the rotated part of a head, then scaling as
    `RopeScaling` states it. Every operation is float32 in the order of `transformers`, so the
    frequencies equal its own bit by bit.

    Returns: float32 [D/2] on the CPU.
    """
    dim, scaling = config.rotary_dim or config.head_dim, config.rope_scaling
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device="cpu")
    powers = config.rope_theta ** (exponents / dim)
    if scaling is None or scaling.kind == "dynamic":
        return 1.0 / powers
    if scaling.kind == "longrope":
        factors = scaling.factors(config.max_position_embeddings)
        return 1.0 / (torch.tensor(factors, dtype=torch.float32, device="cpu") * powers)
    if scaling.kind == "yarn":
        return _yarn(powers, config.rope_theta, scaling)
    frequencies = 1.0 / powers
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    return _llama3(frequencies, scaling)


def window_frequencies(config: LlamaConfig) -> torch.Tensor | None:
    """Return those of layers with a window, of which the base is another and nothing is stretched;
    None if they are those of all layers.
    """
    if config.window_rope_theta is None:
        return None
    return inverse_frequencies(
        replace(config, rope_theta=config.window_rope_theta, rope_scaling=None)
    )


def _llama3(frequencies: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    stretched = frequencies / scaling.factor
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


def _yarn(powers: torch.Tensor, theta: float, scaling: RopeScaling) -> torch.Tensor:
    dim = 2 * len(powers)

    def pair(turns: float) -> float:
        """Return the pair that turns so often within the original context."""
        positions = scaling.original_context / (turns * 2 * math.pi)
        return dim * math.log(positions) / (2 * math.log(theta))

    low, high = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # as transformers does, to divide by something
    stretched = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    kept = 1 - stretched
    return 1.0 / (scaling.factor * powers) * (1 - kept) + 1.0 / powers * kept


def rotary_tables(
    positions: torch.Tensor, frequencies: torch.Tensor, factor: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `factor` times the cosines and sines of `positions [T]` times `frequencies [D/2]`.

    The angle is the float32 product of position and frequency, as the models were trained.

    Returns: two float32 [T, 1, D/2].
    """
    angles = (positions.to(torch.float32)[:, None] * frequencies)[:, None]
    if factor == 1:
        return angles.cos(), angles.sin()
    return angles.cos() * factor, angles.sin() * factor
