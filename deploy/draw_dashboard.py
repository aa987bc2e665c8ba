"""Draws the dashboard from its own definition, with figures from a Prometheus server: docs/images/dashboard.png.

Run: python -m deploy.draw_dashboard --prometheus http://127.0.0.1:9090 --minutes 10

It is not Grafana's screen: it reads deploy/grafana/dashboard.json, asks Prometheus each panel's queries as Grafana
would, and draws what comes back in the panel's place, with its unit and legend. A panel of a kind, or with a unit, that
it does not know is refused rather than drawn wrongly.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import EngFormatter, Formatter, FuncFormatter, MaxNLocator, MultipleLocator

ROOT = Path(__file__).resolve().parents[1]
DASHBOARD = ROOT / "deploy" / "grafana" / "dashboard.json"
PICTURE = ROOT / "docs" / "images" / "dashboard.png"
GRID_COLUMNS = 24
"""Grafana's: a panel's place is given in these."""
NUM_STEPS = 240
TIMEOUT_SECONDS = 30.0
_ROW_INCHES, _WIDTH_INCHES, _HEAD_ROWS = 0.3, 16.0, 2
_LEGEND_CHARACTERS, _MAX_LEGEND_ROWS = 74, 5
_COLOURS = (
    "#4d9a6a",
    "#e8a33d",
    "#3b6db5",
    "#c4514f",
    "#7a4b94",
    "#3fa7b5",
    "#b5795a",
    "#8a8a8a",
    "#d977a8",
    "#50608a",
)


class DashboardError(Exception):
    """The dashboard cannot be drawn; the message says what stands in the way."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a panel is, in units of Grafana's grid: `x` of 24, `y` from the top."""

    x: int
    y: int
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class Query:
    """PromQL with Grafana's variables in it, and how its series are named (`{{label}}`)."""

    expression: str
    legend: str


@dataclass(frozen=True, slots=True)
class Panel:
    """A panel of series over time; the title of a row is one without queries."""

    title: str
    place: Place
    unit: str = ""
    is_stacked: bool = False
    queries: tuple[Query, ...] = ()


@dataclass(frozen=True, slots=True)
class Span:
    """The time that is shown, from `start` to `end` (Unix seconds); `scrape_seconds` is Prometheus' interval."""

    start: float
    end: float
    scrape_seconds: float

    @property
    def step(self) -> float:
        """Seconds from one value to the next, no finer than there are scrapes."""
        return max(self.scrape_seconds, math.ceil((self.end - self.start) / NUM_STEPS))

    @property
    def rate_seconds(self) -> float:
        """What Grafana puts in for `$__rate_interval`."""
        return max(self.step + self.scrape_seconds, 4 * self.scrape_seconds)

    @property
    def minutes(self) -> list[float]:
        """The times of the values, from the start."""
        return [i * self.step / 60 for i in range(int((self.end - self.start) // self.step) + 1)]


@dataclass(frozen=True, slots=True)
class Series:
    """A line of a panel: a value for each time of the span, NaN where there was none."""

    name: str
    values: tuple[float, ...]


Ask = Callable[[str, Span], Sequence[Mapping[str, Any]]]
"""A range query: the `result` of Prometheus' answer (`metric`, `values`) to PromQL over a span."""


def read_panels(dashboard: Mapping[str, Any]) -> list[Panel]:
    """The panels in their order. Raises DashboardError for what could not be drawn as Grafana does."""
    return [_read_panel(panel) for panel in dashboard["panels"]]


def _read_panel(panel: Mapping[str, Any]) -> Panel:
    title, grid = panel["title"], panel["gridPos"]
    place = Place(grid["x"], grid["y"], grid["w"], grid["h"])
    if place.x + place.width > GRID_COLUMNS:
        raise DashboardError(f"{title}: reaches column {place.x + place.width}, and there are {GRID_COLUMNS}")
    if panel["type"] == "row":
        return Panel(title, place)
    if panel["type"] != "timeseries":
        raise DashboardError(f"{title}: a panel of type {panel['type']} is not known here, only timeseries and row")
    defaults = panel["fieldConfig"]["defaults"]
    if defaults["unit"] not in UNITS:
        raise DashboardError(f"{title}: unit {defaults['unit']} is not known here, only {', '.join(UNITS)}")
    queries = tuple(Query(target["expr"], target["legendFormat"]) for target in panel["targets"])
    is_stacked = defaults.get("custom", {}).get("stacking", {}).get("mode") == "normal"
    return Panel(title, place, defaults["unit"], is_stacked, queries)


def series_of(panel: Panel, span: Span, ask: Ask) -> list[Series]:
    """What the panel's queries give, in their order; queries without a result give none."""
    found = []
    for query in panel.queries:
        for result in ask(filled_in(query.expression, span), span):
            found.append(Series(legend_of(query.legend, result["metric"]), on_grid(result["values"], span)))
    return found


def filled_in(expression: str, span: Span) -> str:
    """PromQL without Grafana's variables: all namespaces, rates over the span's interval, and the span itself."""
    seconds = {"$__rate_interval": span.rate_seconds, "$__range": span.end - span.start}
    text = expression.replace("$namespace", ".*")
    for variable, value in seconds.items():
        text = text.replace(variable, f"{math.ceil(value)}s")
    if left := re.findall(r"\$\{?\w+", text):
        raise DashboardError(f"{expression}: variable {left[0]} is not known here")
    return text


def legend_of(form: str, labels: Mapping[str, str]) -> str:
    """A series' name: `{{label}}` becomes its value, or nothing where the series has no such label; where nothing at
    all is left, all labels."""
    name = re.sub(r"{{\s*(\w+)\s*}}", lambda match: labels.get(match[1], ""), form).strip()
    return name or "{" + ", ".join(f'{key}="{value}"' for key, value in labels.items()) + "}"


def on_grid(values: Iterable[tuple[float, str]], span: Span) -> tuple[float, ...]:
    """Prometheus' pairs of time and value, with NaN for the steps that it leaves out."""
    line = [math.nan] * len(span.minutes)
    for at, value in values:
        line[round((at - span.start) / span.step)] = float(value)
    return tuple(line)


def ask_prometheus(address: str) -> Ask:
    """Asks the server at `address` (`http://host:port`)."""

    def ask(expression: str, span: Span) -> Sequence[Mapping[str, Any]]:
        parameters = {"query": expression, "start": span.start, "end": span.end, "step": span.step}
        url = f"{address.rstrip('/')}/api/v1/query_range?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as answer:
                results: list[dict[str, Any]] = json.load(answer)["data"]["result"]
        except urllib.error.HTTPError as error:
            with error:
                raise DashboardError(f"Prometheus refuses {expression}: {error.read().decode()}") from None
        except OSError as error:
            raise DashboardError(f"no Prometheus answers at {address}: {error}") from None
        return results

    return ask


def _plain(value: float, suffix: str = "") -> str:
    power = min(3, int(math.log10(value) // 3)) if value >= 1000 else 0
    return f"{value / 1000**power:.3g}{('', ' k', ' M', ' G')[power]}{suffix}"


def _binary_bytes(value: float, _: int | None = None) -> str:
    power = min(4, int(math.log2(value) // 10)) if value >= 1 else 0
    return f"{value / 2 ** (10 * power):.4g} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


UNITS: Mapping[str, Callable[[], Formatter]] = {
    "short": lambda: FuncFormatter(lambda value, _: _plain(value)),
    "s": lambda: EngFormatter("s"),
    "reqps": lambda: FuncFormatter(lambda value, _: _plain(value, " req/s")),
    "Bps": lambda: EngFormatter("B/s"),
    "bytes": lambda: FuncFormatter(_binary_bytes),
}
"""How values are written, by the names that Grafana has for units."""


def draw(panels: Sequence[Panel], shown: Mapping[str, Sequence[Series]], span: Span, path: Path) -> None:
    """Writes a PNG: each panel in its place, with the series that `shown` has under its title."""
    num_rows = max(panel.place.y + panel.place.height for panel in panels) + _HEAD_ROWS
    figure = Figure(figsize=(_WIDTH_INCHES, num_rows * _ROW_INCHES), dpi=100, facecolor="#f4f5f5")
    grid = figure.add_gridspec(num_rows, GRID_COLUMNS, left=0, right=1, top=1, bottom=0, hspace=0, wspace=0)
    at = time.strftime("%Y-%m-%d %H:%M", time.gmtime(span.start))
    head = f"The dashboard, drawn from its definition: {(span.end - span.start) / 60:.0f} minutes from {at} UTC"
    figure.text(0.008, 1 - _HEAD_ROWS / 2 / num_rows, head, fontsize=13, va="center")
    for panel in panels:
        place, top = panel.place, panel.place.y + _HEAD_ROWS
        part = figure.add_subfigure(grid[top : top + place.height, place.x : place.x + place.width])
        part.set_facecolor("none")
        if panel.queries:
            _draw_panel(part, panel, shown[panel.title], span)
        else:
            part.text(0.008, 0.3, panel.title, fontsize=12, weight="bold", va="center")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _draw_panel(part: SubFigure, panel: Panel, lines: Sequence[Series], span: Span) -> None:
    names = [line.name for line in lines]
    width = _LEGEND_CHARACTERS * panel.place.width // 8
    num_columns = max(1, min(len(names), width // (max(map(len, names), default=0) + 6)))
    num_legend_rows = min(_MAX_LEGEND_ROWS, math.ceil(len(names) / num_columns))
    num_named = num_legend_rows * num_columns
    left = 1.1 / panel.place.width
    axes = part.add_axes((left, 0.13 + 0.07 * num_legend_rows, 0.97 - left, 0.74 - 0.07 * num_legend_rows))
    axes.set_title(panel.title, fontsize=10, loc="left", x=-0.9 * left / (0.97 - left))
    colours = [_COLOURS[i % len(_COLOURS)] for i in range(len(lines))]
    if panel.is_stacked and lines:
        heights = [[0.0 if math.isnan(value) else value for value in line.values] for line in lines]
        drawn: Sequence[Any] = axes.stackplot(span.minutes, heights, colors=colours, alpha=0.75, linewidth=0)
    else:
        drawn = [
            axes.plot(span.minutes, line.values, color=colour, linewidth=1.2)[0]
            for line, colour in zip(lines, colours, strict=True)
        ]
    if lines:
        axes.legend(
            drawn[:num_named],
            names[:num_named],
            loc="upper left",
            bbox_to_anchor=(-left / (0.97 - left), -0.08),
            ncols=num_columns,
            fontsize=7,
            frameon=False,
            handlelength=1.2,
            columnspacing=1.2,
            borderaxespad=0.4,
        )
    else:
        axes.text(0.5, 0.5, "No data", transform=axes.transAxes, ha="center", color="#888888")
    axes.set(xlim=(0, span.minutes[-1]), ylim=(0, _top(lines, panel.is_stacked)))
    top = axes.get_ylim()[1]
    in_powers_of_two = MultipleLocator(2.0 ** math.ceil(math.log2(top / 5)))
    axes.yaxis.set_major_locator(in_powers_of_two if panel.unit == "bytes" else MaxNLocator(5))
    axes.yaxis.set_major_formatter(UNITS[panel.unit]())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda minutes, _: f"{minutes:g} min" if minutes else "0"))
    axes.tick_params(labelsize=7, length=2)
    axes.grid(color="#e3e5e8", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _top(lines: Sequence[Series], is_stacked: bool) -> float:
    """Where the scale ends: a little above the highest value, 1 where all are 0."""
    together = sum if is_stacked else max
    columns = zip(*(line.values for line in lines), strict=True)
    heights = (together([value for value in column if not math.isnan(value)] or [0.0]) for column in columns)
    return 1.1 * max(heights, default=0.0) or 1.0


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 drawn, 1 not."""
    parser = argparse.ArgumentParser(prog="python -m deploy.draw_dashboard", description="the dashboard as a picture")
    parser.add_argument("--prometheus", default="http://127.0.0.1:9090", help="its address (default %(default)s)")
    parser.add_argument("--minutes", type=float, default=10.0, help="how much, of time (default %(default)g)")
    parser.add_argument("--minutes-ago", type=float, default=0.0, help="when that ended (default %(default)g)")
    parser.add_argument("--scrape-seconds", type=float, default=5.0, help="its scrape interval (default %(default)g)")
    parser.add_argument("--out", type=Path, default=PICTURE, help="where the picture goes (default %(default)s)")
    arguments = parser.parse_args(argv)
    end = time.time() - 60 * arguments.minutes_ago
    span = Span(end - 60 * arguments.minutes, end, arguments.scrape_seconds)
    ask = ask_prometheus(arguments.prometheus)
    try:
        panels = read_panels(json.loads(DASHBOARD.read_text()))
        shown = {panel.title: series_of(panel, span, ask) for panel in panels}
    except DashboardError as error:
        print(error, file=sys.stderr)
        return 1
    draw(panels, shown, span, arguments.out)
    empty = [panel.title for panel in panels if panel.queries and not shown[panel.title]]
    print(f"wrote {arguments.out}" + (f"; without data: {', '.join(empty)}" if empty else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
