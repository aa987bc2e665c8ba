"""Where processes meet leaves nothing behind, also where one was killed."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from services.engine.core.rendezvous import rendezvous_directory

MEET = """
import time
from services.engine.core.rendezvous import rendezvous_directory
with rendezvous_directory() as directory:
    (directory / "rendezvous").write_text("here")
    print(directory, flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)


def test_it_is_gone_afterwards(tmp_path: Path) -> None:
    with rendezvous_directory() as first, rendezvous_directory() as second:
        assert first != second
        assert first.is_dir()
        assert second.parent == tmp_path
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_goes_with_the_next_start(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", MEET], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        left = Path(process.stdout.readline().strip())
        with rendezvous_directory():
            assert (left / "rendezvous").read_text() == "here", "its process lives"
        process.kill()
    assert left.is_dir()
    foreign = tmp_path / "slora-engine-other"
    foreign.mkdir()  # without a lock it may be one that is being made
    with rendezvous_directory():
        assert not left.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["slora-engine-other"]
