"""The disk cache: a budget, the order of use, restarts, damage, a full disk. Files are real, the arena is too."""

from __future__ import annotations

import asyncio
import errno
import os
import random
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from services.adapter_store import packed_file
from services.adapter_store.arena import Arena
from services.adapter_store.disk_cache import MAX_WRITING, DiskCache, DiskCacheError, DiskPlace
from services.adapter_store.host_cache import HostCache
from services.adapter_store.manifest import ElementType, ModulePlacement, PackedLayout, PackedManifest, TargetModule
from services.adapter_store.packed_file import encode_header
from services.adapter_store.tier_metrics import TierMetrics
from services.common.packed_digest import packed_digest

PACKING = "3/float32/8/0123"
LAYER_ELEMS = 2048
NUM_BYTES = 2 * LAYER_ELEMS * 4


def digest_of(number: int) -> str:
    return f"sha256:{number:064x}"


def layout() -> PackedLayout:
    first = (
        ModulePlacement(TargetModule.Q, 4, 32, 64, 0, 128),
        ModulePlacement(TargetModule.DOWN, 2, 64, 32, 400, 600),
    )
    return PackedLayout(ElementType.FLOAT32, 8, 2, LAYER_ELEMS, (first, ()))


class Setup:
    """Adapters in an arena, and caches over one directory."""

    def __init__(self, directory: Path, seed: int) -> None:
        self.directory = directory / "cache"
        self.registry = CollectorRegistry()
        self.metrics = TierMetrics(self.registry)
        self.arena = Arena(64 * NUM_BYTES, str(directory))
        self.host = HostCache(self.arena, lambda: None)
        self.threads = ThreadPoolExecutor(4)
        self.random = random.Random(seed)
        self.contents: dict[str, bytes] = {}
        self.opened: list[DiskCache] = []

    def open(self, max_bytes: int = 2**30, packing: str = PACKING) -> DiskCache:
        self.opened.append(DiskCache(DiskPlace(self.directory, max_bytes, packing), self.threads, self.metrics))
        return self.opened[-1]

    async def reopen(self, max_bytes: int = 2**30, packing: str = PACKING) -> DiskCache:
        await self.opened.pop().close()
        return self.open(max_bytes, packing)

    def add(self, cache: DiskCache, number: int) -> str:
        """Puts an adapter into the arena, if it is not there, and begins to keep it."""
        digest = digest_of(number)
        pin = self.host.pin(digest)
        if pin is None:
            self.contents[digest] = content = self.random.randbytes(NUM_BYTES)
            reservation = self.host.reserve(NUM_BYTES, evict=False)
            reservation.view.data[:] = content
            pin = reservation.commit(PackedManifest(digest, packed_digest(content), layout()))
        cache.keep(pin)
        return digest

    async def keep(self, cache: DiskCache, *numbers: int) -> list[str]:
        """Keeps adapters, one after the other."""
        digests = []
        for number in numbers:
            digests.append(self.add(cache, number))
            await cache.settled()
        return digests

    async def read(self, cache: DiskCache, digest: str) -> bytes | None:
        file = await cache.open(digest, packed_digest(self.contents[digest]))
        if file is None:
            return None
        with file:
            assert file.manifest == PackedManifest(digest, packed_digest(self.contents[digest]), layout())
            out = np.empty(NUM_BYTES, np.uint8)
            return out.tobytes() if await cache.read_into(file, out) else None

    def path(self, digest: str) -> Path:
        return self.directory / PACKING.replace("/", "-") / f"{digest.removeprefix('sha256:')}.packed"

    def files(self) -> set[str]:
        return {path.name for path in self.directory.rglob("*") if path.is_file() and path.name != ".lock"}

    def metric(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value("slora_adapter_store_" + name, labels) or 0.0


FILE_BYTES = NUM_BYTES + len(encode_header(PackedManifest(digest_of(0), packed_digest(b""), layout())))


@pytest.fixture
async def setup(tmp_path: Path) -> AsyncIterator[Setup]:
    seed = random.SystemRandom().getrandbits(32)
    print(f"seed {seed}")
    setup = Setup(tmp_path, seed)
    yield setup
    for cache in setup.opened:
        await cache.close()
    setup.threads.shutdown()
    assert setup.host.figures().num_pinned == 0, "the cache holds on to the arena"
    setup.arena.close()


async def test_what_was_kept_comes_back_byte_for_byte_also_after_a_restart(setup: Setup) -> None:
    cache = setup.open()
    one, two = await setup.keep(cache, 1, 2)
    assert await setup.read(cache, one) == setup.contents[one]
    cache = await setup.reopen()
    for digest in (one, two):
        assert await setup.read(cache, digest) == setup.contents[digest]
    setup.contents[digest_of(9)] = b""
    assert await setup.read(cache, digest_of(9)) is None
    assert setup.metric("tier_written_bytes_total", tier="disk") == 2 * FILE_BYTES
    assert setup.metric("tier_read_bytes_total", tier="disk") == 3 * NUM_BYTES
    assert setup.metric("tier_used_bytes", tier="disk") == 2 * FILE_BYTES


async def test_the_least_recently_used_goes_first_also_across_a_restart(setup: Setup) -> None:
    cache = setup.open(3 * FILE_BYTES)
    one, two, three = await setup.keep(cache, 1, 2, 3)
    await setup.read(cache, one)
    (four,) = await setup.keep(cache, 4)
    assert cache.digests == [three, one, four]
    await setup.read(cache, three)
    cache = await setup.reopen(3 * FILE_BYTES)
    assert cache.digests == [one, four, three]
    (five,) = await setup.keep(cache, 5)
    assert setup.files() == {setup.path(digest).name for digest in (four, three, five)}
    assert await setup.read(cache, two) is None
    assert setup.metric("tier_evictions_total", tier="disk") == 2
    cache = await setup.reopen(FILE_BYTES)
    assert cache.digests == [five], "a smaller budget holds from the start"
    assert setup.files() == {setup.path(five).name}


async def test_the_budget_holds_for_many_at_once_and_those_in_excess_are_skipped(setup: Setup) -> None:
    cache = setup.open(2 * FILE_BYTES + 100)
    digests = [setup.add(cache, number) for number in range(MAX_WRITING + 3)]
    assert setup.metric("disk_skips_total", cause="busy") == 3
    assert await cache.settled()
    assert not await cache.settled()
    assert setup.metric("tier_used_bytes", tier="disk") == FILE_BYTES * len(cache.digests) <= 2 * FILE_BYTES
    assert set(cache.digests) < set(digests)
    assert len(setup.files()) == len(cache.digests)
    small = await setup.reopen(FILE_BYTES - 1)
    await setup.keep(small, 20)
    assert setup.metric("disk_skips_total", cause="too_large") == 1
    assert small.digests == []


def cut(content: bytearray) -> None:
    del content[-1:]


def grow(content: bytearray) -> None:
    content += b"x"


def empty(content: bytearray) -> None:
    content.clear()


def flip_last(content: bytearray) -> None:
    content[-1] ^= 1


def flip_header(content: bytearray) -> None:
    content[200] ^= 1


def flip_magic(content: bytearray) -> None:
    content[0] ^= 1


def claim_a_huge_header(content: bytearray) -> None:
    content[:] = b"slora-packed-1 99999999999999 blake3:0\n" + content


DAMAGE = [cut, grow, empty, flip_last, flip_header, flip_magic, claim_a_huge_header]


async def test_a_damaged_file_is_dropped_and_never_given_out(setup: Setup) -> None:
    cache = setup.open()
    for number, damage in enumerate(DAMAGE):
        (digest,) = await setup.keep(cache, number)
        content = bytearray(setup.path(digest).read_bytes())
        damage(content)
        setup.path(digest).write_bytes(content)
        assert await setup.read(cache, digest) is None, damage.__name__
        assert not setup.path(digest).exists()
        await setup.keep(cache, number)
        assert await setup.read(cache, digest) == setup.contents[digest], "it is written again"
    assert setup.metric("disk_drops_total", cause="damaged") == len(DAMAGE)


async def test_a_file_of_another_adapter_is_not_taken_for_this_one(setup: Setup) -> None:
    cache = setup.open()
    one, two = await setup.keep(cache, 1, 2)
    setup.path(one).replace(setup.path(two))
    assert await setup.read(cache, two) is None
    assert await setup.read(cache, one) is None, "its file is gone"
    (three,) = await setup.keep(cache, 3)
    assert await cache.open(three, packed_digest(b"as the catalogue has it")) is None


async def test_what_a_killed_store_left_unfinished_is_removed(setup: Setup) -> None:
    cache = setup.open()
    (one,) = await setup.keep(cache, 1)
    whole = setup.path(one).read_bytes()
    unfinished = setup.path(digest_of(2)).with_name(setup.path(digest_of(2)).name + ".part")
    unfinished.write_bytes(whole[: len(whole) // 2])
    cache = await setup.reopen()
    assert cache.digests == [one]
    assert setup.files() == {setup.path(one).name}


async def test_what_was_packed_otherwise_is_removed(setup: Setup) -> None:
    cache = setup.open()
    await setup.keep(cache, 1, 2)
    cache = await setup.reopen(packing="4/float32/8/0123")
    assert cache.digests == []
    assert setup.files() == set()
    assert setup.metric("disk_drops_total", cause="stale") == 2


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """While its only entry is true the disk has no room."""
    is_full = [False]
    allocate = os.posix_fallocate

    def posix_fallocate(fd: int, offset: int, length: int) -> None:
        if is_full[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        allocate(fd, offset, length)

    monkeypatch.setattr(packed_file.os, "posix_fallocate", posix_fallocate)  # type: ignore[attr-defined]
    return is_full


async def test_a_full_disk_is_skipped_with_one_warning_until_it_has_room(
    setup: Setup, full_disk: list[bool], caplog: pytest.LogCaptureFixture
) -> None:
    cache = setup.open()
    (one,) = await setup.keep(cache, 1)
    full_disk[0] = True
    await setup.keep(cache, 2, 3, 4)
    assert setup.metric("disk_skips_total", cause="full") == 3
    assert [record.getMessage() for record in caplog.records] == ["the disk cache takes nothing now: its disk is full"]
    assert setup.files() == {setup.path(one).name}, "nothing half written stays"
    assert setup.metric("tier_used_bytes", tier="disk") == FILE_BYTES
    assert await setup.read(cache, one) == setup.contents[one]
    full_disk[0] = False
    (five,) = await setup.keep(cache, 5)
    assert cache.digests == [one, five]
    full_disk[0] = True
    await setup.keep(cache, 6)
    assert len(caplog.records) == 2, "it is said again when it happens again"


async def test_a_directory_that_vanishes_costs_nothing_but_its_use(setup: Setup) -> None:
    cache = setup.open()
    (one,) = await setup.keep(cache, 1)
    setup.path(one).unlink()
    setup.path(one).parent.rmdir()
    assert await setup.read(cache, one) is None
    await setup.keep(cache, 2)
    assert setup.metric("disk_skips_total", cause="failed") == 1
    assert setup.metric("tier_used_bytes", tier="disk") == 0


async def test_deleted_adapters_leave_the_disk_also_while_they_are_written(setup: Setup) -> None:
    cache = setup.open()
    (one,) = await setup.keep(cache, 1)
    two = setup.add(cache, 2)
    for digest in (one, two, digest_of(3)):
        cache.discard(digest)
    await cache.settled()
    await asyncio.sleep(0)  # what was asked meanwhile is done behind the write
    assert cache.digests == []
    assert setup.files() == set()
    assert setup.metric("tier_used_bytes", tier="disk") == 0


async def test_one_store_uses_a_directory_at_a_time(setup: Setup, tmp_path: Path) -> None:
    cache = setup.open()
    with pytest.raises(DiskCacheError, match="another store uses it; see the setting disk_cache_dir"):
        setup.open()
    assert setup.directory.stat().st_mode & 0o777 == 0o700
    setup.opened = [cache]
    (tmp_path / "file").touch()
    setup.directory = tmp_path / "file"
    with pytest.raises(DiskCacheError, match="disk_cache_dir"):
        setup.open()
