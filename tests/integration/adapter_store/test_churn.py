"""A short churn against a store process: what benchmarks/bench_store_churn.py does for half an hour."""

from __future__ import annotations

import random
from pathlib import Path

from benchmarks.bench_store_churn import churn

SECONDS = 4.0
# It warms up all the time here; a leak of every adapter that passes by would be several times this.
MOST_GROWTH_BYTES = 64 * 2**20


async def test_churn_leaves_no_lease_no_pin_and_no_hole_behind(tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(2**32)
    print("seed", seed)
    result = await churn(tmp_path, SECONDS, SECONDS / 12, seed)
    for way in ("upload", "fetch", "lease"):
        assert result.done[way] > 0, result.done
    assert result.left == {"bytes": 0, "adapters": 0, "pinned": 0, "leases": 0, "holes": 0}
    before, after = result.growth("own_bytes")
    assert after < before + MOST_GROWTH_BYTES
    assert all(sample.open_leases <= 8 for sample in result.samples)
    assert max(sample.arena_free_extents for sample in result.samples) >= 1
