"""The page allocator: exact rules, and a state machine that tries every order of calls."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from services.engine.memory.page_allocator import PageAllocator, PageIntegrityError, PageOwner


def test_exhaustion_is_a_value_and_takes_nothing() -> None:
    allocator = PageAllocator(4)
    first = allocator.allocate(3, PageOwner.KV)
    assert first is not None
    assert len(set(first)) == 3
    assert allocator.allocate(2, PageOwner.ADAPTER) is None
    assert (allocator.num_free, allocator.num_kv, allocator.num_adapter) == (1, 3, 0)
    assert allocator.allocate(1, PageOwner.ADAPTER) is not None
    assert allocator.allocate(1, PageOwner.KV) is None
    assert allocator.allocate(0, PageOwner.KV) == []
    allocator.check_integrity()


def test_counts_by_owner_and_pages_come_back() -> None:
    allocator = PageAllocator(10)
    kv, adapter = allocator.allocate(4, PageOwner.KV), allocator.allocate(3, PageOwner.ADAPTER)
    assert kv is not None
    assert adapter is not None
    assert not set(kv) & set(adapter)
    assert {allocator.owner(p) for p in kv} == {PageOwner.KV}
    assert {allocator.owner(p) for p in adapter} == {PageOwner.ADAPTER}
    allocator.free(kv)
    assert (allocator.num_free, allocator.num_kv, allocator.num_adapter) == (7, 0, 3)
    allocator.free(adapter)
    assert sorted(allocator.allocate(10, PageOwner.KV) or ()) == list(range(10))


@pytest.mark.parametrize("misuse", ["twice", "unknown", "doubled", "pinned", "pin_kv", "unpin", "pin_free"])
def test_misuse_is_refused_and_changes_nothing(misuse: str) -> None:
    allocator = PageAllocator(8)
    kv = allocator.allocate(3, PageOwner.KV) or []
    adapter = allocator.allocate(3, PageOwner.ADAPTER) or []
    allocator.pin(adapter)
    before = (allocator.num_free, allocator.num_kv, allocator.num_adapter)
    free_page = next(p for p in range(8) if allocator.owner(p) is None)
    calls = {
        "twice": lambda: allocator.free([kv[0], free_page]),
        "unknown": lambda: allocator.free([kv[0], 8]),
        "doubled": lambda: allocator.free([kv[0], kv[0]]),
        "pinned": lambda: allocator.free([kv[0], adapter[1]]),
        "pin_kv": lambda: allocator.pin([adapter[0], kv[0]]),
        "unpin": lambda: allocator.unpin([adapter[0], kv[0]]),
        "pin_free": lambda: allocator.pin([adapter[0], free_page]),
    }
    with pytest.raises(PageIntegrityError):
        calls[misuse]()
    assert before == (allocator.num_free, allocator.num_kv, allocator.num_adapter)
    allocator.check_integrity()
    allocator.unpin(adapter)
    assert not any(allocator.is_pinned(p) for p in adapter)
    allocator.free([*kv, *adapter])


@pytest.mark.parametrize("fault", ["lost", "twice_free", "owned_and_free", "count", "pin_on_kv"])
def test_integrity_check_sees_each_kind_of_damage(fault: str) -> None:
    allocator = PageAllocator(6)
    kv = allocator.allocate(2, PageOwner.KV) or []
    allocator.check_integrity()
    if fault == "lost":
        allocator._free.pop()
    elif fault == "twice_free":
        allocator._free.append(allocator._free[0])
    elif fault == "owned_and_free":
        allocator._free[0] = kv[0]
    elif fault == "count":
        allocator._num_kv += 1
    else:
        allocator._pins[kv[0]] = 1
    with pytest.raises(PageIntegrityError):
        allocator.check_integrity()


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="at least one page"):
        PageAllocator(0)
    with pytest.raises(ValueError, match="-1"):
        PageAllocator(1).allocate(-1, PageOwner.KV)


class AllocatorMachine(RuleBasedStateMachine):
    """Random allocate/free/pin/unpin/evict, compared with plain sets of pages after every step."""

    blocks = Bundle("blocks")
    adapters = Bundle("adapters")

    @initialize(num_pages=st.integers(1, 40))
    def start(self, num_pages: int) -> None:
        self.allocator = PageAllocator(num_pages)
        self.num_pages = num_pages
        self.kv: set[int] = set()
        self.weights: set[int] = set()
        self.pins: dict[tuple[int, ...], int] = {}

    def _take(self, count: int, owner: PageOwner) -> list[int] | None:
        free = self.num_pages - len(self.kv) - len(self.weights)
        pages = self.allocator.allocate(count, owner)
        assert (pages is None) == (count > free)
        if pages is not None:
            assert len(set(pages)) == count
            assert not set(pages) & (self.kv | self.weights)
        return pages

    @rule(target=blocks, count=st.integers(0, 12))
    def allocate_kv(self, count: int) -> object:
        pages = self._take(count, PageOwner.KV)
        if pages is None:
            return multiple()
        self.kv |= set(pages)
        return tuple(pages)

    @rule(target=adapters, count=st.integers(1, 12))
    def allocate_adapter(self, count: int) -> object:
        pages = self._take(count, PageOwner.ADAPTER)
        if pages is None:
            return multiple()
        self.weights |= set(pages)
        self.pins[tuple(pages)] = 0
        return tuple(pages)

    @rule(pages=consumes(blocks))
    def free_kv(self, pages: tuple[int, ...]) -> None:
        self.allocator.free(pages)
        self.kv -= set(pages)

    @rule(pages=adapters)
    def pin(self, pages: tuple[int, ...]) -> None:
        if pages in self.pins:
            self.allocator.pin(pages)
            self.pins[pages] += 1

    @rule(pages=adapters)
    def unpin(self, pages: tuple[int, ...]) -> None:
        if self.pins.get(pages):
            self.allocator.unpin(pages)
            self.pins[pages] -= 1
        elif pages in self.pins:
            with pytest.raises(PageIntegrityError):
                self.allocator.unpin(pages)

    @rule(pages=adapters)
    def evict(self, pages: tuple[int, ...]) -> None:
        if pages not in self.pins:
            return
        if self.pins[pages]:
            with pytest.raises(PageIntegrityError):
                self.allocator.free(pages)
        else:
            self.allocator.free(pages)
            self.weights -= set(pages)
            del self.pins[pages]

    @invariant()
    def whole(self) -> None:
        if not hasattr(self, "allocator"):
            return
        self.allocator.check_integrity()
        assert self.allocator.num_kv == len(self.kv)
        assert self.allocator.num_adapter == len(self.weights)
        assert self.allocator.num_free == self.num_pages - len(self.kv) - len(self.weights)
        for pages, pins in self.pins.items():
            assert all(self.allocator.is_pinned(p) == (pins > 0) for p in pages)


TestAllocatorMachine = AllocatorMachine.TestCase
TestAllocatorMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
