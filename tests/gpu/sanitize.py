"""The kernels' tests under NVIDIA's compute-sanitizer: no kernel reads or writes what is not its own.

A file of tests and a type of elements at a time, several side by side, as memcheck makes tests many times slower. Ends
with 1 if any test fails or any access is wrong. Where there is no accelerator, or the tool is not installed (it comes
with the CUDA toolkit), it says so, and ends with 0.

Run: python -m tests.gpu.sanitize [--tool memcheck] [--processes 8]
"""

from __future__ import annotations

import argparse
import glob
import itertools
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
TESTS = Path("tests/kernels/gpu")
TYPES = ("bfloat16", "float16", "float32")
WRONG_ACCESS = 66
"""What the tool ends with, other than pytest's own statuses."""

NOTHING_COLLECTED = 5
SUMMARY = re.compile(r"\d+ (?:passed|failed|error|deselected)[^\n]*|ERROR SUMMARY: [^\n]*|SANITIZER SUMMARY: [^\n]*")


def find_tool() -> str | None:
    """The newest compute-sanitizer here."""
    places = sorted(glob.glob("/usr/local/cuda*/bin/compute-sanitizer"), reverse=True)
    return shutil.which("compute-sanitizer") or next(iter(places), None)


def check(tool: str, kind: str, file: Path, dtype: str | None) -> bool:
    """Runs the file's tests of a type, or those of none; says how it went."""
    # "float16" stands in "bfloat16" too.
    chosen = f"torch.{dtype}" if dtype else " and ".join(f"not torch.{name}" for name in TYPES)
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(file), "-k", chosen]
    command = [tool, "--tool", kind, "--target-processes", "all", "--error-exitcode", str(WRONG_ACCESS), *tests]
    began = time.monotonic()
    # No test is too slow here.
    environment = os.environ | {"PYTEST_TIMEOUT": "0"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    is_clean = done.returncode in (0, NOTHING_COLLECTED)
    said = "; ".join(SUMMARY.findall(done.stdout))
    print(f"{file.name} {dtype or 'other'}: {said} ({time.monotonic() - began:.0f} s)", flush=True)
    if not is_clean:
        print(done.stdout + done.stderr, flush=True)
    return is_clean


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if all is clean, or nothing could be checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tool", default="memcheck", help="of compute-sanitizer (default %(default)s)")
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 1) // 2), help="side by side")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("NOT CHECKED: there is no accelerator", flush=True)
        return 0
    tool = find_tool()
    if tool is None:
        print("NOT CHECKED: compute-sanitizer is not installed; it comes with the CUDA toolkit", flush=True)
        return 0
    files = sorted(TESTS / path.name for path in (ROOT / TESTS).glob("test_*.py"))
    jobs = list(itertools.product(files, (*TYPES, None)))
    with ThreadPoolExecutor(options.processes) as pool:
        clean = list(pool.map(lambda job: check(tool, options.tool, *job), jobs))
    print(f"{options.tool}: {sum(clean)} of {len(jobs)} runs are clean", flush=True)
    return 0 if all(clean) else 1


if __name__ == "__main__":
    sys.exit(main())
