"""What an engine remembers of where adapters lay, over real arenas whose words the test writes."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from services.adapter_store.arena import Arena
from services.adapter_store.residency_words import ResidencyWord
from services.engine.adapters.known_extents import KnownExtent, KnownExtents
from services.engine.adapters.layout import AdapterLayout, ModulePlacement, PackedShard, TargetModule
from services.engine.adapters.mapped_arena import ArenaPlace, ArenaReader, ExtentPlace, MappedArena
from services.engine.adapters.source import AdapterManifest
from tests.fakes.fake_device import FakeDevice
from tests.fakes.fake_model import digest_of

PAGE = 4096
NUM_PAGES = 8


@pytest.fixture
def arena(tmp_path: Path) -> Iterator[Arena]:
    arena = Arena(NUM_PAGES * PAGE, str(tmp_path))
    yield arena
    arena.close()


@pytest.fixture
def arenas(arena: Arena) -> Iterator[ArenaReader]:
    arenas = ArenaReader(FakeDevice(1))
    assert arenas.map(ArenaPlace(arena.arena_id, str(arena.path), NUM_PAGES * PAGE)) is not None
    yield arenas
    arenas.close()


def enter(arena: Arena, shard: PackedShard, page: int) -> KnownExtent:
    """An adapter comes to a page."""
    word = arena.residency_words.take()
    manifest = AdapterManifest(AdapterLayout(shard.digest, "float32", 128, 1, 0, ((),)), PAGE, "blake3:")
    place = ExtentPlace(page * PAGE, PAGE, word.residency_id, word.number)
    return KnownExtent(manifest, "store-0", arena.arena_id, place)


def test_what_is_known_is_found_exactly_while_it_is_there(arena: Arena, arenas: ArenaReader) -> None:
    """Whatever else comes and goes at its place, in its word, and under its name."""
    known, draw = KnownExtents(arenas), random.Random()
    shards = [PackedShard(digest_of(name), rank, 2) for name in "abc" for rank in range(2)]
    resident: dict[PackedShard, int] = {}
    extents: dict[PackedShard, tuple[KnownExtent, int]] = {}
    num_found = 0
    for number in range(1, 1000):
        shard = draw.choice(shards)
        if shard in resident and draw.random() < 0.5:
            place, page = extents[shard][0].place, resident.pop(shard)
            arena.residency_words.give_back(ResidencyWord(place.residency_word, place.residency_id))
            arena.view(page * PAGE, PAGE)[:] = 0
        elif shard not in resident and draw.random() < 0.5:
            resident[shard] = page = draw.choice([page for page in range(NUM_PAGES) if page not in resident.values()])
            arena.view(page * PAGE, PAGE)[:] = number % 256
            extents[shard] = enter(arena, shard, page), number
            if draw.random() < 0.7:
                known.keep(shard, extents[shard][0])
        found = known.revisit(shard)
        if found is not None:
            num_found += 1
            assert shard in resident
            extent, number_then = extents[shard]
            assert found[0] is extent
            assert bytes(found[1].content) == bytes([number_then % 256]) * PAGE
            assert found[1].lasts()
        else:
            known_now = shard in resident and known._known.get(shard) is extents[shard][0]
            assert not known_now, "it is there, and that was known"
    assert num_found
    assert sum(known.take_copies()[arena.arena_id].values()) == num_found
    assert not known.take_copies()


def test_what_was_not_looked_for_the_longest_is_forgotten(arena: Arena, arenas: ArenaReader) -> None:
    known = KnownExtents(arenas, max_known=2)
    a, b, c = (PackedShard(digest_of(name)) for name in "abc")
    known.keep(a, enter(arena, a, 0))
    known.keep(b, enter(arena, b, 1))
    assert known.revisit(a)
    known.keep(c, enter(arena, c, 2))
    assert [known.revisit(shard) is not None for shard in (a, b, c)] == [True, False, True]


def test_adapters_whose_layers_differ_take_more_of_the_room(arena: Arena, arenas: ArenaReader) -> None:
    known = KnownExtents(arenas, max_layers=8)
    a, b, c = (PackedShard(digest_of(name)) for name in "abc")
    place = ModulePlacement(TargetModule.Q, 8, 64, 64, 0, 512)
    for shard, layers in ((a, ((),) * 100), (b, tuple((replace(place, rank=rank),) for rank in range(1, 6)))):
        extent = enter(arena, shard, 0)
        layout = replace(extent.manifest.layout, layers=layers)
        for _ in range(3):  # again at the same place takes no more
            known.keep(shard, replace(extent, manifest=replace(extent.manifest, layout=layout)))
    assert known.revisit(a)
    assert known.revisit(b)
    known.keep(c, KnownExtent(known._known[b].manifest, "store-0", arena.arena_id, enter(arena, c, 1).place))
    assert [known.revisit(shard) is not None for shard in (a, b, c)] == [False, False, True]
    arena.residency_words.close()
    assert known.revisit(c) is None
    assert known._num_layers == 0


def test_nothing_is_found_in_an_arena_that_was_let_go(arena: Arena, arenas: ArenaReader) -> None:
    known, shard = KnownExtents(arenas), PackedShard(digest_of("a"))
    known.keep(shard, enter(arena, shard, 0))
    arenas.close()
    assert known.revisit(shard) is None
    assert not known._known, "it was forgotten"


def test_memory_that_was_given_back_is_not_touched(
    arena: Arena, arenas: ArenaReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even a look at a word would allocate some of it anew, or end this process where the next store has it all."""
    monkeypatch.setattr(MappedArena, "is_abandoned", False)  # nobody has looked yet
    assert arenas.mapped(arena.arena_id) is not None
    arena.close()
    assert arenas.mapped(arena.arena_id) is None


def test_many_threads_copy_and_none_of_it_is_lost(arena: Arena, arenas: ArenaReader) -> None:
    known, shard = KnownExtents(arenas), PackedShard(digest_of("a"))
    known.keep(shard, enter(arena, shard, 0))
    told: list[int] = []

    def copy() -> None:
        for _ in range(500):
            assert known.revisit(shard)
            told.extend(counts[shard] for counts in known.take_copies().values())

    threads = [threading.Thread(target=copy) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(told) == 4000
