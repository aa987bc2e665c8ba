"""Draws docs/images/routing.png from benchmarks/results/routing.json, and prints the table of docs/routing.md.

Run: python -m benchmarks.plot_routing
"""

from __future__ import annotations

import json
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.command_line import take_no_options
from benchmarks.record import RESULTS, ROOT, say

PICTURE = ROOT / "docs" / "images" / "routing.png"
CASES = {"zipf 1.0": "rank 8, copied out of the store's memory", "zipf 1.0, rank 64 streamed": "rank 64, streamed"}
COLORS = {
    "adapter-aware": "#3b6db5",
    "round-robin": "#b0b0b0",
    "least-loaded": "#e8a33d",
    "hashing": "#7a4b94",
    "bounded hashing": "#4d9a6a",
}


def draw(results: Path, picture: Path) -> None:
    """A column a case; a line a rule. First tokens, from milliseconds to minutes late, are on a logarithmic scale."""
    rows = json.loads(results.read_text())["rows"]
    figure = Figure(figsize=(9, 5.2), dpi=130, layout="constrained")
    axes = figure.subplots(2, len(CASES), sharex="col", squeeze=False)
    for column, (case, title) in enumerate(CASES.items()):
        for row, metric in enumerate(("loads_per_1000", "ttft_p99_ms")):
            for rule, color in COLORS.items():
                found = [one for one in rows if (one["case"], one["rule"], one["metric"]) == (case, rule, metric)]
                points = sorted((one["requests_per_s_and_engine"], one["value"]) for one in found)
                axes[row][column].plot(*zip(*points, strict=True), marker="o", markersize=4, color=color, label=rule)
        axes[0][column].set_title(title, fontsize=10)
        axes[1][column].set_xlabel("requests/s for each of 16 engines")
        axes[0][column].set_ylim(bottom=0)
        axes[1][column].set_yscale("log")
    axes[0][0].set_ylabel("adapter loads for 1000 requests")
    axes[1][0].set_ylabel("p99 TTFT, ms")
    axes[0][1].legend(frameon=False, fontsize=8)
    figure.savefig(picture)
    say(f"wrote {picture}")


def table(results: Path) -> str:
    """Loads, p50, p99 and imbalance of each case, rate and rule, in Markdown."""
    cells: dict[tuple[str, float], dict[str, dict[str, float]]] = {}
    for row in json.loads(results.read_text())["rows"]:
        of_rule = cells.setdefault((row["case"], row["requests_per_s_and_engine"]), {}).setdefault(row["rule"], {})
        of_rule[row["metric"]] = row["value"]
    lines = ["| trace, requests/s and engine | " + " | ".join(COLORS) + " |", "| --- " * (len(COLORS) + 1) + "|"]
    for (case, rate), by_rule in cells.items():
        line = f"| {case}, {rate:g} "
        for rule in COLORS:
            figures = by_rule[rule]
            times = [figures[metric] for metric in ("loads_per_1000", "ttft_p50_ms", "ttft_p99_ms")]
            shown = " · ".join(f"{value:.0f}" if value >= 100 else f"{value:.1f}" for value in times)
            cell = f"{shown} · {figures['imbalance']:.2f}"
            line += f"| **{cell}** " if rule == "adapter-aware" else f"| {cell} "
        lines.append(line + "|")
    return "\n".join(lines)


if __name__ == "__main__":
    take_no_options(__doc__)
    say(table(RESULTS / "routing.json"))
    draw(RESULTS / "routing.json", PICTURE)
