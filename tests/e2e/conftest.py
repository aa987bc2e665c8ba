"""What end-to-end tests share: small checkpoints, the whole stack as real processes, and its metrics."""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from slora_client import AdapterClient

from services.local.stack import LocalStack


def metric(url: str, name: str, **labels: str) -> float:
    """Sum of a metric's samples whose labels agree, read from a service's /metrics."""
    with urllib.request.urlopen(url, timeout=30) as answer:
        text = answer.read().decode()
    samples = (s for family in text_string_to_metric_families(text) for s in family.samples)
    return sum(s.value for s in samples if s.name == name and labels.items() <= s.labels.items())


def wait_until(what: str, condition: Callable[[], bool], timeout_seconds: float = 60.0) -> None:
    """Polls until `condition` holds; fails the test after `timeout_seconds`."""
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_seconds} s: {what}"
        time.sleep(0.05)


def assert_no_page_lost(stack: LocalStack) -> None:
    """Once nothing runs, every page is free or can be evicted: of an adapter, or of the prefix cache."""
    for engine in stack.engine_names:
        url = stack.metrics_urls[engine]

        def pages(state: str, url: str = url) -> float:
            return metric(url, "slora_engine_pool_pages", state=state)

        def at_rest(url: str = url) -> bool:
            idle = metric(url, "slora_engine_running_sequences") + metric(url, "slora_engine_waiting_sequences") == 0
            return idle and pages("kv") == 0

        wait_until(f"{engine} is at rest with no KV page in use", at_rest)
        assert pages("adapter") + pages("cached") == pages("evictable"), "an idle engine pins adapters"


def upload(stack: LocalStack, adapters: dict[str, Path]) -> None:
    """Uploads adapter directories through the store."""
    with AdapterClient(stack.store_address) as client:
        for name, directory in adapters.items():
            client.upload(name, directory)


@pytest.fixture
def stack_logs(tmp_path: Path) -> Iterator[None]:
    """After a failure, what went wrong inside stands in these logs."""
    yield
    for log in sorted(tmp_path.rglob("logs/*.log")):
        for line in log.read_text(errors="replace").splitlines():
            try:
                level = json.loads(line).get("level")
            except (ValueError, AttributeError):
                continue
            if level in ("ERROR", "CRITICAL"):
                print(log.name, line)
