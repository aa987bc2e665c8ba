"""Draws requests/s against the number of adapters from benchmarks/results/h200.json.

Run: python -m benchmarks.gpu.plot_many_adapters
"""

from __future__ import annotations

import json
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.command_line import take_no_options
from benchmarks.gpu.core_mix import MIX_REQUESTS
from benchmarks.record import RESULTS, ROOT, say

PICTURE = ROOT / "docs" / "images" / "many_adapters.png"


def draw(results: Path, picture: Path) -> None:
    """One line a setting, the base model's rate as the ceiling."""
    rows = json.loads(results.read_text())["rows"]
    # Rows that say what they went through are of the services, and of the core beside them.
    mix = [row for row in rows if row["bench"] == "paper_mix" and "through" not in row]
    # The usual number of requests, of one model with one set of targets.
    wanted = {"metric": "requests_per_s", "requests": MIX_REQUESTS, "model": "llama-7b", "targets": "attn"}
    mix = [row for row in mix if wanted.items() <= row.items()]
    figure = Figure(figsize=(8, 3.6), dpi=130, layout="constrained")
    axes = figure.subplots()
    base = next(row["value"] for row in mix if row["setting"] == "base")
    axes.axhline(base, color="#555555", linestyle="--", label="base model, no adapters")
    for setting, color, label in (("S1", "#3b6db5", "rank 8"), ("S2", "#e8a33d", "ranks 64, 32, 16, 8")):
        points = sorted((row["adapters"], row["value"]) for row in mix if row["setting"] == setting)
        axes.plot(*zip(*points, strict=True), marker="o", color=color, label=label)
    axes.set(xscale="log", ylim=(0, None), xlabel="different adapters", ylabel="requests/s")
    counts = sorted({row["adapters"] for row in mix} - {0})
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.set_title("768 requests, Llama-7B's shape, LoRA on q, k, v, o, one H200", fontsize=10)
    axes.legend(loc="lower left", frameon=False)
    figure.savefig(picture)
    say(f"wrote {picture}")


if __name__ == "__main__":
    take_no_options(__doc__)
    draw(RESULTS / "h200.json", PICTURE)
