"""The catalogue, and the loop that feeds it."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import AsyncGenerator, AsyncIterator, Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common.errors import Reason, SloraError
from services.gateway.adapter_source import CatalogueFeed
from services.gateway.catalogue import (
    AdapterEntry,
    Catalogue,
    CatalogueChange,
    CatalogueEvent,
    split_adapter_id,
)


def entry(name: str, version: int = 1) -> AdapterEntry:
    return AdapterEntry(name, version, f"digest-{name}-{version}", 8, "base")


def registered(name: str, version: int = 1, token: str = "t") -> CatalogueEvent:
    return CatalogueEvent(CatalogueChange.REGISTERED, entry(name, version), token)


def deleted(name: str, version: int = 1, token: str = "t") -> CatalogueEvent:
    return CatalogueEvent(CatalogueChange.DELETED, entry(name, version), token)


SYNCED = CatalogueEvent(CatalogueChange.SYNCED, None, "t")
RESET = CatalogueEvent(CatalogueChange.RESET, None, "t")


def catalogue_of(*events: CatalogueEvent) -> Catalogue:
    catalogue = Catalogue()
    catalogue.begin_sync()
    for event in events:
        catalogue.apply(event)
    return catalogue


def contents(catalogue: Catalogue) -> list[str]:
    return [adapter.adapter_id for adapter in catalogue.newest_after("")]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name", ("name", None)),
        ("name@3", ("name", 3)),
        ("name@12", ("name", 12)),
        ("name@0", ("name@0", None)),
        ("name@03", ("name@03", None)),
        ("name@", ("name@", None)),
        ("name@x", ("name@x", None)),
        ("name@-1", ("name@-1", None)),
        ("name@²", ("name@²", None)),
        ("@3", ("@3", None)),
        ("a@b@3", ("a@b", 3)),
        ("name@" + "1" * 9, ("name", 111_111_111)),
        # No version has so many digits, and int() takes no more than some thousands.
        ("name@" + "1" * 10, ("name@" + "1" * 10, None)),
        ("name@" + "1" * 5000, ("name@" + "1" * 5000, None)),
        ("", ("", None)),
    ],
)
def test_split_adapter_id(text: str, expected: tuple[str, int | None]) -> None:
    assert split_adapter_id(text) == expected


def test_find_newest_and_pinned() -> None:
    catalogue = catalogue_of(registered("a", 1), registered("a", 10), registered("a", 9), registered("b", 2), SYNCED)
    assert catalogue.find("a") == entry("a", 10)
    assert catalogue.find("a@9") == entry("a", 9)
    assert catalogue.find("a@2") is None
    assert catalogue.find("b@2") == entry("b", 2)
    assert catalogue.find("c") is None
    assert len(catalogue) == 2


def test_deleting_the_newest_version_uncovers_the_one_before() -> None:
    catalogue = catalogue_of(registered("a", 1), registered("a", 2), SYNCED, deleted("a", 2))
    assert catalogue.find("a") == entry("a", 1)
    catalogue.apply(deleted("a", 1))
    catalogue.apply(deleted("a", 1))
    assert catalogue.find("a") is None
    assert contents(catalogue) == []


def aliased(name: str, version: int, *aliases: str) -> CatalogueEvent:
    return CatalogueEvent(CatalogueChange.REGISTERED, dataclasses.replace(entry(name, version), aliases=aliases), "t")


def test_an_alias_moves_in_one_event_and_goes_with_its_version() -> None:
    catalogue = catalogue_of(aliased("a", 1, "prod", "old"), aliased("a", 2), aliased("b", 1, "prod"), SYNCED)
    found = catalogue.find("a@prod")
    assert found is not None
    assert found.version == 1
    catalogue.apply(aliased("a", 2, "prod"))
    assert catalogue.versions_of("a") == ([1, 2], {"old": 1, "prod": 2})
    catalogue.apply(aliased("a", 2))
    assert catalogue.find("a@prod") is None
    catalogue.apply(deleted("a", 1))
    assert catalogue.find("a@old") is None
    for event in (RESET, aliased("b", 2, "prod"), SYNCED):
        catalogue.apply(event)
    assert catalogue.versions_of("a") == ([], {})
    assert catalogue.versions_of("b") == ([2], {"prod": 2})


def test_complete_only_after_the_first_sync() -> None:
    assert not catalogue_of(registered("a")).is_complete
    assert catalogue_of(registered("a"), SYNCED, RESET).is_complete


def test_after_a_reset_nothing_is_missing_meanwhile_and_the_vanished_go_at_the_end() -> None:
    catalogue = catalogue_of(registered("a"), registered("b"), registered("c"), SYNCED)
    catalogue.apply(RESET)
    catalogue.apply(registered("b"))
    catalogue.apply(registered("d"))
    assert contents(catalogue) == ["a@1", "b@1", "c@1", "d@1"]
    catalogue.apply(deleted("b"))
    assert contents(catalogue) == ["a@1", "c@1", "d@1"]
    catalogue.apply(SYNCED)
    assert contents(catalogue) == ["d@1"]


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 3), st.booleans()), max_size=40), st.integers(0, 40))
def test_equals_a_plain_dictionary_wherever_a_reset_falls(changes: list[tuple[str, int, bool]], reset_at: int) -> None:
    truth: dict[tuple[str, int], AdapterEntry] = {}
    catalogue = catalogue_of(SYNCED)
    for number, (name, version, is_there) in enumerate(changes):
        if is_there:
            truth[name, version] = entry(name, version)
        else:
            truth.pop((name, version), None)
        if number == reset_at:
            # The change itself was missed; the store sends everything again.
            for event in (RESET, *(registered(*key) for key in truth), SYNCED):
                catalogue.apply(event)
        else:
            catalogue.apply(registered(name, version) if is_there else deleted(name, version))
    newest = {name: max(v for n, v in truth if n == name) for name, _ in truth}
    assert contents(catalogue) == [f"{name}@{newest[name]}" for name in sorted(newest)]
    for name in "abcd":
        assert catalogue.find(name) == (entry(name, newest[name]) if name in newest else None)
        for version in (1, 2, 3):
            assert catalogue.find(f"{name}@{version}") == truth.get((name, version))


class ScriptedSource:
    """Gives one list of events a watch, then breaks it, or stays quiet after the last."""

    def __init__(self, *watches: list[CatalogueEvent | Exception]) -> None:
        self._watches = list(watches)
        self.tokens: list[str] = []
        self.drained = asyncio.Event()
        self.is_up = True
        self.num_looks = 0

    async def is_reachable(self) -> bool:
        self.num_looks += 1
        return self.is_up

    async def find(self, adapter_id: str, timeout: float | None) -> AdapterEntry | None:
        raise AssertionError("not asked")

    async def watch(self, resume_token: str) -> AsyncGenerator[CatalogueEvent, None]:
        self.tokens.append(resume_token)
        for event in self._watches.pop(0):
            if isinstance(event, Exception):
                raise event
            yield event
        if self._watches:
            raise SloraError(Reason.ADAPTER_STORE_UNAVAILABLE, "gone")
        self.drained.set()
        await asyncio.Event().wait()


async def feed(*watches: list[CatalogueEvent | Exception]) -> tuple[Catalogue, list[str]]:
    catalogue, source = Catalogue(), ScriptedSource(*watches)
    task = asyncio.create_task(CatalogueFeed(catalogue, source).run())
    await asyncio.wait_for(source.drained.wait(), 30)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return catalogue, source.tokens


async def test_feed_resumes_after_what_was_seen() -> None:
    first: list[CatalogueEvent | Exception] = [registered("a", token="1"), SYNCED, registered("b", token="2")]
    catalogue, tokens = await feed(first, [deleted("a", token="3")])
    assert tokens == ["", "2"]
    assert contents(catalogue) == ["b@1"]


async def test_feed_begins_anew_when_broken_before_everything_was_sent() -> None:
    first: list[CatalogueEvent | Exception] = [registered("a", token="1"), registered("gone", token="1")]
    catalogue, tokens = await feed(first, [registered("a"), registered("b"), SYNCED])
    assert tokens == ["", ""]
    assert contents(catalogue) == ["a@1", "b@1"]
    assert catalogue.is_complete


async def test_feed_begins_anew_when_its_token_is_refused() -> None:
    refused = SloraError(Reason.RESUME_TOKEN_INVALID, "unknown token")
    catalogue, tokens = await feed([registered("a"), SYNCED], [refused], [registered("b"), SYNCED])
    assert tokens == ["", "t", ""]
    assert contents(catalogue) == ["b@1"]


async def test_feed_survives_an_event_it_does_not_understand(caplog: pytest.LogCaptureFixture) -> None:
    catalogue, tokens = await feed([registered("a"), SYNCED, ValueError("odd")], [registered("b"), SYNCED])
    assert tokens == ["", ""]
    assert contents(catalogue) == ["b@1"]
    assert "odd" in caplog.text


def test_thousands_of_names_stay_sorted() -> None:
    seed = random.randrange(2**31)
    print("seed", seed)
    names = [f"n{i}" for i in range(5000)]
    random.Random(seed).shuffle(names)
    catalogue = catalogue_of(*(registered(name) for name in names), SYNCED)
    for name in names[:2500]:
        catalogue.apply(deleted(name))
    assert [a.name for a in catalogue.newest_after("")] == sorted(names[2500:])
    assert [a.name for a in catalogue.newest_after("n3")] == sorted(name for name in names[2500:] if name > "n3")


class BreakingSource(ScriptedSource):
    """Each watch breaks, or opens, when the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.breaks: asyncio.Queue[None] = asyncio.Queue()
        self.may_open = asyncio.Event()
        self.may_open.set()
        self.num_opened = 0

    async def watch(self, resume_token: str) -> AsyncGenerator[CatalogueEvent, None]:
        await self.may_open.wait()
        self.num_opened += 1
        yield SYNCED
        await self.breaks.get()
        raise SloraError(Reason.ADAPTER_STORE_UNAVAILABLE, "gone")


@pytest.fixture
async def breaking() -> AsyncIterator[tuple[BreakingSource, list[str]]]:
    """A source that is followed, and what was told of losses."""
    source, lost = BreakingSource(), list[str]()
    running = asyncio.create_task(CatalogueFeed(Catalogue(), source, lambda: lost.append("lost")).run())
    await until(lambda: source.num_opened == 1)
    yield source, lost
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(6000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("not within 30 s")


async def test_a_watch_that_breaks_is_no_loss_while_another_replica_answers(
    breaking: tuple[BreakingSource, list[str]],
) -> None:
    source, lost = breaking
    for number in (1, 2):
        source.breaks.put_nowait(None)
        await until(lambda number=number: source.num_opened == number + 1)  # type: ignore[misc]
    await until(lambda: source.num_looks >= 1)
    assert not lost


async def test_with_no_replica_left_the_store_is_lost_once_until_it_is_followed_again(
    breaking: tuple[BreakingSource, list[str]],
) -> None:
    source, lost = breaking
    for number in (1, 2):
        source.may_open.clear()
        source.is_up = False
        source.breaks.put_nowait(None)
        await until(lambda number=number: len(lost) == number)  # type: ignore[misc]
        await asyncio.sleep(0.3)
        assert len(lost) == number
        source.is_up = True
        source.may_open.set()
        await until(lambda number=number: source.num_opened == number + 1)  # type: ignore[misc]


async def test_a_store_that_goes_only_after_its_watch_broke_is_noticed(
    breaking: tuple[BreakingSource, list[str]],
) -> None:
    source, lost = breaking
    source.may_open.clear()
    source.breaks.put_nowait(None)
    await until(lambda: source.num_looks == 1)
    assert not lost
    source.is_up = False
    await until(lambda: lost == ["lost"])
