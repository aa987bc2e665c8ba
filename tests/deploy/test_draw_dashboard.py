"""The dashboard drawn from its definition: what is asked, how it is named, and where it lies in the picture."""

from __future__ import annotations

import json
import math
import random
import threading
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest

from deploy.draw_dashboard import (
    DASHBOARD,
    UNITS,
    DashboardError,
    Span,
    ask_prometheus,
    draw,
    filled_in,
    legend_of,
    main,
    on_grid,
    read_panels,
    series_of,
)

DEFINITION = json.loads(DASHBOARD.read_text())
SPAN = Span(1_000_000.0, 1_000_600.0, 5.0)


def labels() -> dict[str, str]:
    return {name: f"{name}-{random.randrange(1000)}" for name in ("instance", "outcome")}


def test_the_dashboard_of_this_project_can_be_drawn() -> None:
    panels = read_panels(DEFINITION)
    assert [panel.title for panel in panels] == [panel["title"] for panel in DEFINITION["panels"]]
    assert len({panel.title for panel in panels}) == len(panels)
    for panel in panels:
        for query in panel.queries:
            assert "$" not in filled_in(query.expression, SPAN)


def test_panels_do_not_overlap() -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in read_panels(DEFINITION):
        for x in range(panel.place.x, panel.place.x + panel.place.width):
            for y in range(panel.place.y, panel.place.y + panel.place.height):
                assert taken.setdefault((x, y), panel.title) == panel.title


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": "gauge"}, "type gauge"),
        ({"gridPos": {"x": 20, "y": 0, "w": 8, "h": 8}}, "column 28"),
        ({"fieldConfig": {"defaults": {"unit": "furlongs"}}}, "unit furlongs"),
    ],
    ids=["type", "place", "unit"],
)
def test_what_would_be_drawn_wrongly_is_refused(change: dict[str, Any], message: str) -> None:
    panel = next(panel for panel in DEFINITION["panels"] if panel["type"] == "timeseries")
    with pytest.raises(DashboardError, match=f"{panel['title']}: .*{message}"):
        read_panels({"panels": [panel | change]})


def test_an_unknown_variable_is_refused() -> None:
    with pytest.raises(DashboardError, match=r"\$cluster"):
        filled_in('up{cluster="$cluster"}', SPAN)


def test_rates_are_over_four_scrapes_or_a_step_more() -> None:
    assert filled_in('rate(a{n=~"$namespace"}[$__rate_interval])', SPAN) == 'rate(a{n=~".*"}[20s])'
    assert filled_in("increase(a[$__range])", SPAN) == "increase(a[600s])"
    day = Span(0.0, 86_400.0, 15.0)
    assert day.step == 360.0
    assert day.rate_seconds == 375.0


def test_series_are_named_by_their_labels() -> None:
    of = labels()
    assert legend_of("{{instance}} {{ outcome }}", of) == f"{of['instance']} {of['outcome']}"
    assert legend_of("{{instance}} {{missing}}", of) == of["instance"]
    assert legend_of("p95", of) == "p95"
    assert legend_of("{{missing}}", {"le": "5"}) == '{le="5"}'


def test_times_without_a_value_are_gaps() -> None:
    pairs = {random.randrange(len(SPAN.minutes)): random.uniform(0, 9) for _ in range(20)}
    line = on_grid([(SPAN.start + i * SPAN.step, str(value)) for i, value in pairs.items()], SPAN)
    assert len(line) == len(SPAN.minutes)
    assert {i: value for i, value in enumerate(line) if not math.isnan(value)} == pairs


@pytest.mark.parametrize(
    ("unit", "value", "written"),
    [
        ("s", 0.0215, "21.5 ms"),
        ("reqps", 4.0, "4 req/s"),
        ("short", 1500.0, "1.5 k"),
        ("Bps", 3e6, "3 MB/s"),
        ("bytes", 0.0, "0 B"),
        ("bytes", 3 * 2.0**30, "3 GiB"),
        ("bytes", 1536.0, "1.5 KiB"),
    ],
)
def test_values_are_written_in_their_unit(unit: str, value: float, written: str) -> None:
    assert UNITS[unit]()(value, 0) == written


def some_results(expression: str, span: Span) -> Sequence[Mapping[str, Any]]:
    count = random.randrange(4)
    values = [(span.start + i * span.step, str(random.uniform(0, 5))) for i in range(len(span.minutes))]
    return [{"metric": labels(), "values": values[random.randrange(9) :]} for _ in range(count)]


def test_every_panel_is_drawn_in_its_place(tmp_path: Path) -> None:
    panels = read_panels(DEFINITION)
    shown = {panel.title: series_of(panel, SPAN, some_results) for panel in panels}
    draw(panels, shown, SPAN, tmp_path / "new" / "dashboard.png")
    picture = matplotlib.image.imread(tmp_path / "new" / "dashboard.png")
    num_rows = max(panel.place.y + panel.place.height for panel in panels)
    row = picture.shape[0] / (num_rows + 2)  # two rows are the head's
    for panel in panels:
        top, left = int((panel.place.y + 2) * row), int(panel.place.x / 24 * picture.shape[1])
        bottom, right = int(top + panel.place.height * row), left + int(panel.place.width / 24 * picture.shape[1])
        assert picture[top:bottom, left:right, :3].std() > 0.01, f"nothing is drawn of {panel.title}"


@pytest.fixture
def server() -> Iterator[tuple[str, list[dict[str, list[str]]]]]:
    """A server of Prometheus' API: one series for each query, an error for those of a metric that starts with `bad`."""
    asked: list[dict[str, list[str]]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            parameters = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query)
            asked.append(parameters)
            is_bad = parameters["query"][0].startswith("bad")
            result = [{"metric": {"instance": "e"}, "values": [[float(parameters["start"][0]), "1.5"]]}]
            body = {"error": "parse error"} if is_bad else {"data": {"result": result}}
            self.send_response(400 if is_bad else 200)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()
        thread.join()


def test_prometheus_is_asked_over_the_span(server: tuple[str, list[dict[str, list[str]]]]) -> None:
    address, asked = server
    (result,) = ask_prometheus(address)("sum(up)", SPAN)
    assert result["values"] == [[SPAN.start, "1.5"]]
    assert asked == [{"query": ["sum(up)"], "start": ["1000000.0"], "end": ["1000600.0"], "step": ["5.0"]}]
    with pytest.raises(DashboardError, match=r"bad\(.*parse error"):
        ask_prometheus(address)("bad(", SPAN)


def test_the_tool_draws_what_prometheus_says(
    server: tuple[str, list[dict[str, list[str]]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    address, asked = server
    assert main(["--prometheus", address, "--out", str(tmp_path / "dashboard.png")]) == 0
    assert (tmp_path / "dashboard.png").exists()
    assert len(asked) == sum(len(panel.queries) for panel in read_panels(DEFINITION))
    assert capsys.readouterr().out.startswith("wrote ")


def test_without_a_prometheus_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--prometheus", "http://127.0.0.1:1", "--out", str(tmp_path / "dashboard.png")]) == 1
    assert "no Prometheus answers at http://127.0.0.1:1" in capsys.readouterr().err
    assert not (tmp_path / "dashboard.png").exists()
