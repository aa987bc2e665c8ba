"""Draws docs/images/simulated_*.png from benchmarks/results/simulation.json, and writes docs/simulation_tables.md.

Run: python -m benchmarks.plot_paper     (`benchmarks.simulate_paper` does the same in the end)
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.command_line import take_no_options
from benchmarks.record import RESULTS, ROOT, say

IMAGES = ROOT / "docs" / "images"
TABLES = ROOT / "docs" / "simulation_tables.md"

COLORS = {"S1": "#3b6db5", "S2": "#e8a33d"}
SETTINGS = {"base": "no adapters", "S1": "rank 8", "S2": "ranks 64, 32, 16, 8"}
STYLES: dict[str, tuple[Literal["--", "-"], str]] = {
    "fcfs": ("--", "first come, first served"),
    "fcfs + early abort": ("-", "with early abort"),
}
METRICS = {
    "served_per_s": "requests served/s",
    "ttft_mean_s": "mean TTFT, s",
    "attainment": "SLO attainment",
    "satisfaction": "user satisfaction",
}
AXES = {
    "rate": ("requests_per_s", "requests/s that come"),
    "adapters": ("adapters", "different adapters"),
    "cv": ("cv", "coefficient of variation of the times between requests"),
    "alpha": ("alpha", "exponent of the adapters' popularity (1: all alike)"),
}

TTFT_TICKS = (0.02, 0.1, 1, 6, 30, 150)
GRAY = "#bbbbbb"

Rows = Sequence[Mapping[str, Any]]


def draw_all(rows: Rows, images: Path = IMAGES) -> list[Path]:
    """Every picture; returns where they are."""
    pictures = {"model": _draw_model, "rate": _draw_rate}
    paths = []
    for name in ("model", *AXES):
        figure = pictures[name](rows) if name in pictures else _draw_sweep(rows, name)
        path = images / f"simulated_{name}.png"
        figure.savefig(path)
        say(f"wrote {path}")
        paths.append(path)
    return paths


def _draw_model(rows: Rows) -> Figure:
    """What was measured, and what the model says, of each closed loop of the mixes' own benchmark."""
    figure = Figure(figsize=(8, 3.4), dpi=130, layout="constrained")
    axes = figure.subplots()
    mixes = [row for row in rows if row["bench"] == "model_mix" and row["measured_for"] == "paper_mix"]
    base = next(row for row in mixes if row["setting"] == "base")
    axes.axhline(base["measured"], color="#555555", linewidth=1)
    axes.axhline(base["value"], color="#555555", linewidth=1, linestyle="--")
    for setting, color in COLORS.items():
        mine = sorted((row["adapters"], row["measured"], row["value"]) for row in mixes if row["setting"] == setting)
        counts, measured, predicted = zip(*mine, strict=True)
        axes.plot(counts, measured, color=color, marker="o", markersize=5)
        axes.plot(counts, predicted, color=color, marker="o", markersize=5, linestyle="--", markerfacecolor="white")
    axes.set(xscale="log", ylim=(0, 1.1 * base["measured"]), xlabel="different adapters", ylabel="requests/s")
    _name_counts(axes, sorted({row["adapters"] for row in mixes} - {0}))
    lines = [Line2D([], [], color=color, label=SETTINGS[name]) for name, color in COLORS.items()]
    lines.insert(0, Line2D([], [], color="#555555", label=SETTINGS["base"]))
    lines.append(Line2D([], [], color="black", linestyle="-", label="measured"))
    lines.append(Line2D([], [], color="black", linestyle="--", label="model"))
    axes.legend(handles=lines, loc="lower left", ncols=2, frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title("768 requests at once: measured on an H200, and by the model, which saw none of it", fontsize=10)
    return figure


def _draw_rate(rows: Rows) -> Figure:
    figure = Figure(figsize=(9, 6.2), dpi=130, layout="constrained")
    panels = list(figure.subplots(2, 2, sharex=True).ravel())
    found = [row for row in rows if row.get("figure") == "rate"]
    for axes, (metric, label) in zip(panels, METRICS.items(), strict=True):
        _draw_lines(axes, found, metric, "requests_per_s")
        axes.set_ylabel(label)
    highest = max(row["requests_per_s"] for row in found)
    panels[0].plot([0, highest], [0, highest], color=GRAY, linewidth=1, zorder=0)
    panels[0].annotate("all that come", (14, 14), xytext=(4, -10), textcoords="offset points", color="gray", fontsize=8)
    panels[0].set(ylim=(0, 1.25 * max(row["served_per_s"] for row in found)), xlim=(0, None))
    for axes in panels[2:]:
        axes.set_xlabel(AXES["rate"][1])
    _finish(figure, panels)
    return figure


def _draw_sweep(rows: Rows, name: str) -> Figure:
    """A column a load, below and beyond the knee; a row a metric."""
    found = [row for row in rows if row.get("figure") == name]
    loads = sorted({row["load"] for row in found})
    figure = Figure(figsize=(9, 9), dpi=130, layout="constrained")
    panels = figure.subplots(len(METRICS), len(loads), sharex=True, squeeze=False)
    field, label = AXES[name]
    for column, load in enumerate(loads):
        of_load = [row for row in found if row["load"] == load]
        panels[0][column].set_title(f"{load:g} times the rate that is sustained", fontsize=10)
        for axes, metric in zip(panels[:, column], METRICS, strict=True):
            _draw_lines(axes, of_load, metric, field)
            if metric == "served_per_s":
                axes.set_ylim(0, 1.25 * max(row[metric] for row in found))
        panels[-1][column].set_xlabel(label)
    for axes, label in zip(panels[:, 0], METRICS.values(), strict=True):
        axes.set_ylabel(label)
    for axes in panels.ravel():
        if field == "adapters":
            axes.set_xscale("log")
            _name_counts(axes, [5, 20, 100, 500, 2000, 5000])
        else:
            axes.set_xticks(sorted({row[field] for row in found}))
    _finish(figure, list(panels.ravel()))
    return figure


def _draw_lines(axes: Axes, rows: Rows, metric: str, field: str) -> None:
    for setting, color in COLORS.items():
        for policy, (style, _) in STYLES.items():
            mine = [row for row in rows if (row["setting"], row["policy"]) == (setting, policy)]
            points = sorted((row[field], row[metric]) for row in mine if row[metric] is not None)
            if points:
                axes.plot(*zip(*points, strict=True), color=color, linestyle=style, marker="o", markersize=3.5)
    if metric in ("attainment", "satisfaction"):
        axes.set_ylim(-0.03, 1.05)
    elif metric == "ttft_mean_s":
        axes.set(yscale="log", ylim=(0.012, 250))
        axes.set_yticks(TTFT_TICKS, [f"{tick:g}" for tick in TTFT_TICKS])
        axes.minorticks_off()
        axes.axhline(6.0, color=GRAY, linewidth=1, zorder=0)


def _finish(figure: Figure, panels: Sequence[Axes]) -> None:
    """One legend for all panels, of what is drawn in them."""
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    drawn = {line.get_color() for axes in panels for line in axes.get_lines()}
    lines = [Line2D([], [], color=color, label=SETTINGS[name]) for name, color in COLORS.items() if color in drawn]
    lines += [Line2D([], [], color="black", linestyle=style, label=label) for style, label in STYLES.values()]
    figure.legend(handles=lines, loc="outside upper center", ncols=len(lines), frameon=False, fontsize=9)


def _name_counts(axes: Axes, counts: Sequence[int]) -> None:
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()


def write_tables(rows: Rows, path: Path = TABLES) -> None:
    """All figures in Markdown."""
    sections = [
        "# Tables of the simulation",
        "Written by `python -m benchmarks.simulate_paper`; [simulation.md](simulation.md) says what they mean. Times in"
        " seconds, *load* as a share of the rate that is sustained. TTFTs are of requests that were not dropped; "
        "attainment and satisfaction are of all.",
        "## The model's error",
        _mix_table(rows),
        _step_table(rows),
        "## Claims",
        _claim_table(rows),
        _neighbour_table(rows),
    ]
    for name, (field, label) in AXES.items():
        sections += [f"## By {label}", _sweep_table(rows, name, field)]
    path.write_text("\n\n".join(sections) + "\n")
    say(f"wrote {path}")


def _mix_table(rows: Rows) -> str:
    found = [row for row in rows if row["bench"] == "model_mix"]
    heads = ["adapters", "number", "requests", "measured for", "measured, requests/s", "model", "error"]
    return _table(
        heads, [[_name(row), row["adapters"], row["requests"], row["measured_for"], *_compared(row)] for row in found]
    )


def _step_table(rows: Rows) -> str:
    found = [row for row in rows if row["bench"] == "model_step"]
    heads = ["adapters", "sequences", "tokens of context each", "measured step, ms", "model", "error"]
    return _table(heads, [[_name(row), row["batch"], row["context"], *_compared(row)] for row in found])


def _name(row: Mapping[str, Any]) -> str:
    return SETTINGS[row["setting"]]


def _compared(row: Mapping[str, Any]) -> list[str]:
    return [f"{row['measured']:.2f}", f"{row['value']:.2f}", f"{row['error_percent']:+.1f} %"]


def _claim_table(rows: Rows) -> str:
    found = [row for row in rows if row["bench"] == "claim"]
    cells = [[row["metric"], _name(row), row["policy"], row["admission_batch"], _shown(row["value"])] for row in found]
    return _table(["claim", "adapters", "policy", "places at a time", "value"], cells)


def _neighbour_table(rows: Rows) -> str:
    found = [row for row in rows if row["bench"] == "simulated_neighbours"]
    heads = ["policy", "places at a time", "the tenth sends", "seed", "attainment of nine", "TTFT p50", "p99"]
    cells = [
        [row["policy"], row["admission_batch"], f"{row['factor']:g} times its share", row["seed"]]
        + [_shown(row[name]) for name in ("attainment", "ttft_p50_s", "ttft_p99_s")]
        for row in found
    ]
    return _table(heads, cells)


def _sweep_table(rows: Rows, name: str, field: str) -> str:
    found = [row for row in rows if row.get("figure") == name]
    shown = ["served_per_s", "ttft_mean_s", "ttft_p50_s", "ttft_p99_s", "attainment", "satisfaction", "dropped"]
    heads = [field.replace("_per_s", "/s"), "load", "adapters of", "policy"]
    heads += ["served/s", "TTFT mean", "p50", "p99", "attainment", "satisfaction", "dropped"]
    cells = [
        [f"{row[field]:g}", f"{row['load']:g}", _name(row), row["policy"], *(_shown(row[one]) for one in shown)]
        for row in found
    ]
    return _table(heads, cells)


def _shown(value: float | None) -> str:
    return "none" if value is None else f"{value:.3g}"


def _table(heads: Sequence[str], cells: Sequence[Sequence[object]]) -> str:
    lines = [heads, ["---"] * len(heads), *cells]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


if __name__ == "__main__":
    take_no_options(__doc__)
    recorded = json.loads((RESULTS / "simulation.json").read_text())["rows"]
    draw_all(recorded)
    write_tables(recorded)
