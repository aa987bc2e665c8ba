"""The life of adapters: every state, every way out of it, and nothing left behind."""

from __future__ import annotations

import random

import pytest

from services.common.errors import Reason, SloraError
from services.engine.adapters.residency import AdapterState, Residency
from services.engine.memory.page_allocator import PageAllocator, PageIntegrityError, PageOwner
from services.engine.messages import Adapter
from tests.fakes.fake_device import FakeDevice
from tests.fakes.fake_model import digest_of
from tests.fakes.scripted_loader import ScriptedLoader

PAGE_ELEMS = 32


class World:
    """A residency over a scripted loader in which each `tick` moves every load by one stage."""

    def __init__(self, num_pages: int = 10, max_adapters: int = 3, **sizes: int) -> None:
        self.device = FakeDevice(num_pages)
        self.loader = ScriptedLoader(self.device, PAGE_ELEMS, random.Random(0))
        self.loader.max_ticks = 0
        self.loader.too_late_rate = 0.0
        self.loader.sizes = {digest_of(name): size for name, size in sizes.items()}
        self.allocator = PageAllocator(num_pages)
        self.residency = Residency(self.allocator, self.device, self.loader, max_adapters)

    def request(self, name: str) -> AdapterState:
        return self.residency.request(Adapter(f"{name}@1", digest_of(name)))

    def tick(self):  # type: ignore[no-untyped-def]
        self.loader.advance()
        news = self.residency.poll()
        self.allocator.check_integrity()
        self.residency.check_integrity()
        return news

    def load(self, name: str) -> str:
        digest = digest_of(name)
        self.request(name)
        if self.residency.state(digest) is AdapterState.SIZING:
            self.tick()
        assert self.residency.grant(digest)
        self.tick()
        assert self.residency.is_resident(digest)
        return digest


def test_the_whole_life() -> None:
    world = World(a=4)
    digest = digest_of("a")
    residency = world.residency
    assert residency.state(digest) is AdapterState.ABSENT
    assert residency.num_pages(digest) is None
    assert world.request("a") is AdapterState.SIZING
    assert world.request("a") is AdapterState.SIZING
    assert world.loader.num_started == 1
    assert world.tick().sized == [Adapter("a@1", digest)]
    assert residency.state(digest) is AdapterState.SIZED
    assert residency.num_pages(digest) == 4
    assert residency.num_in_flight == 0, "a sized adapter waits for the core"
    assert world.allocator.num_adapter == 0
    assert residency.grant(digest)
    assert residency.state(digest) is AdapterState.LOADING
    assert list(residency.loading()) == [digest]
    assert world.allocator.num_adapter == 4
    [loaded] = world.tick().loaded
    assert (loaded.adapter.digest, loaded.load_seconds, loaded.packed_bytes) == (digest, 0.25, 4096)
    assert list(residency.idle()) == [(digest, 4)]
    slot = residency.pin(digest)
    assert residency.pin(digest) == slot
    assert world.device.installed[slot][0] == digest
    assert list(residency.idle()) == []
    residency.unpin(digest)
    assert residency.num_idle_pages == 0
    with pytest.raises(KeyError):
        residency.evict(digest)
    residency.unpin(digest)
    assert residency.num_idle_pages == 4
    residency.evict(digest)
    assert residency.state(digest) is AdapterState.ABSENT
    assert world.allocator.num_free == 10
    assert world.device.installed == {}


def test_a_size_once_known_spares_the_wait_for_it() -> None:
    world = World(a=4)
    world.residency.evict(world.load("a"))
    assert world.loader.num_started == 1
    assert world.request("a") is AdapterState.SIZED
    assert world.loader.num_started == 1, "nothing is fetched before there are pages"
    assert world.residency.grant(digest_of("a"))
    world.tick()
    news = world.tick()
    assert [loaded.adapter.digest for loaded in news.loaded] == [digest_of("a")]
    assert not news.sized


def test_idle_adapters_come_least_recently_used_first() -> None:
    world = World(a=1, b=1, c=1)
    a, b, c = (world.load(name) for name in "abc")
    assert [digest for digest, _ in world.residency.idle()] == [a, b, c]
    world.residency.pin(a)
    assert [digest for digest, _ in world.residency.idle()] == [b, c]
    world.residency.unpin(a)
    assert [digest for digest, _ in world.residency.idle()] == [b, c, a]


def test_no_pages_or_no_slot_is_a_value_and_changes_nothing() -> None:
    world = World(num_pages=4, max_adapters=1, a=3, b=3, c=1)
    world.load("a")
    world.request("b")
    world.request("c")
    world.tick()
    assert world.residency.num_free_slots == 0
    assert not world.residency.grant(digest_of("c")), "no slot"
    world.residency.evict(digest_of("a"))
    kept = world.allocator.allocate(2, PageOwner.KV)
    assert not world.residency.grant(digest_of("b")), "two pages of three"
    assert world.residency.state(digest_of("b")) is AdapterState.SIZED
    assert (world.allocator.num_free, world.residency.num_free_slots) == (2, 1)
    world.allocator.free(kept or ())
    assert world.residency.grant(digest_of("b"))


@pytest.mark.parametrize("when", ["sizing", "loading"])
def test_a_failed_load_leaves_nothing_and_the_next_try_is_free(when: str) -> None:
    world = World(a=4)
    digest = digest_of("a")
    error = SloraError(Reason.ADAPTER_CHANGED, "the files differ")
    world.request("a")
    if when == "loading":
        world.tick()
        assert world.residency.grant(digest)
    world.loader.failing[digest] = error
    world.loader.fails_early = True
    [(adapter, failure)] = world.tick().failed
    assert (adapter.digest, failure) == (digest, error)
    assert world.residency.state(digest) is AdapterState.ABSENT
    assert world.residency.num_pages(digest) is None, "a size that may be stale is asked for again"
    assert (world.allocator.num_free, world.residency.num_free_slots) == (10, 3)
    world.loader.failing.clear()
    world.load("a")


def test_cancel_before_pages_are_granted_is_at_once() -> None:
    world = World(a=4)
    digest = digest_of("a")
    world.request("a")
    world.residency.cancel(digest)
    assert world.residency.state(digest) is AdapterState.ABSENT
    world.request("a")  # a new load; the end of the old one must not be taken for its end
    news = world.tick()
    assert not news.failed
    assert [adapter.digest for adapter in news.sized] == [digest]
    world.residency.cancel(digest)
    assert world.residency.state(digest) is AdapterState.ABSENT
    world.tick()
    world.residency.cancel(digest)  # absent: nothing to do
    assert world.residency.num_in_flight == 0


def test_cancel_while_loading_keeps_the_pages_until_the_thread_lets_go() -> None:
    world = World(a=4)
    digest = digest_of("a")
    world.request("a")
    world.tick()
    assert world.residency.grant(digest)
    world.residency.cancel(digest)
    assert world.residency.state(digest) is AdapterState.LEAVING
    assert world.residency.num_pages_leaving == 4
    assert world.allocator.num_free == 6, "somebody may still write into them"
    assert world.request("a") is AdapterState.LEAVING
    assert not world.tick().failed
    assert world.residency.state(digest) is AdapterState.ABSENT
    assert (world.allocator.num_free, world.residency.num_free_slots) == (10, 3)


def test_cancel_that_comes_too_late_leaves_a_resident_adapter() -> None:
    world = World(a=4)
    digest = digest_of("a")
    world.loader.too_late_rate = 1.0
    world.request("a")
    world.tick()
    assert world.residency.grant(digest)
    world.residency.cancel(digest)
    assert [loaded.adapter.digest for loaded in world.tick().loaded] == [digest]
    assert world.residency.num_idle_pages == 4


def test_misuse_is_noticed() -> None:
    world = World(a=4)
    world.request("a")
    with pytest.raises(PageIntegrityError, match="SIZING"):
        world.residency.pin(digest_of("a"))
    with pytest.raises(PageIntegrityError, match="SIZING"):
        world.residency.grant(digest_of("a"))
    with pytest.raises(ValueError, match="max_adapters"):
        Residency(world.allocator, world.device, world.loader, 0)


@pytest.mark.parametrize("damage", ["slot", "pages", "idle"])
def test_integrity_check_sees_damage(damage: str) -> None:
    world = World(a=4)
    world.load("a")
    residency = world.residency
    if damage == "slot":
        residency._free_slots.append(residency._free_slots[0])
    elif damage == "pages":
        world.allocator.allocate(1, PageOwner.ADAPTER)
    else:
        residency._idle.clear()
    with pytest.raises(PageIntegrityError):
        residency.check_integrity()


def test_a_thousand_adapters_through_three_slots_leave_no_trace() -> None:
    names = [f"a{i}" for i in range(1000)]
    world = World(num_pages=9, max_adapters=3, **dict.fromkeys(names, 3))
    for number, name in enumerate(names):
        if number >= 3:
            world.residency.evict(next(iter(world.residency.idle()))[0])
        world.load(name)
    assert len(world.residency._entries) == 3
    assert len(world.residency._loads) == 0
    assert world.allocator.num_adapter == 9
