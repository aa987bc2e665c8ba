"""Ranks of the adapters in the settings that S-LoRA measures (section 7), and of the base model without any."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

RANKS: Mapping[str, tuple[int, ...]] = {"base": (), "S1": (8,), "S2": (64, 32, 16, 8)}
"""By setting, in turn."""


def ranks_in_turn(setting: str, number: int) -> list[int]:
    """The ranks of a setting's first `number` adapters; none of the base's, which has no adapters."""
    return list(itertools.islice(itertools.cycle(RANKS[setting]), number))
