"""Draws the pool over time: pages of KV, in use and kept, of adapters, and free ones, stacked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from services.local.demo.pool_watch_client import PoolSample

KV_COLOUR, KEPT_COLOUR, ADAPTER_COLOUR = "#3b6fb6", "#a9c4e4", "#e8a33d"
FREE_COLOUR, LINE_COLOUR = "#e9ecef", "#444444"


def draw_pool(samples: Sequence[PoolSample], num_pages: int, path: Path) -> None:
    """Writes a PNG to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    seconds = [sample.seconds for sample in samples]
    figure = Figure(figsize=(10, 4.5), dpi=130, layout="constrained")
    pages = figure.subplots()
    pages.stackplot(
        seconds,
        [sample.num_kv_pages for sample in samples],
        [sample.num_cached_pages for sample in samples],
        [sample.num_adapter_pages for sample in samples],
        [sample.num_free_pages for sample in samples],
        labels=["KV in use", "KV kept", "adapters", "free"],
        colors=[KV_COLOUR, KEPT_COLOUR, ADAPTER_COLOUR, FREE_COLOUR],
        step="post",
    )
    pages.set(xlim=(seconds[0], seconds[-1]), ylim=(0, num_pages), xlabel="seconds", ylabel="pages")
    pages.set_title("One pool for KV cache and adapters")
    adapters = pages.twinx()
    (line,) = adapters.step(
        seconds,
        [s.num_resident for s in samples],
        where="post",
        color=LINE_COLOUR,
        linewidth=1,
        label="resident adapters",
    )
    adapters.set(ylim=(0, None), ylabel="resident adapters")
    handles, labels = pages.get_legend_handles_labels()
    labels.append("resident adapters")
    figure.legend([*handles, line], labels, loc="outside lower center", ncols=5, frameon=False)
    # So that a picture can be asked what it shows.
    figure.savefig(path, metadata={"Description": f"The pool over time: {', '.join(labels)}"})
