"""How leases end in a store's counts and spans: a load that went well looks like one, a lost lease does not."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator

import pytest

from tests.fakes.trace_collector import TraceCollector
from tests.fixtures.leasing import eventually, go_on
from tests.fixtures.store_process import StoreProcess
from tests.integration.adapter_store.conftest import MakeAdapter, StartStore, connected

SHARE = "slora.adapter_store.v1.AdapterStoreService/ShareAdapter"


@pytest.fixture
def collector() -> Iterator[TraceCollector]:
    with TraceCollector() as opened:
        yield opened


def counted(store: StoreProcess, pattern: str) -> Counter[str]:
    """Values of the store's metrics by the label value that `pattern`'s group is; zeros left out."""
    with urllib.request.urlopen(f"http://127.0.0.1:{store.listening['metrics_port']}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    found = re.findall(rf"^slora_adapter_store_{pattern} (\S+)$", text, re.MULTILINE)
    return +Counter({label: int(float(value)) for label, value in found})


def copies(process: subprocess.Popen[str]) -> None:
    assert go_on(process).startswith("lasted")


def dies(process: subprocess.Popen[str]) -> None:
    process.kill()


def stands_still(process: subprocess.Popen[str]) -> None:
    os.kill(process.pid, signal.SIGSTOP)


@pytest.mark.parametrize(
    ("reader_does", "stall_seconds", "deadline_seconds", "lease", "call", "status"),
    [
        (copies, 60, 20.0, "returned", "OK", "OK"),
        # Its store cannot tell it from one that has copied; its engine's end is seen elsewhere.
        (dies, 60, 20.0, "returned", "OK", "OK"),
        (stands_still, 2, 20.0, "expired", "DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED"),
        # As with every call whose caller set a deadline and let it pass.
        (stands_still, 60, 6.0, "expired", "CANCELLED", "DEADLINE_EXCEEDED"),
    ],
)
async def test_a_lease_counts_as_it_ended(
    start_store: StartStore,
    make_adapter: MakeAdapter,
    reader: Callable[..., subprocess.Popen[str]],
    collector: TraceCollector,
    reader_does: Callable[[subprocess.Popen[str]], None],
    stall_seconds: float,
    deadline_seconds: float,
    lease: str,
    call: str,
    status: str,
) -> None:
    store = start_store(metrics="127.0.0.1:0", otlp_endpoint=collector.endpoint, stall_seconds=stall_seconds)
    async with connected(store) as client:
        digest = (await client.upload("a", make_adapter(1))).adapter.digest
    reader_does(reader(f"127.0.0.1:{store.listening['port']}", digest, deadline_seconds))
    collector.wait_for(lambda: collector.named(SHARE))
    eventually(lambda: bool(counted(store, r'leases_total\{outcome="(\w+)"\}')))
    assert counted(store, r'leases_total\{outcome="(\w+)"\}') == {lease: 1}
    assert counted(store, r'calls_total\{method="ShareAdapter",outcome="(\w+)"\}') == {call: 1}
    (span,) = collector.named(SHARE)
    assert span.attributes["rpc.response.status_code"] == status
    assert span.is_error == (status != "OK")
    assert span.attributes["slora.adapter.digest"] == digest
