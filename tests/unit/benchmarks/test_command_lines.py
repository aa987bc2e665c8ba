"""What may be run of the benchmarks says so when asked for help, and does nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.bench_gateway_relay import chosen
from benchmarks.record import ROOT

# One process for all: most of the time is that of imports. Nothing may be started or written, even if a program did not
# look at its options.
ASK_ALL = """
import contextlib, io, json, os, runpy, sys

root = sys.argv[1]

def forbid(event, arguments):
    if event == "open" and isinstance(arguments[0], str) and isinstance(arguments[2], int):
        if arguments[2] & (os.O_WRONLY | os.O_RDWR) and os.path.abspath(arguments[0]).startswith(root):
            raise RuntimeError(f"writes {arguments[0]}")
    if event == "subprocess.Popen" and sys.executable in map(str, arguments[1]):
        raise RuntimeError(f"starts {arguments[1]}")

sys.addaudithook(forbid)
said = {}
for name in sys.argv[2:]:
    sys.argv = [name, "--help"]
    sys.modules.pop(name, None)
    with contextlib.redirect_stdout(io.StringIO()) as output:
        try:
            runpy.run_module(name, run_name="__main__")
            outcome = "ran"
        except SystemExit as exit:
            outcome = exit.code
        except BaseException as error:
            outcome = repr(error)
    said[name] = [outcome, output.getvalue()]
print(json.dumps(said))
"""


PATIENCE_SECONDS = 570
"""Most of twenty seconds on a quiet machine."""


def programs() -> list[str]:
    """Modules of benchmarks that may be run."""
    files = sorted((ROOT / "benchmarks").rglob("*.py"))
    runnable = [file for file in files if 'if __name__ == "__main__":' in file.read_text()]
    return [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in runnable]


@pytest.mark.timeout(PATIENCE_SECONDS + 30)
def test_all_print_help_and_start_nothing(tmp_path: Path) -> None:
    names = programs()
    assert "benchmarks.bench_gateway_relay" in names
    assert "benchmarks.gpu.bench_engine" in names
    command = [sys.executable, "-B", "-c", ASK_ALL, str(ROOT), *names]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "MPLCONFIGDIR": str(tmp_path)}
    done = subprocess.run(
        command, check=False, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_SECONDS
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert {name: outcome for name, (outcome, _) in said.items() if outcome != 0} == {}
    assert [name for name, (_, text) in said.items() if not text.startswith("usage: ")] == []


def test_how_many_gateways_and_how_fast() -> None:
    assert chosen(["--processes", "1,2,4", "16000"]).processes == ([1, 2, 4], 16000)
    assert chosen([]).processes is None
    assert chosen(["--short"]).short


@pytest.mark.parametrize(
    "arguments", [["--processes", "1,2"], ["--processes", "1,x", "5"], ["--short", "--processes", "1", "5"], ["1,2"]]
)
def test_what_a_relay_is_not_asked_for_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        chosen(arguments)
    assert caught.value.code == 2
    assert "usage: " in capsys.readouterr().err
