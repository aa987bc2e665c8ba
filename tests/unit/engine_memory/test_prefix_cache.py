"""Shared pages: found by key, counted, evicted children first; keys that nothing but equal beginnings share."""

from __future__ import annotations

import itertools

import pytest

from services.engine.memory.page_allocator import PageAllocator, PageIntegrityError, PageOwner
from services.engine.memory.prefix_cache import PrefixCache
from services.engine.memory.prefix_keys import PrefixKeys

SIZE = 4
TOKENS = list(range(100, 112))


def keys_of(
    tokens: list[int] = TOKENS, digest: str | None = None, scope: str = "", secret: bytes = b"s", num_pages: int = 3
) -> list[bytes]:
    keys: list[bytes] = []
    PrefixKeys(SIZE, secret).extend(keys, num_pages, tokens, digest, scope)
    return keys


def test_a_key_is_of_all_tokens_up_to_its_pages_end() -> None:
    keys = keys_of()
    assert keys_of([*TOKENS[:8], 1, 2, 3, 4])[:2] == keys[:2]
    for place in range(12):
        changed = keys_of([*TOKENS[:place], 7, *TOKENS[place + 1 :]])
        assert changed[: place // SIZE] == keys[: place // SIZE]
        assert all(a != b for a, b in zip(changed[place // SIZE :], keys[place // SIZE :], strict=True))


def test_nothing_is_shared_between_adapters_scopes_and_processes() -> None:
    others = [
        keys_of(),
        keys_of(digest="sha256:aa"),
        keys_of(digest="sha256:ab"),
        keys_of(scope="sha256:aa"),
        keys_of(digest="", scope=""),
        keys_of(digest="None", scope=""),
        keys_of(digest="a", scope="b"),
        keys_of(digest="a'", scope="b"),
        keys_of(digest="ab", scope=""),
        keys_of(secret=b"t"),
    ]
    for mine, theirs in itertools.combinations(others, 2):
        assert not set(mine) & set(theirs)
    drawn = [PrefixKeys(SIZE) for _ in range(2)]
    made: list[list[bytes]] = [[], []]
    for keys, into in zip(drawn, made, strict=True):
        keys.extend(into, 3, TOKENS, None, "")
    assert made[0] != made[1], "each process has a secret of its own"


def test_keys_are_continued_and_only_of_full_pages() -> None:
    keys = keys_of(num_pages=1)
    PrefixKeys(SIZE, b"s").extend(keys, 3, TOKENS, None, "")
    assert keys == keys_of()
    with pytest.raises(ValueError, match="not full"):
        PrefixKeys(SIZE, b"s").extend(keys, 4, [*TOKENS, 1, 2, 3], None, "")


class Shared:
    """A cache with the pages of one sequence in it, at moments 1, 2, 3, ..."""

    def __init__(self, num_pages: int = 8) -> None:
        self.allocator = PageAllocator(num_pages)
        ticks = itertools.count(1)
        self.cache = PrefixCache(self.allocator, lambda: float(next(ticks)))

    def enter(self, *keys: bytes) -> list[int]:
        pages = self.allocator.allocate(len(keys), PageOwner.KV)
        assert pages is not None
        for page, key in zip(pages, keys, strict=True):
            assert self.cache.enter(page, key)
        return pages


def test_the_longest_known_beginning_is_found() -> None:
    s = Shared()
    a, b, c = s.enter(b"a", b"b", b"c")
    assert s.cache.find([b"a", b"b", b"x", b"c"]) == [a, b]
    assert s.cache.find([b"x", b"a"]) == s.cache.find([]) == []
    assert s.cache.find([b"a", b"b", b"c"]) == [a, b, c]
    s.cache.check_integrity({a: 1, b: 1, c: 1})


def test_a_page_is_idle_when_its_last_user_goes_and_is_evicted_after_those_that_follow_it() -> None:
    s = Shared()
    pages = s.enter(b"a", b"b", b"c")
    s.cache.acquire(pages[:2])
    s.cache.release(pages)
    assert (s.cache.num_idle, s.cache.idle_since()) == (1, 1.0)
    s.cache.release(pages[:2])
    s.cache.check_integrity({})
    assert s.cache.num_idle == 3
    s.cache.evict(1)
    assert s.cache.find([b"a", b"b", b"c"]) == pages[:2], "the child went first"
    assert s.cache.idle_since() == 2.0
    s.cache.evict(1)
    assert s.cache.find([b"a", b"b"]) == pages[:1]
    s.cache.evict(5)
    assert (s.cache.num_idle, s.cache.idle_since(), s.allocator.num_free) == (0, None, 8)


def test_what_is_used_is_not_evicted_and_what_was_used_last_goes_last() -> None:
    s = Shared()
    (a,), (b,), (c,) = s.enter(b"a"), s.enter(b"b"), s.enter(b"c")
    s.cache.release([a])
    s.cache.release([b])
    s.cache.acquire([a])
    s.cache.evict(9)
    assert s.cache.find([b"b"]) == []
    assert (s.cache.find([b"a"]), s.cache.find([b"c"])) == ([a], [c])
    s.cache.check_integrity({a: 1, c: 1})


def test_of_two_equal_pages_the_first_is_kept() -> None:
    s = Shared()
    (page,) = s.enter(b"a")
    other = s.allocator.allocate(1, PageOwner.KV)
    assert other is not None
    assert not s.cache.enter(other[0], b"a")
    assert s.cache.find([b"a"]) == [page]
    s.cache.check_integrity({page: 1})


def test_what_is_forgotten_is_found_by_nobody_and_freed_with_its_last_user() -> None:
    s = Shared()
    (page,) = s.enter(b"a")
    s.cache.acquire([page])
    s.cache.forget([page])
    s.cache.forget([page])
    assert s.cache.find([b"a"]) == []
    (again,) = s.enter(b"a")
    s.cache.release([page])
    assert s.allocator.num_free == 6
    s.cache.release([page])
    assert (s.allocator.num_free, s.cache.num_idle, s.cache.find([b"a"])) == (7, 0, [again])


def test_misuse_is_noticed() -> None:
    s = Shared()
    (page,) = s.enter(b"a")
    with pytest.raises(PageIntegrityError, match="shared already"):
        s.cache.enter(page, b"b")
    with pytest.raises(PageIntegrityError, match="does not hold KV"):
        s.cache.enter(7, b"b")
    s.cache.release([page])
    with pytest.raises(PageIntegrityError, match="more often"):
        s.cache.release([page])
    with pytest.raises(PageIntegrityError, match="sequences use"):
        s.cache.check_integrity({page: 1})
    s.allocator.free([page])
    with pytest.raises(PageIntegrityError, match="does not hold KV"):
        s.cache.check_integrity({})
