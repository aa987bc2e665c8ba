"""What a model's name means, and the list of models."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncGenerator, Sequence
from types import SimpleNamespace

import pytest

from services.common.errors import Reason, SloraError
from services.gateway.catalogue import AdapterEntry, Catalogue, CatalogueChange, CatalogueEvent
from services.gateway.codec import from_page_token, to_model, to_page_size, to_page_token
from services.gateway.config import RoutingPolicy
from services.gateway.engine_pool import EnginePool
from services.gateway.engine_state import EngineLoad, EngineProfile, StateUpdate
from services.gateway.models import ListPosition, Models
from services.gateway.routing_rules import make_router
from services.tenancy.tenants import ANONYMOUS, Tenant


def entry(name: str, version: int = 1, base_model: str = "base") -> AdapterEntry:
    return AdapterEntry(name, version, f"digest-{name}-{version}", 8, base_model, (1_700_000_000, 5))


class Source:
    """A store that knows some adapters, or is away."""

    def __init__(self, *adapters: AdapterEntry, error: SloraError | None = None) -> None:
        self._adapters = {adapter.name: adapter for adapter in adapters}
        self._error = error
        self.timeouts: list[float | None] = []

    async def find(self, adapter_id: str, timeout: float | None) -> AdapterEntry | None:
        self.timeouts.append(timeout)
        if self._error is not None:
            raise self._error
        return self._adapters.get(adapter_id)

    async def watch(self, resume_token: str) -> AsyncGenerator[CatalogueEvent, None]:
        raise AssertionError("not watched")
        yield

    async def is_reachable(self) -> bool:
        raise AssertionError("not watched")


def pool_of(*base_models: str | None, resident: Sequence[str] = ()) -> EnginePool:
    """Engines with these base models; None is an engine that was never heard of."""
    pool = EnginePool(
        [f"engine-{i}" for i in range(len(base_models))], lambda address: None, make_router(RoutingPolicy()), 3.0
    )  # type: ignore[arg-type, return-value]
    for state, base_model in zip(pool.states, base_models, strict=True):
        if base_model is not None:
            profile = EngineProfile(state.address, base_model, 64, 100)
            state.report(StateUpdate(EngineLoad(), profile, loaded=resident), 0.0)
    return pool


def catalogue_of(*adapters: AdapterEntry, complete: bool = True) -> Catalogue:
    catalogue = Catalogue()
    for adapter in adapters:
        catalogue.apply(CatalogueEvent(CatalogueChange.REGISTERED, adapter, ""))
    if complete:
        catalogue.apply(CatalogueEvent(CatalogueChange.SYNCED, None, ""))
    return catalogue


def models(pool: EnginePool, catalogue: Catalogue, source: Source | None = None) -> Models:
    return Models(pool, catalogue, source or Source(), 5.0)


def no_deadline() -> None:
    return None


async def refusal(of: Models, model: str) -> SloraError:
    with pytest.raises(SloraError) as caught:
        await of.resolve(model, no_deadline)
    return caught.value


async def test_names() -> None:
    known = models(pool_of("org/base", None), catalogue_of(entry("a", 1, "org/base"), entry("a", 2, "org/base")))
    base = await known.resolve("org/base", no_deadline)
    assert (base.public_id, base.adapter) == ("org/base", None)
    assert (await known.resolve("a", no_deadline)).public_id == "a@2"
    pinned = await known.resolve("a@1", no_deadline)
    assert (pinned.public_id, pinned.name, pinned.base_model) == ("a@1", "a", "org/base")


async def test_a_miss_asks_the_store_within_the_deadline() -> None:
    source = Source(entry("new"))
    known = models(pool_of("base"), catalogue_of(entry("a")), source)
    assert (await known.resolve("new", no_deadline)).public_id == "new@1"
    assert (await known.resolve("new", lambda: 1.5)).public_id == "new@1"
    await known.resolve("a", no_deadline)
    assert source.timeouts == [5.0, 1.5]


async def test_refusals() -> None:
    known = models(pool_of("base"), catalogue_of(entry("a"), entry("b")))
    assert (await refusal(known, "")).reason is Reason.REQUEST_INVALID
    unknown = await refusal(known, "nobody")
    assert unknown.reason is Reason.MODEL_NOT_FOUND
    assert unknown.metadata == {"model": "nobody"}
    for word in ("'nobody'", "'base'", "2 adapters", "ListModels", "`slora models`", "GET /v1/models"):
        assert word in unknown.message
    assert len((await refusal(known, "n" * 10_000)).message) < 500


@pytest.mark.parametrize("tenant", [ANONYMOUS, Tenant("team", adapters=("*a*a*a*b",))], ids=["anonymous", "team"])
async def test_what_is_longer_than_any_adapters_name_is_looked_up_nowhere(tenant: Tenant) -> None:
    source = Source()
    long_base = "b" * 300
    known = models(pool_of(long_base), catalogue_of(), source)
    for model in ("a" * 193, "a" * 190 + "@10", "aé" * 7_000_000):
        with pytest.raises(SloraError) as refused:
            await known.resolve(model, no_deadline, tenant)
        assert refused.value.reason is Reason.MODEL_NOT_FOUND
        assert len(refused.value.message) < 1000
    assert (await known.resolve(long_base, no_deadline, tenant)).public_id == long_base
    assert not source.timeouts, "the store was not asked"
    with pytest.raises(SloraError) as refused:
        await models(pool_of(None), catalogue_of(), source).resolve(long_base, no_deadline, tenant)
    assert refused.value.reason is Reason.ENGINE_UNAVAILABLE, "it may be the name of a base model"


@pytest.mark.parametrize("model", ["n" * 128 + "@" + "a" * 63, "n" * 128])
async def test_the_longest_names_are_looked_up(model: str) -> None:
    source = Source()
    assert (await refusal(models(pool_of("base"), catalogue_of(), source), model)).reason is Reason.MODEL_NOT_FOUND
    assert source.timeouts == [5.0]


async def test_with_the_store_away_the_known_work_and_the_unknown_are_not_denied() -> None:
    away = Source(error=SloraError(Reason.ADAPTER_STORE_UNAVAILABLE, "away"))
    known = models(pool_of("base"), catalogue_of(entry("a")), away)
    assert (await known.resolve("a", no_deadline)).public_id == "a@1"
    assert (await known.resolve("base", no_deadline)).public_id == "base"
    assert (await refusal(known, "b")).reason is Reason.ADAPTER_STORE_UNAVAILABLE


@pytest.fixture
def standing_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long this process is held up, no time passes."""
    monkeypatch.setattr("services.gateway.models.time", SimpleNamespace(monotonic=lambda: 1000.0))


@pytest.mark.usefixtures("standing_clock")
async def test_while_the_watch_is_not_open_the_store_is_asked_first() -> None:
    known = catalogue_of(entry("a"), entry("gone"))
    source = Source(entry("a", 2))
    asking = Models(pool_of("base"), known, source, 5.0, is_current=lambda: False)
    assert (await asking.resolve("a", no_deadline)).public_id == "a@2"
    assert (await refusal(asking, "gone")).reason is Reason.MODEL_NOT_FOUND
    assert source.timeouts == [0.25, 0.25], "what is known waits a moment only"
    away = Source(error=SloraError(Reason.ADAPTER_STORE_UNAVAILABLE, "away"))
    asking = Models(pool_of("base"), known, away, 5.0, is_current=lambda: False)
    for _ in range(3):
        assert (await asking.resolve("a", no_deadline)).public_id == "a@1"
    assert len(away.timeouts) == 3


async def test_a_store_that_hangs_costs_a_request_in_a_second_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("services.gateway.models.time", SimpleNamespace(monotonic=lambda: now))

    class Hanging(Source):
        async def find(self, adapter_id: str, timeout: float | None) -> AdapterEntry | None:
            nonlocal now
            self.timeouts.append(timeout)
            now += timeout or 0
            raise SloraError(Reason.ADAPTER_STORE_UNAVAILABLE, "hangs")

    source = Hanging()
    asking = Models(pool_of("base"), catalogue_of(entry("a")), source, 5.0, is_current=lambda: False)
    for _ in range(5):
        assert (await asking.resolve("a", no_deadline)).public_id == "a@1"
        now += 0.15
    assert len(source.timeouts) == 1
    now += 0.3
    await asking.resolve("a", no_deadline)
    assert len(source.timeouts) == 2


async def test_a_version_that_is_not_there_says_which_are() -> None:
    noted: list[str] = []
    catalogue = catalogue_of(entry("a", 1), dataclasses.replace(entry("a", 3), aliases=("prod",)))
    known = Models(pool_of("base"), catalogue, Source(), 5.0, note_use=noted.append)
    assert (await known.resolve("a@prod", no_deadline)).public_id == "a@3"
    assert noted == ["a@3"]
    for model in ("a@2", "a@stage"):
        error = await refusal(known, model)
        assert error.reason is Reason.MODEL_NOT_FOUND
        assert "has the versions 1, 3; its aliases: prod → 3" in error.message


async def test_the_only_version_is_called_so() -> None:
    error = await refusal(models(pool_of("base"), catalogue_of(entry("pirate", 1))), "pirate@3")
    assert error.message == "no model 'pirate@3': 'pirate' has only version 1; its aliases: none"


async def test_before_any_engine_was_heard_of_nothing_is_denied() -> None:
    assert (await refusal(models(pool_of(None), catalogue_of()), "base")).reason is Reason.ENGINE_UNAVAILABLE
    assert (await refusal(models(pool_of(None), catalogue_of(entry("a"))), "a")).reason is Reason.ENGINE_UNAVAILABLE


async def test_an_adapter_of_another_base_model_is_never_served() -> None:
    catalogue = catalogue_of(entry("a", base_model="other"))
    error = await refusal(models(pool_of("base"), catalogue), "a")
    assert error.reason is Reason.ADAPTER_BASE_MISMATCH
    assert "'other'" in error.message
    assert "'base'" in error.message
    maybe = await models(pool_of("base", None), catalogue).resolve("a", no_deadline)
    assert maybe.base_model == "other", "the silent engine may serve it"


async def test_a_lost_engine_keeps_its_base_models_name() -> None:
    pool = pool_of("base")
    pool.states[0].lost()
    assert (await models(pool, catalogue_of()).resolve("base", no_deadline)).public_id == "base"


def test_list_in_pages_that_survive_changes() -> None:
    catalogue = catalogue_of(*(entry(name) for name in ("b", "d", "f", "h")), entry("d", 2))
    listing = models(pool_of("base-2", "base-1", resident=["digest-d-2", "digest-b-1"]), catalogue)
    page, after = listing.page(None, 3)
    assert [(m.model.public_id, m.num_resident_engines) for m in page] == [("base-1", 1), ("base-2", 1), ("b@1", 2)]
    catalogue.apply(CatalogueEvent(CatalogueChange.DELETED, entry("b"), ""))
    catalogue.apply(CatalogueEvent(CatalogueChange.REGISTERED, entry("a"), ""))
    catalogue.apply(CatalogueEvent(CatalogueChange.REGISTERED, entry("e"), ""))
    page, after = listing.page(from_page_token(to_page_token(after)), 3)
    assert [(m.model.public_id, m.num_resident_engines) for m in page] == [("d@2", 2), ("e@1", 0), ("f@1", 0)]
    page, after = listing.page(after, 3)
    assert [m.model.public_id for m in page] == ["h@1"]
    assert after is None


def test_pages_end_exactly() -> None:
    listing = models(pool_of("base"), catalogue_of(entry("a")))
    page, after = listing.page(None, 1)
    assert (len(page), after) == (1, ListPosition(False, "base"))
    page, after = listing.page(after, 1)
    assert ([m.model.public_id for m in page], after) == (["a@1"], None)


def test_no_half_list() -> None:
    with pytest.raises(SloraError) as caught:
        models(pool_of("base"), catalogue_of(entry("a"), complete=False)).page(None, 10)
    assert caught.value.reason is Reason.ADAPTER_STORE_UNAVAILABLE


@pytest.mark.parametrize(
    "position", [None, ListPosition(False, "org/base ü"), ListPosition(True, "a"), ListPosition(True, "")]
)
def test_page_tokens_round_trip(position: ListPosition | None) -> None:
    assert from_page_token(to_page_token(position)) == position


@pytest.mark.parametrize("token", ["x", "????", "Yg", "YzphYmM", "ü", "a" * 10_000, "YTr_"])
def test_page_tokens_that_were_not_given_out(token: str) -> None:
    with pytest.raises(SloraError) as caught:
        from_page_token(token)
    assert caught.value.reason is Reason.PAGE_INVALID


@pytest.mark.parametrize(("asked", "meant"), [(0, 100), (1, 1), (1000, 1000)])
def test_page_sizes(asked: int, meant: int) -> None:
    assert to_page_size(asked) == meant


@pytest.mark.parametrize("asked", [-1, 1001])
def test_bad_page_sizes(asked: int) -> None:
    with pytest.raises(SloraError) as caught:
        to_page_size(asked)
    assert caught.value.reason is Reason.PAGE_INVALID
    assert "1000" in caught.value.message


def test_listed_fields() -> None:
    listing = models(pool_of("base"), catalogue_of(entry("a", 3)))
    base, adapter = (to_model(listed) for listed in listing.page(None, 10)[0])
    assert (base.name, base.adapter_id, base.rank, base.HasField("create_time")) == ("base", "", 0, False)
    assert (adapter.name, adapter.adapter_id, adapter.base_model, adapter.rank) == ("a", "a@3", "base", 8)
    assert (adapter.create_time.seconds, adapter.create_time.nanos) == (1_700_000_000, 5)


async def test_anothers_adapter_does_not_exist_for_a_tenant() -> None:
    team, all_names = Tenant("team", adapters=("*",)), ("own", "shared", "theirs")
    owners = dict(zip(all_names, ("team", "", "other"), strict=True))
    adapters = [dataclasses.replace(entry(name), tenant=owner) for name, owner in owners.items()]
    source = Source(*adapters)
    known = models(pool_of("base"), catalogue_of(*adapters), source)
    for name in ("own", "shared"):
        assert (await known.resolve(name, no_deadline, team)).name == name
    assert source.timeouts == []
    told = []
    for name in ("theirs", "theirs@1", "absent"):
        with pytest.raises(SloraError) as caught:
            await known.resolve(name, no_deadline, team)
        assert caught.value.reason is Reason.MODEL_NOT_FOUND
        told.append(caught.value.message.replace(name, "x"))
    # In the same words and after the same work: the store was asked each time.
    assert len(set(told)) == 1
    assert len(source.timeouts) == 3
    assert [listed.model.name for listed in known.page(None, 10, team)[0]] == ["base", "own", "shared"]
    assert [listed.model.name for listed in known.page(None, 10)[0]] == ["base", *all_names]
