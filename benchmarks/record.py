"""Where figures are kept: benchmarks/results/<name>.json with hardware, software, command and commit."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
_PACKAGES = ("torch", "transformers", "peft", "grpcio", "numpy", "blake3")


def record(name: str, command: str, rows: Sequence[Mapping[str, object]]) -> Path:
    """Writes rows of one benchmark with what they were measured on; returns the file."""
    result = {
        "hardware": _hardware(),
        "software": {"python": platform.python_version()}
        | {package: importlib.metadata.version(package) for package in _PACKAGES},
        "commit": _commit(),
        "command": command,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "rows": list(rows),
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    return path


def _hardware() -> dict[str, object]:
    model = next(
        (line.split(":", 1)[1].strip() for line in _read("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    memory = next((int(line.split()[1]) >> 20 for line in _read("/proc/meminfo") if line.startswith("MemTotal")), 0)
    return {"cpu": model, "num_cores": len(os.sched_getaffinity(0)), "memory_gib": memory, "accelerator": None}


def _read(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _commit() -> str:
    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    dirty = git("status", "--porcelain", "--untracked-files=no", "--", ":!benchmarks/results")
    return (git("rev-parse", "HEAD") or "unknown") + ("+changes" if dirty else "")


def say(line: str) -> None:
    """A line for people, at once."""
    print(line, flush=True, file=sys.stdout)
