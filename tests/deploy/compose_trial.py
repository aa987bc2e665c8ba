"""`make test-compose`: brings everything up on a Docker engine, asks it, kills its services, and takes it down again.

Not part of `make test`: it builds images, which takes minutes and a network.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.draw_dashboard import Span, filled_in

ROOT = Path(__file__).resolve().parents[2]
PROJECT = "slora-trial"
READY_SECONDS = 1800.0
ANSWER_SECONDS = 120.0
SPAN = Span(0.0, 300.0, scrape_seconds=75.0)  # rates over five minutes
HTTP = "http://127.0.0.1:8000"
PIRATE = {"model": "pirate", "prompt": "Question: What is the sun?\nAnswer:", "temperature": 0, "max_tokens": 24}

pytestmark = pytest.mark.timeout(2 * READY_SECONDS)


@dataclass(frozen=True, slots=True)
class Trial:
    """The services as they run: `command` is compose with its project, `without` names what could not be had."""

    command: list[str]
    without: frozenset[str]

    def run(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*self.command, *arguments], cwd=ROOT, capture_output=True, text=True, check=check)

    @contextlib.contextmanager
    def killed(self, *services: str) -> Iterator[None]:
        """Services are gone (SIGKILL) while the block runs and are started again at its end."""
        self.run("kill", *services)
        try:
            yield
        finally:
            self.run("start", *services)


def compose_command() -> list[str]:
    """docker-compose, or Docker's own; skips, with the reason, where there is no engine to run them on."""
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "info"], capture_output=True, check=False).returncode:
        pytest.skip("NOTHING WAS BROUGHT UP: no Docker engine runs here")
    plugin = subprocess.run([docker, "compose", "version"], capture_output=True, check=False).returncode == 0
    return [*([docker, "compose"] if plugin else ["docker-compose"]), "--project-name", PROJECT]


def described(command: list[str]) -> dict[str, Any]:
    """The services of the compose file."""
    done = subprocess.run([*command, "config"], cwd=ROOT, capture_output=True, text=True, check=True)
    services: dict[str, Any] = yaml.safe_load(done.stdout)["services"]
    return services


def is_to_be_had(image: str) -> bool:
    here = subprocess.run(["docker", "image", "inspect", image], capture_output=True, check=False).returncode == 0
    return here or subprocess.run(["docker", "pull", image], capture_output=True, check=False).returncode == 0


def taken_addresses() -> list[str]:
    """The addresses the compose file publishes at which something answers already."""
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    published = [port.split(":")[:2] for service in compose["services"].values() for port in service.get("ports", [])]
    return [f"{host}:{port}" for host, port in published if is_answered(host, int(port))]


def is_answered(host: str, port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((host, port)) == 0


def exit_code(find_container: list[str]) -> int:
    """How the container that a command names ended; waits until it has."""
    found = subprocess.run(find_container, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    return int(subprocess.run(["docker", "wait", found], capture_output=True, text=True, check=True).stdout)


@pytest.fixture(scope="module")
def up(request: pytest.FixtureRequest) -> Iterator[Trial]:
    """All services; Prometheus and Grafana only where their published images can be had (their tests say so). Their
    last words are shown if anything failed."""
    command = compose_command()
    # What a trial that was cut off left; then, before minutes of building, what would keep a service from its port.
    subprocess.run([*command, "down", "--volumes"], cwd=ROOT, check=True)
    assert not (taken := taken_addresses()), f"in use, by `make up` perhaps: {', '.join(taken)}"
    services = described(command)
    without = {name for name in ("prometheus", "grafana") if not is_to_be_had(services[name]["image"])}
    is_up = False
    try:
        subprocess.run([*command, "up", "--build", "--detach", *sorted(set(services) - without)], cwd=ROOT, check=True)
        assert exit_code([*command, "ps", "--quiet", "demo-adapters"]) == 0, (
            "the demo's adapters were not all registered"
        )
        is_up = True
        yield Trial(command, frozenset(without))
    finally:
        if not is_up or request.session.testsfailed:
            subprocess.run([*command, "logs", "--no-color", "--tail", "50"], cwd=ROOT, check=False)
        subprocess.run([*command, "down", "--volumes"], cwd=ROOT, check=False)


def read(url: str, body: object = None) -> bytes:
    request = urllib.request.Request(url, json.dumps(body).encode() if body else None)
    request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as answer:
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


def generate() -> str:
    answer = json.loads(read(f"{HTTP}/v1/completions", PIRATE))
    return str(answer["choices"][0]["text"])


def test_an_adapter_answers(up: Trial) -> None:
    eventually(f"{HTTP}/v1/completions", b"Arr", PIRATE)
    assert set(json.loads(read(f"{HTTP}/v1/models"))) >= {"data"}


def test_everything_is_scraped(up: Trial) -> None:
    if "prometheus" in up.without:
        pytest.skip("NOT SCRAPED: Prometheus' image cannot be had here")
    eventually("http://127.0.0.1:9090/api/v1/query?query=sum(up)", b'"4"')


def test_the_dashboard_is_shown(up: Trial) -> None:
    if "grafana" in up.without:
        pytest.skip("NOT SHOWN: Grafana's image cannot be had here")
    eventually("http://127.0.0.1:3000/api/dashboards/uid/slora", b'"slora"')


def query(expression: str) -> list[Any]:
    answer = json.loads(read("http://127.0.0.1:9090/api/v1/query?" + urllib.parse.urlencode({"query": expression})))
    return list(answer["data"]["result"])


def test_the_dashboard_has_something_to_show(up: Trial) -> None:
    """Each panel's queries give series out of what really happened; those of faults give none before there are any."""
    if "prometheus" in up.without:
        pytest.skip("NOT SHOWN: Prometheus' image cannot be had here")
    for _ in range(5):
        generate()
        time.sleep(6.0)  # a scrape is every five seconds
    panels = json.loads((ROOT / "deploy" / "grafana" / "dashboard.json").read_text())["panels"]
    targets = [(panel["title"], target["expr"]) for panel in panels for target in panel.get("targets", [])]
    shown = {(title, filled_in(text, SPAN)) for title, text in targets}
    full = {title for title, text in shown if query(text)}
    assert {title for title, _ in shown} - full <= {"Sent to another engine", "Calls that failed"}


def test_images_without_torch_hold_none(up: Trial) -> None:
    for name in ("gateway", "adapter-store"):
        assert up.run("exec", "-T", name, "python", "-c", "import torch", check=False).returncode


def test_services_are_confined(up: Trial) -> None:
    for name in ("gateway", "adapter-store", "engine-0"):
        assert up.run("exec", "-T", name, "id", "-u").stdout.strip() == "10001"
        assert up.run("exec", "-T", name, "touch", "/venv/mine", check=False).returncode


def test_the_engines_copy_out_of_the_arena(up: Trial) -> None:
    script = "import urllib.request; print(urllib.request.urlopen('http://127.0.0.1:9061/metrics').read().decode())"
    metrics = "".join(up.run("exec", "-T", f"engine-{i}", "python", "-c", script).stdout for i in (0, 1))
    loaded = re.findall(r'slora_engine_adapter_loaded_bytes_total{path="(\w+)"} ([1-9].*)', metrics)
    assert {path for path, _ in loaded} == {"lent"}


def test_a_killed_engine_loses_no_request(up: Trial) -> None:
    before = generate()
    with up.killed("engine-0"):
        assert [generate() for _ in range(8)] == [before] * 8
    with up.killed("engine-1"):  # once the other is ready again, it answers
        eventually(f"{HTTP}/v1/completions", b"Arr", PIRATE)
        assert generate() == before


@pytest.mark.parametrize("service", ["adapter-store", "redis", "s3"])
def test_what_runs_goes_on_without(up: Trial, service: str) -> None:
    before = generate()
    with up.killed(service):
        assert generate() == before
    eventually(f"{HTTP}/v1/completions", b"Arr", PIRATE)


def test_the_catalogue_outlives_every_service(up: Trial) -> None:
    names = {model["id"] for model in json.loads(read(f"{HTTP}/v1/models"))["data"]}
    with up.killed("gateway", "adapter-store", "engine-0", "engine-1", "redis"):
        pass
    eventually(f"{HTTP}/v1/completions", b"Arr", PIRATE)
    assert {model["id"] for model in json.loads(read(f"{HTTP}/v1/models"))["data"]} == names
