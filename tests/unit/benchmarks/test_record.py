"""Figures of several benchmarks in one file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.record import Row, merge


def row(metric: str, value: float, **labels: object) -> Row:
    return {"bench": "decode", **labels, "metric": metric, "value": value}


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def test_rows_take_the_place_of_their_like_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "h200.json"
    merge(path, "first", [row("tpot_ms", 1.0, batch=1), row("tpot_ms", 2.0, batch=32)], "NVIDIA H200")
    merge(path, "second", [row("tpot_ms", 3.0, batch=32), row("seconds", 4.0)], "NVIDIA H200")
    result = read(path)
    assert [(one["metric"], one.get("batch"), one["value"]) for one in result["rows"]] == [
        ("tpot_ms", 1, 1.0),
        ("tpot_ms", 32, 3.0),
        ("seconds", None, 4.0),
    ]
    assert result["command"] == "second"
    assert result["hardware"]["accelerator"] == "NVIDIA H200"


def test_rows_that_stay_keep_the_commit_they_were_measured_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "h200.json"
    for commit, value in (("aaa", 1.0), ("bbb", 2.0), ("ccc", 3.0)):
        monkeypatch.setenv("GIT_COMMIT", commit)
        merge(path, "command", [row("tpot_ms", value, batch=int(value))], "NVIDIA H200")
    result = read(path)
    assert result["commit"] == "ccc"
    assert [one.get("commit", result["commit"]) for one in result["rows"]] == ["aaa", "bbb", "ccc"]


def test_figures_of_two_accelerators_are_not_mixed(tmp_path: Path) -> None:
    path = tmp_path / "h200.json"
    merge(path, "first", [row("tpot_ms", 1.0)], "NVIDIA H200")
    with pytest.raises(ValueError, match="is of NVIDIA H200, not of NVIDIA H100"):
        merge(path, "second", [row("tpot_ms", 2.0)], "NVIDIA H100")
