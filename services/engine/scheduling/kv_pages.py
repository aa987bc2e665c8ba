"""The KV pages of sequences: which they find computed, which they take, which they share, and when they let go.

A sequence begins with the pages of the prefix cache that hold its first tokens. At least its last token is left to be
computed, since the next one is drawn from what that gives. When a step that completed a page is committed, the page
becomes a shared one that others find, while the sequence runs and after. One that would begin while another computes
what makes up at least half of its own work waits for that (`awaits`). If two compute the same all the same, the second
keeps its own page and shares no more of them: who uses a shared page has to use all before it.

Two kinds of tokens are never shared: those of a page that is not full, and those of a sequence that failed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from services.engine.config import SchedulerConfig
from services.engine.memory.page_allocator import PageAllocator, PageIntegrityError, PageOwner
from services.engine.memory.prefix_cache import PrefixCache
from services.engine.memory.prefix_keys import PrefixKeys
from services.engine.scheduling.coming_pages import ComingPages
from services.engine.scheduling.memory_order import MemoryOrder
from services.engine.scheduling.sequence import Sequence


class KvPages:
    """Keeps the block tables. Who may have pages, and whose are taken, is `MemoryOrder`'s and the scheduler's."""

    def __init__(
        self, config: SchedulerConfig, allocator: PageAllocator, cache: PrefixCache, order: MemoryOrder
    ) -> None:
        self._tokens_per_page = config.tokens_per_page
        self._allocator = allocator
        self._cache = cache
        self._order = order
        self._keys = PrefixKeys(config.tokens_per_page) if config.prefix_cache else None
        self._across_tenants = config.prefix_cache_across_tenants
        self._coming = ComingPages()
        self.num_queried_tokens = 0
        self.num_found_tokens = 0

    @property
    def num_idle(self) -> int:
        """Pages that nobody uses and the prefix cache keeps until they are evicted."""
        return self._cache.num_idle

    def awaits(self, sequence: Sequence) -> bool:
        """Whether most of what a waiting sequence would compute is about to come from one that runs."""
        if not self._coming:
            return False
        found, keys = self._find(sequence)
        num_coming = self._coming.count(keys[len(found) :])
        num_tokens = len(sequence.token_ids) - len(found) * self._tokens_per_page
        return 2 * num_coming * self._tokens_per_page >= num_tokens

    def admit(self, sequence: Sequence, num_claimed: int) -> bool:
        """Gives a waiting sequence the pages to run with, if `num_claimed` more can be had."""
        found, keys = self._find(sequence)
        num_new = sequence.num_pages(self._tokens_per_page) - len(found)
        # First of all: what it uses itself is not to be evicted for the rest.
        self._cache.acquire(found)
        pages = self._order.allocate_kv(num_new, num_claimed + num_new, sequence.turn)
        if pages is None:
            self._cache.release(found)
            return False
        self._coming.begin(sequence, keys[len(found) :])
        if self._keys is not None and not sequence.has_run:
            self.num_queried_tokens += len(sequence.request.prompt_ids)
            self.num_found_tokens += len(found) * self._tokens_per_page
        sequence.hold([*found, *pages], len(found), len(found) * self._tokens_per_page)
        return True

    def extend(self, sequence: Sequence) -> bool:
        """Sees to a page for the sequence's next token; False if none is free."""
        if sequence.num_computed < len(sequence.block_table) * self._tokens_per_page:
            return True
        pages = self._allocator.allocate(1, PageOwner.KV)
        if pages is None:
            return False
        sequence.block_table += pages
        return True

    def computed(self, sequence: Sequence, start: int, end: int) -> None:
        """KV of a running sequence's tokens `start` to `end` is in its pages, for certain: full pages are shared."""
        num_full = end // self._tokens_per_page
        first = start // self._tokens_per_page
        if self._keys is None or first == num_full or first != sequence.num_shared_pages:
            return
        keys = self._keys_of(sequence, num_full, self._keys)
        for place in range(first, num_full):
            self._coming.came(sequence, keys[place])
            if not self._cache.enter(sequence.block_table[place], keys[place]):
                self._coming.end(sequence)  # nobody is to wait for what it will not share
                return
            sequence.num_shared_pages += 1

    def distrust(self, sequence: Sequence) -> None:
        """What a running sequence computed gave nothing of sense: nobody is to find it any more."""
        self._cache.forget(sequence.block_table[: sequence.num_shared_pages])

    def release(self, sequence: Sequence) -> None:
        """Takes back what a sequence holds that no step in flight names."""
        self._coming.end(sequence)
        shared, own = sequence.leave()
        self._cache.release(shared)
        self._allocator.free(own)

    def check_integrity(self, holding: Iterable[Sequence]) -> None:
        """Raises PageIntegrityError unless KV pages are those that the sequences `holding` some and the cache have."""
        users: Counter[int] = Counter()
        own: list[int] = []
        for sequence in holding:
            users.update(sequence.block_table[: sequence.num_shared_pages])
            own += sequence.block_table[sequence.num_shared_pages :]
        self._cache.check_integrity(users)
        num_shared = len(users) + self._cache.num_idle
        if len(set(own)) != len(own) or len(own) + num_shared != self._allocator.num_kv:
            held = f"sequences hold {len(own)} pages of their own and share {len(users)}"
            raise PageIntegrityError(f"{held}, {self._cache.num_idle} are idle; {self._allocator.num_kv} hold KV")
        if any(self._allocator.owner(page) is not PageOwner.KV or page in users for page in own):
            raise PageIntegrityError("a sequence's own page is shared or not for KV")

    def _find(self, sequence: Sequence) -> tuple[list[int], list[bytes]]:
        """The pages that hold its first tokens, and the keys of all that could; its last token is in none of them."""
        if self._keys is None:
            return [], []
        num_full = (len(sequence.token_ids) - 1) // self._tokens_per_page
        keys = self._keys_of(sequence, num_full, self._keys)[:num_full]
        return self._cache.find(keys), keys

    def _keys_of(self, sequence: Sequence, num_pages: int, keys: PrefixKeys) -> list[bytes]:
        """At least `num_pages` keys."""
        scope = "" if self._across_tenants else sequence.request.tenant
        keys.extend(sequence.page_keys, num_pages, sequence.token_ids, sequence.digest, scope)
        return sequence.page_keys
