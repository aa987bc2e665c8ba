"""Random numbers that depend on a request's seed and the place of the token, and on nothing else.

A counter-based generator: the n-th number is a hash of (seed, n), so it needs no state, survives preemption, and is
the same whatever else is in the batch. The hash is splitmix64's finaliser (Steele, Lea and Flood 2014).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MASK = (1 << 64) - 1


def uniforms(seeds: Sequence[int], places: Sequence[int]) -> npt.NDArray[np.float64]:
    """For each pair one number in [0, 1), of 53 random bits. Seeds are taken modulo 2^64."""
    seed = np.array([value & _MASK for value in seeds], dtype=np.uint64)
    place = np.array(places, dtype=np.uint64)
    # The seed is hashed first: neighbouring seeds then walk through unrelated numbers, not through the same ones.
    bits = _mix(_mix(seed + _GOLDEN) ^ ((place + np.uint64(1)) * _GOLDEN))
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(z: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
