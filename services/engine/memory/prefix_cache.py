"""KV pages that sequences share, and that stay when nobody uses them until somebody needs the room.

A full page whose KV is computed may be entered under its key (`prefix_keys.py`). Then it is *shared*: counted by the
sequences that use it, and *idle* when there are none. Nobody writes to it any more. Only idle pages are evicted, those
that fell idle first before others.

Who uses a page uses all pages before it in its chain, and lets go of the last first. So a page never falls idle before
those that follow it, and eviction takes them before it: what is left can always be found.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from services.engine.memory.page_allocator import PageAllocator, PageIntegrityError, PageOwner


@dataclass(slots=True)
class _SharedPage:
    # None once it is not to be found any more.
    key: bytes | None
    num_users: int
    idle_since: float = 0.0


class PrefixCache:
    """The shared ones of the allocator's KV pages. On the core's thread."""

    def __init__(self, allocator: PageAllocator, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` counts seconds."""
        self._allocator = allocator
        self._clock = clock
        self._by_key: dict[bytes, int] = {}
        self._pages: dict[int, _SharedPage] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def num_idle(self) -> int:
        """Pages that can be evicted."""
        return len(self._idle)

    def idle_since(self, num_pages: int = 1) -> float | None:
        """When the last of the `num_pages` that are evicted next fell idle; None if there are not so many."""
        page = next(islice(self._idle, num_pages - 1, None), None)
        return None if page is None else self._pages[page].idle_since

    def find(self, keys: Sequence[bytes]) -> list[int]:
        """The pages of the longest beginning of `keys` that is here."""
        pages = []
        for key in keys:
            page = self._by_key.get(key)
            if page is None:
                break
            pages.append(page)
        return pages

    def acquire(self, pages: Sequence[int]) -> None:
        """A sequence begins to use `pages`, the first of a chain."""
        for page in pages:
            shared = self._pages[page]
            if not shared.num_users:
                del self._idle[page]
            shared.num_users += 1

    def enter(self, page: int, key: bytes) -> bool:
        """Makes a page of its only user a shared one; False if there is one with that key already."""
        if page in self._pages or self._allocator.owner(page) is not PageOwner.KV:
            raise PageIntegrityError(f"page {page} is shared already or does not hold KV")
        if key in self._by_key:
            return False
        self._by_key[key] = page
        self._pages[page] = _SharedPage(key, num_users=1)
        return True

    def release(self, pages: Sequence[int]) -> None:
        """A sequence no longer uses `pages`, given in the chain's order."""
        now = self._clock()
        for page in reversed(pages):
            shared = self._pages[page]
            if shared.num_users < 1:
                raise PageIntegrityError(f"page {page} is released more often than it was acquired")
            shared.num_users -= 1
            if shared.num_users:
                continue
            if shared.key is None:
                del self._pages[page]
                self._allocator.free([page])
            else:
                shared.idle_since = now
                self._idle[page] = None

    def forget(self, pages: Sequence[int]) -> None:
        """Lets nobody find `pages`, which are in use, any more; they are freed with their last user."""
        for page in pages:
            shared = self._pages[page]
            if shared.key is not None:
                del self._by_key[shared.key]
                shared.key = None

    def evict(self, num_pages: int) -> None:
        """Frees up to so many idle pages."""
        evicted = [self._idle.popitem(last=False)[0] for _ in range(min(num_pages, len(self._idle)))]
        for page in evicted:
            key = self._pages.pop(page).key
            if key is not None:
                del self._by_key[key]
        self._allocator.free(evicted)

    def check_integrity(self, num_users: Mapping[int, int]) -> None:
        """Raises PageIntegrityError unless pages are used by as many as `num_users` says, and kept accordingly."""
        counted = {page: shared.num_users for page, shared in self._pages.items() if shared.num_users}
        if counted != dict(num_users):
            raise PageIntegrityError(f"shared pages are used {counted} times, sequences use {dict(num_users)}")
        if {page for page, shared in self._pages.items() if not shared.num_users} != self._idle.keys():
            raise PageIntegrityError("idle pages are not those that nobody uses")
        if {shared.key: page for page, shared in self._pages.items() if shared.key is not None} != self._by_key:
            raise PageIntegrityError("shared pages are not found under their keys")
        if any(self._allocator.owner(page) is not PageOwner.KV for page in self._pages):
            raise PageIntegrityError("a shared page does not hold KV")
