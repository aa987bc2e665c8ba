"""Who owns which page of the pool: KV, an adapter, or nobody. S-LoRA section 5 (Unified Paging). No tensors here."""

from __future__ import annotations

import enum
from collections.abc import Sequence


class PageOwner(enum.Enum):
    """What a page holds."""

    KV = "kv"
    ADAPTER = "adapter"


class PageIntegrityError(RuntimeError):
    """Pages were used against the rules (freed twice, freed while pinned, lost): a bug, never a planned state."""


class PageAllocator:
    """Hands out the pages 0 … num_pages-1 of the pool.

    Running out is a value (`None`), never an exception. Each call costs time in proportion to the pages it names.
    A misuse raises `PageIntegrityError` and changes nothing.
    """

    def __init__(self, num_pages: int) -> None:
        if num_pages < 1:
            raise ValueError(f"a pool has at least one page, not {num_pages}")
        self._num_pages = num_pages
        # Taken from the end: low page ids first, and those freed last are used first again.
        self._free = list(range(num_pages - 1, -1, -1))
        self._owners: list[PageOwner | None] = [None] * num_pages
        self._pins = [0] * num_pages
        self._num_kv = 0

    @property
    def num_pages(self) -> int:
        """Pages in all."""
        return self._num_pages

    @property
    def num_free(self) -> int:
        """Pages that nothing owns."""
        return len(self._free)

    @property
    def num_kv(self) -> int:
        """Pages that hold KV."""
        return self._num_kv

    @property
    def num_adapter(self) -> int:
        """Pages that hold adapter weights."""
        return self._num_pages - len(self._free) - self._num_kv

    def allocate(self, num_pages: int, owner: PageOwner) -> list[int] | None:
        """`num_pages` pages for `owner`, or None and nothing taken when fewer are free."""
        if num_pages < 0:
            raise ValueError(f"cannot allocate {num_pages} pages")
        if num_pages > len(self._free):
            return None
        if num_pages == 0:
            return []
        pages = self._free[-num_pages:]
        pages.reverse()
        del self._free[-num_pages:]
        for page in pages:
            self._owners[page] = owner
        if owner is PageOwner.KV:
            self._num_kv += num_pages
        return pages

    def free(self, pages: Sequence[int]) -> None:
        """Gives back `pages`, all of them owned and not pinned."""
        self._require_owned(pages)
        for page in pages:
            if self._pins[page]:
                raise PageIntegrityError(f"page {page} is freed while it is pinned {self._pins[page]} times")
        for page in pages:
            if self._owners[page] is PageOwner.KV:
                self._num_kv -= 1
            self._owners[page] = None
        self._free.extend(reversed(pages))

    def pin(self, pages: Sequence[int]) -> None:
        """Keeps an adapter's `pages` from being freed until as many `unpin`s have come."""
        self._require_owned(pages)
        for page in pages:
            if self._owners[page] is not PageOwner.ADAPTER:
                raise PageIntegrityError(f"page {page} holds KV; only adapter pages are pinned")
        for page in pages:
            self._pins[page] += 1

    def unpin(self, pages: Sequence[int]) -> None:
        """Takes back one `pin` of `pages`."""
        self._require_owned(pages)
        for page in pages:
            if not self._pins[page]:
                raise PageIntegrityError(f"page {page} is unpinned more often than it was pinned")
        for page in pages:
            self._pins[page] -= 1

    def is_pinned(self, page: int) -> bool:
        """Whether `page` must stay."""
        return self._pins[page] > 0

    def owner(self, page: int) -> PageOwner | None:
        """What `page` holds; None if it is free."""
        return self._owners[page]

    def check_integrity(self) -> None:
        """Raises PageIntegrityError unless every page is either free or owned, once, and only owned ones are pinned.

        Costs time in proportion to the pool's pages.
        """
        free = set(self._free)
        if len(free) != len(self._free):
            raise PageIntegrityError("a page is on the free list twice")
        if not free <= set(range(self._num_pages)):
            raise PageIntegrityError("the free list has pages that the pool has not")
        num_kv = self._owners.count(PageOwner.KV)
        num_adapter = self._owners.count(PageOwner.ADAPTER)
        if len(free) + num_kv + num_adapter != self._num_pages:
            raise PageIntegrityError(
                f"{len(free)} free + {num_kv} KV + {num_adapter} adapter pages are not the pool's {self._num_pages}"
            )
        if num_kv != self._num_kv:
            raise PageIntegrityError(f"{num_kv} pages hold KV, the count says {self._num_kv}")
        for page in free:
            if self._owners[page] is not None:
                raise PageIntegrityError(f"page {page} is free and holds {self._owners[page]}")
        for page, pins in enumerate(self._pins):
            if pins < 0 or (pins and self._owners[page] is not PageOwner.ADAPTER):
                raise PageIntegrityError(f"page {page} of {self._owners[page]} is pinned {pins} times")

    def _require_owned(self, pages: Sequence[int]) -> None:
        if len(set(pages)) != len(pages):
            raise PageIntegrityError(f"a page is named twice in {list(pages)}")
        for page in pages:
            if not 0 <= page < self._num_pages or self._owners[page] is None:
                raise PageIntegrityError(f"page {page} is owned by nobody")
