"""Where figures are kept: benchmarks/results/<name>.json with hardware, software, command and commit."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
_PACKAGES = ("torch", "triton", "transformers", "peft", "grpcio", "numpy", "blake3")

Row: TypeAlias = dict[str, object]
"""One figure: a metric, its value, and the labels that say of what."""


def record(name: str, command: str, rows: Sequence[Mapping[str, object]]) -> Path:
    """Writes rows of one benchmark with what they were measured on; returns the file."""
    path = RESULTS / f"{name}.json"
    _write(path, _described(command, None), rows)
    return path


def merge(path: Path, command: str, rows: Sequence[Row], accelerator: str) -> None:
    """Puts rows of one of several benchmarks into the file they share.

    A row takes the place of the one with the same labels and metric; others stay. What is said of the file holds for
    the newest rows; those that were measured at another commit carry theirs. Raises ValueError for a file of another
    accelerator.
    """
    described = _described(command, accelerator)
    kept: list[Row] = []
    if path.exists():
        old: dict[str, Any] = json.loads(path.read_text())
        measured_on = str(old["hardware"]["accelerator"])
        if not measured_on.startswith(accelerator):
            raise ValueError(f"{path} is of {measured_on}, not of {accelerator}")
        new_keys = {_key(row) for row in rows}
        at = {} if old["commit"] == described["commit"] else {"commit": old["commit"]}
        kept = [at | row for row in old["rows"] if _key(row) not in new_keys]
    _write(path, described, [*kept, *rows])


def print_row(bench: str, model: str, setting: str, targets: str, metric: str, value: float, **labels: object) -> Row:
    """A row of the results, printed at once."""
    row: Row = {"bench": bench, "model": model, "setting": setting, "targets": targets}
    row |= {**labels, "metric": metric, "value": round(value, 4)}
    say(json.dumps(row))
    return row


def _key(row: Mapping[str, object]) -> str:
    labels = {name: value for name, value in row.items() if name not in ("value", "commit")}
    return json.dumps(labels, sort_keys=True)


def _write(path: Path, described: Mapping[str, object], rows: Sequence[Mapping[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**described, "rows": list(rows)}, indent=2) + "\n")


def _described(command: str, accelerator: str | None) -> dict[str, object]:
    return {
        "hardware": _hardware(accelerator),
        "software": {"python": platform.python_version()} | _versions(),
        "commit": _commit(),
        "command": command,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _versions() -> dict[str, str]:
    versions = {}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def _hardware(accelerator: str | None) -> dict[str, object]:
    model = next(
        (line.split(":", 1)[1].strip() for line in _read("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    memory = next((int(line.split()[1]) >> 20 for line in _read("/proc/meminfo") if line.startswith("MemTotal")), 0)
    num_cores = len(os.sched_getaffinity(0))
    return {"cpu": model, "num_cores": num_cores, "memory_gib": memory, "accelerator": accelerator}


def _read(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _commit() -> str:
    """The commit of the sources; GIT_COMMIT names it where they came without their history."""

    def git(*arguments: str) -> str:
        with contextlib.suppress(OSError):
            done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
            return done.stdout.strip() if done.returncode == 0 else ""
        return ""

    dirty = git("status", "--porcelain", "--untracked-files=no", "--", ":!benchmarks/results")
    return os.environ.get("GIT_COMMIT") or (git("rev-parse", "HEAD") or "unknown") + ("+changes" if dirty else "")


def say(line: str) -> None:
    """A line for people, at once."""
    print(line, flush=True, file=sys.stdout)
