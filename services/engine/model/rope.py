"""Rotary frequencies, held to transformers' for every scaling that `RopeConfig` admits."""

from __future__ import annotations

import math

import torch

from services.engine.model.config import RopeConfig


def rope_frequencies(config: RopeConfig, head_dim: int) -> tuple[torch.Tensor, float]:
    """Angles a position `[head_dim / 2]` (float32), and the factor that cosine and sine are multiplied by."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    plain = 1.0 / (config.theta**exponents)
    if config.rope_type == "linear":
        return plain / config.factor, 1.0
    if config.rope_type == "llama3":
        return _llama3(config, plain), 1.0
    if config.rope_type == "yarn":
        return _yarn(config, plain, head_dim), _yarn_attention_factor(config)
    # "dynamic" stretches only past max_position_embeddings, where ModelConfig lets no sequence go.
    return plain, 1.0


def half_rope_table(config: RopeConfig, head_dim: int, num_positions: int) -> torch.Tensor:
    """`[num_positions, 2, head_dim / 2]`: cosines, then sines, of each pair of features; float32."""
    frequencies, factor = rope_frequencies(config, head_dim)
    angles = torch.arange(num_positions, dtype=torch.float32).unsqueeze(1) * frequencies
    return torch.stack((angles.cos() * factor, angles.sin() * factor), dim=1)


def signed_rope_table(config: RopeConfig, head_dim: int, num_positions: int, dtype: torch.dtype) -> torch.Tensor:
    """`[num_positions, 2, head_dim]`: as `half_rope_table` for both halves of a head, sines with the rotation's sign.

    As kernels.rope takes it.
    """
    cos, sin = half_rope_table(config, head_dim, num_positions).unbind(1)
    return torch.stack((torch.cat((cos, cos), dim=1), torch.cat((-sin, sin), dim=1)), dim=1).to(dtype)


def _llama3(config: RopeConfig, plain: torch.Tensor) -> torch.Tensor:
    """Long waves are slowed down by `factor`, short ones kept, those between blended."""
    wavelength = 2 * math.pi / plain
    longest = config.original_max_len / config.low_freq_factor
    shortest = config.original_max_len / config.high_freq_factor
    share = (config.original_max_len / wavelength - config.low_freq_factor) / (
        config.high_freq_factor - config.low_freq_factor
    )
    blended = (1 - share) * plain / config.factor + share * plain
    return torch.where(wavelength > longest, plain / config.factor, torch.where(wavelength < shortest, plain, blended))


def _yarn(config: RopeConfig, plain: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Peng et al. 2023, arXiv 2309.00071: interpolates slow dimensions, keeps fast ones, ramps between."""

    def dimension_of(rotations: float) -> float:
        return (head_dim * math.log(config.original_max_len / (rotations * 2 * math.pi))) / (2 * math.log(config.theta))

    low, high = dimension_of(config.beta_fast), dimension_of(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return plain / config.factor * ramp + plain * (1 - ramp)


def _yarn_attention_factor(config: RopeConfig) -> float:
    if config.attention_factor is not None:
        return config.attention_factor

    def scale(mscale: float) -> float:
        return 1.0 if config.factor <= 1 else 0.1 * mscale * math.log(config.factor) + 1.0

    if config.mscale and config.mscale_all_dim:
        return scale(config.mscale) / scale(config.mscale_all_dim)
    return scale(1.0)
