"""`make test-compose`: brings everything up on a Docker engine, asks an adapter something, and takes it down again.

Not part of `make test`: it builds images, which takes minutes and a network.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROJECT = "slora-trial"
READY_SECONDS = 1800.0

pytestmark = pytest.mark.timeout(2 * READY_SECONDS)


def compose_command() -> list[str]:
    """docker-compose, or Docker's own; skips, with the reason, where there is no engine to run them on."""
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "info"], capture_output=True, check=False).returncode:
        pytest.skip("NOTHING WAS BROUGHT UP: no Docker engine runs here")
    plugin = subprocess.run([docker, "compose", "version"], capture_output=True, check=False).returncode == 0
    return [*([docker, "compose"] if plugin else ["docker-compose"]), "--project-name", PROJECT]


@pytest.fixture(scope="module")
def up() -> Iterator[list[str]]:
    command = compose_command()
    try:
        subprocess.run([*command, "up", "--build", "--detach"], cwd=ROOT, check=True)
        yield command
    finally:
        subprocess.run([*command, "logs", "--tail", "50"], cwd=ROOT, check=False)
        subprocess.run([*command, "down", "--volumes"], cwd=ROOT, check=False)


def read(url: str, body: object = None) -> bytes:
    request = urllib.request.Request(url, json.dumps(body).encode() if body else None)
    request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request, timeout=30) as answer:
        return bytes(answer.read())


def eventually(url: str, wanted: bytes, body: object = None) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while True:
        try:
            found = read(url, body)
            if wanted in found:
                return
        except OSError as error:
            found = str(error).encode()
        assert time.monotonic() < deadline, found
        time.sleep(2.0)


def test_an_adapter_answers(up: list[str]) -> None:
    prompt = "Question: What is the sun?\nAnswer:"
    body = {"model": "pirate", "prompt": prompt, "temperature": 0, "max_tokens": 24}
    eventually("http://127.0.0.1:8000/v1/completions", b"Arr", body)


def test_everything_is_scraped_and_shown(up: list[str]) -> None:
    eventually("http://127.0.0.1:9090/api/v1/query?query=sum(up)", b'"4"')
    eventually("http://127.0.0.1:3000/api/dashboards/uid/slora", b'"slora"')


def test_images_without_torch_hold_none(up: list[str]) -> None:
    for name in ("gateway", "adapter-store"):
        command = [*up, "exec", "-T", name, "python", "-c", "import torch"]
        assert subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode
