"""Which arenas a reader maps, which it never reads and streams instead, and when it lets go of one."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from services.adapter_store.residency_words import NO_WORD
from services.engine.adapters import mapped_arena
from services.engine.adapters.load_job import LoadInstalled
from services.engine.adapters.mapped_arena import NUM_RESIDENCY_WORDS
from tests.fixtures.lease_store import LeaseStore
from tests.fixtures.leasing import A, Engine, eventually


@pytest.mark.parametrize("how", ["no such file", "another arena", "another size", "a directory"])
def test_an_arena_that_is_not_the_stores_is_never_read(
    make_store: Callable[..., LeaseStore],
    make_engine: Callable[..., Engine],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    how: str,
) -> None:
    store = make_store()
    weights = store.add(A, 1)
    told = store.delivery._arena_message
    if how == "no such file":
        told.path = str(tmp_path / "elsewhere")
    elif how == "another arena":
        told.arena_id = bytes(16)
    elif how == "another size":
        told.num_bytes -= 4096
    else:
        told.path = str(tmp_path)
    engine = make_engine(store.address)
    with caplog.at_level(logging.INFO):
        for number in range(3):
            event = engine.load(A)
            assert isinstance(event, LoadInstalled)
            assert not event.lent
            assert engine.weights(number) == weights
    assert store.calls[0] == "share"
    assert caplog.text.count("out of reach here") == 1
    if how != "another arena":  # then a fetch speaks of another one than the lease did
        assert store.calls == ["share", "fetch", "fetch", "fetch"]


def test_a_reader_without_permission_is_streamed_to(make_store: Callable[..., LeaseStore], tmp_path: Path) -> None:
    store = make_store()
    weights = store.add(A, 1)
    code = (
        "import os, sys, time\n"
        "from services.engine.adapters.mapped_arena import ArenaReader\n"
        "from services.engine.adapters.store_client import StoreClient\n"
        "from tests.fakes.fake_device import FakeDevice\n"
        "if not os.getuid(): os.setgid(65534); os.setuid(65534)\n"
        "fetch = StoreClient([sys.argv[1]], ArenaReader(FakeDevice(1))).open(sys.argv[2])\n"
        "until = time.monotonic() + 10\n"
        "assert fetch.lease(until) is None\n"
        "sys.stdout.buffer.write(b''.join(fetch.chunks(until)))\n"
    )
    if os.getuid():
        store.arena.path.chmod(0)
    else:
        tmp_path.chmod(0o755)
    done = subprocess.run([sys.executable, "-c", code, store.address, A], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    assert done.stdout == weights
    assert store.calls == ["share", "fetch"]


def test_another_arena_is_looked_at_again(
    make_store: Callable[..., LeaseStore], make_engine: Callable[..., Engine]
) -> None:
    store = make_store()
    store.add(A, 1)
    engine = make_engine(store.address)
    assert engine.arenas is not None
    engine.arenas._unreadable.add(store.arena.arena_id)
    for _ in range(2):
        event = engine.load(A)
        assert isinstance(event, LoadInstalled)
        assert not event.lent
    assert not engine.arenas.may_be_readable(store.arena.arena_id)
    engine.arenas._unreadable.remove(store.arena.arena_id)
    engine.arenas._unreadable.add(b"of a store before")
    event = engine.load(A)
    assert isinstance(event, LoadInstalled)
    assert event.lent


def test_a_store_without_leases_is_asked_once(
    make_store: Callable[..., LeaseStore], make_engine: Callable[..., Engine]
) -> None:
    store = make_store()
    weights = store.add(A, 1)
    store.is_old = True
    engine = make_engine(store.address)
    event = engine.load(A)
    assert isinstance(event, LoadInstalled)
    assert not event.lent
    assert engine.weights() == weights


def test_a_lease_of_an_adapter_that_has_no_word_is_none(
    make_store: Callable[..., LeaseStore], make_engine: Callable[..., Engine]
) -> None:
    store = make_store()
    words = store.arena.residency_words
    taken = [words.take() for _ in range(NUM_RESIDENCY_WORDS)]
    assert words.take() == NO_WORD
    weights = store.add(A, 1)
    engine = make_engine(store.address)
    event = engine.load(A)
    assert isinstance(event, LoadInstalled), event
    assert not event.lent
    assert engine.weights() == weights
    store.discard(A)
    words.give_back(taken[0])
    store.add(A, 1)
    event = engine.load(A)
    assert isinstance(event, LoadInstalled), event
    assert event.lent
    assert store.calls[0] == store.calls[-1] == "share"


def test_an_arena_goes_soon_after_its_store(
    make_store: Callable[..., LeaseStore], make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mapped_arena, "WATCH_SECONDS", 0.05)
    store = make_store()
    store.add(A, 1)
    engine = make_engine(store.address)
    assert isinstance(engine.load(A), LoadInstalled)
    assert engine.arenas is not None
    assert store.arena.arena_id in engine.arenas._arenas
    time.sleep(0.2)
    assert store.arena.arena_id in engine.arenas._arenas, "its store lives"
    store.close()
    eventually(lambda: not engine.arenas._arenas)  # type: ignore[union-attr]
