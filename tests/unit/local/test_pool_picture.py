"""The picture of the pool, and the one that the README shows."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from services.local.demo.pool_picture import draw_pool
from services.local.demo.pool_watch_client import PoolSample

SHOWN = Path(__file__).parents[3] / "docs" / "images" / "pool.png"


def description(picture: Path) -> str | None:
    with Image.open(picture) as opened:
        return opened.info.get("Description")


def test_the_shown_picture_is_what_the_demo_draws(tmp_path: Path) -> None:
    """The same parts at the same size; `make demo`, then out/pool.png to docs/images/."""
    samples = [PoolSample(seconds, 10, 20, 30, 40, 5, 1, 0) for seconds in (0.0, 1.0)]
    drawn = tmp_path / "out" / "pool.png"
    draw_pool(samples, 100, drawn)
    said = description(drawn)
    assert said == "The pool over time: KV in use, KV kept, adapters, free, resident adapters"
    assert description(SHOWN) == said
    with Image.open(SHOWN) as shown, Image.open(drawn) as fresh:
        assert shown.size == fresh.size
