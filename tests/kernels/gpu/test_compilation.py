"""Triton's compiler takes every kernel, also where only the interpreter can run them; none needs many more registers
than there are."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.gpu.conftest import ON_GPU

ROOT = Path(__file__).resolve().parents[3]
LAUNCH = re.compile(r"^\s+(_\w+)\[", re.MULTILINE)
MOST_STACK_BYTES = 32


def launched_kernels() -> set[str]:
    """Their names, which no two files share: profilers and this test tell kernels by them."""
    by_file = [set(LAUNCH.findall(file.read_text())) for file in (ROOT / "kernels" / "gpu").glob("*.py")]
    assert sum(map(len, by_file)) == len(set().union(*by_file)), "two files have a kernel of one name"
    return set().union(*by_file)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(ON_GPU, reason="the other tests compile them")
def test_every_kernel_compiles(tmp_path: Path) -> None:
    launched = launched_kernels()
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.kernels.gpu.compile_kernels"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert {kernel["kernel"] for kernel in kernels} == launched
    assert len(launched) > 14
    assert [kernel for kernel in kernels if kernel["stack"] > MOST_STACK_BYTES] == []
