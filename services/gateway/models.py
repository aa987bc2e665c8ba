"""The models a caller can name: what a name means now, and the list of all of them."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from services.common.errors import FieldError, Reason, SloraError
from services.gateway.adapter_source import AdapterSource
from services.gateway.catalogue import AdapterEntry, Catalogue
from services.gateway.engine_pool import EnginePool
from services.tenancy.tenants import ANONYMOUS, Tenant

HOW_TO_LIST = "ListModels (`slora models`, GET /v1/models)"
_NAME_SHOWN = 128
_LONGEST_ID = 192
"""Characters of `name@alias` at most, by the adapter store's rules."""
_MOST_VERSIONS_NAMED = 10

# How long a request for a known name waits for the store while its watch is not open, and for how long none does
# after the store took that long.
_CONFIRM_SECONDS, _CONFIRM_AGAIN_SECONDS = 0.25, 1.0


@dataclass(frozen=True)
class ResolvedModel:
    """What answers a request. Fixed when the request begins: later changes of the catalogue do not touch it."""

    base_model: str
    adapter: AdapterEntry | None

    @property
    def public_id(self) -> str:
        """The base model's name, or the adapter's `name@version`."""
        return self.base_model if self.adapter is None else self.adapter.adapter_id

    @property
    def name(self) -> str:
        """The base model's or the adapter's name, without a version."""
        return self.base_model if self.adapter is None else self.adapter.name


@dataclass(frozen=True)
class ListedModel:
    """A model and how many engines hold it; for the base model, how many serve."""

    model: ResolvedModel
    num_resident_engines: int


@dataclass(frozen=True, order=True)
class ListPosition:
    """A model's place in the list; stays meaningful when that model is gone."""

    is_adapter: bool
    name: str


class Models:
    """Base models as the engines say, adapters as the catalogue says; the store is asked for what neither knows."""

    def __init__(
        self,
        pool: EnginePool,
        catalogue: Catalogue,
        source: AdapterSource,
        store_timeout: float,
        is_current: Callable[[], bool] = lambda: True,
        note_use: Callable[[str], None] = lambda adapter_id: None,
    ) -> None:
        """`is_current`: whether the catalogue is what the store's watch tells now. `note_use` hears each `name@version`
        that a request is resolved to."""
        self._pool = pool
        self._catalogue = catalogue
        self._source = source
        self._store_timeout = store_timeout
        self._is_current = is_current
        self._note_use = note_use
        self._confirm_from = 0.0

    @property
    def is_store_followed(self) -> bool:
        """Whether the store's watch is open; else it is away, or comes back just now."""
        return self._is_current()

    async def resolve(
        self, model: str, time_remaining: Callable[[], float | None], tenant: Tenant = ANONYMOUS
    ) -> ResolvedModel:
        """What `model` means to `tenant`: a base model's name, an adapter's (its newest version), `name@version` or
        `name@alias`.

        A base model's name wins over an adapter of the same name. An adapter that the catalogue does not know is
        asked of the store, so that one registered a moment ago is found. While the store's watch is not open, one that
        is known is asked of it too, so that a store that just came back is believed at once; if it cannot tell soon,
        what is known goes on. An adapter that the tenant may not use is one that does not exist, whatever it is called
        and whether or not the store can be asked.

        Raises MODEL_NOT_FOUND, ADAPTER_BASE_MISMATCH (no engine has its base model), ADAPTER_STORE_UNAVAILABLE or
        another UNAVAILABLE reason (the store cannot tell), ENGINE_UNAVAILABLE (no engine was heard of yet).
        """
        if not model:
            complaint = "is required: a base model's name, an adapter's name or name@version"
            raise FieldError(Reason.REQUEST_INVALID, "model", complaint)
        base_models = self._pool.base_models()
        if model in base_models:
            return ResolvedModel(model, None)
        adapter = None
        # A longer one is neither held against a tenant's patterns nor sent to the store: megabytes would take seconds.
        if len(model) <= _LONGEST_ID:
            adapter = await self._find(model, time_remaining, tenant)
            base_models = self._pool.base_models()
        if not base_models:
            raise SloraError(Reason.ENGINE_UNAVAILABLE, "no engine has been reached yet; retry later")
        if adapter is None:
            raise _not_offered(model) if tenant.name else self._not_found(model, base_models)
        if adapter.base_model not in base_models and self._is_every_engine_known():
            raise SloraError(
                Reason.ADAPTER_BASE_MISMATCH,
                f"adapter {adapter.adapter_id} is for base model {adapter.base_model!r}, "
                f"but the engines serve {_quoted(base_models)}",
                adapter_id=adapter.adapter_id,
                base_model=adapter.base_model,
            )
        self._note_use(adapter.adapter_id)
        return ResolvedModel(adapter.base_model, adapter)

    async def _find(
        self, model: str, time_remaining: Callable[[], float | None], tenant: Tenant
    ) -> AdapterEntry | None:
        """The adapter that `model` means to `tenant`, None if there is none. Raises MODEL_NOT_FOUND for a name that its
        patterns do not cover."""
        if not tenant.may_use(model.partition("@")[0]):
            raise _not_offered(model)
        adapter = _seen(self._catalogue.find(model), tenant)
        if adapter is None or not self._is_current():
            adapter = _seen(await self._ask(model, adapter, time_remaining()), tenant)
        return adapter

    async def _ask(self, model: str, known: AdapterEntry | None, remaining: float | None) -> AdapterEntry | None:
        """What the store says that `model` means; for a known one soon, or what is known."""
        timeout = self._store_timeout if known is None else _CONFIRM_SECONDS
        timeout = timeout if remaining is None else min(timeout, remaining)
        began = time.monotonic()
        if known is not None and began < self._confirm_from:
            return known
        try:
            return await self._source.find(model, timeout)
        except SloraError:
            if known is None:
                raise
            now = time.monotonic()
            if now - began > _CONFIRM_SECONDS / 2:  # it hangs; a refused connection costs nothing
                self._confirm_from = now + _CONFIRM_AGAIN_SECONDS
            return known

    def page(
        self, after: ListPosition | None, page_size: int, tenant: Tenant = ANONYMOUS
    ) -> tuple[list[ListedModel], ListPosition | None]:
        """At most `page_size` models that `tenant` may use after `after`, base models first, then adapters, by name;
        and where the next page begins, None if there is none.

        Raises ADAPTER_STORE_UNAVAILABLE until the catalogue was seen whole: half a list would look like all of it.
        """
        if not self._catalogue.is_complete:
            message = "the adapter store has not told all adapters yet; retry later"
            raise SloraError(Reason.ADAPTER_STORE_UNAVAILABLE, message)
        found = list(itertools.islice(self._after(after, tenant), page_size + 1))
        page = found[:page_size]
        if len(found) == len(page):
            return page, None
        last = page[-1].model
        return page, ListPosition(last.adapter is not None, last.name)

    def _after(self, after: ListPosition | None, tenant: Tenant) -> Iterator[ListedModel]:
        if after is None or not after.is_adapter:
            for name in sorted(self._pool.base_models()):
                if after is None or name > after.name:
                    yield ListedModel(ResolvedModel(name, None), self._pool.num_serving(name))
        for adapter in self._catalogue.newest_after(after.name if after is not None and after.is_adapter else ""):
            if tenant.may_see(adapter.name, adapter.tenant):
                yield ListedModel(ResolvedModel(adapter.base_model, adapter), self._pool.num_resident(adapter.digest))

    def _is_every_engine_known(self) -> bool:
        return all(state.profile is not None for state in self._pool.states)

    def _not_found(self, model: str, base_models: set[str]) -> SloraError:
        shown = _shown(model)
        name = model.rpartition("@")[0]
        versions, aliases = self._catalogue.versions_of(name)
        if versions:
            numbers = ", ".join(map(str, versions[-_MOST_VERSIONS_NAMED:]))
            more = (
                f" (the newest {_MOST_VERSIONS_NAMED} of {len(versions)})"
                if len(versions) > _MOST_VERSIONS_NAMED
                else ""
            )
            means = ", ".join(f"{alias} → {version}" for alias, version in aliases.items()) or "none"
            there_are = f"only version {numbers}" if len(versions) == 1 else f"the versions {numbers}{more}"
            message = f"no model {shown!r}: {name!r} has {there_are}; its aliases: {means}"
            return SloraError(Reason.MODEL_NOT_FOUND, message, model=shown, versions=numbers, aliases=means)
        message = (
            f"no model {shown!r}: there are the base model {_quoted(base_models)} and {len(self._catalogue)} adapters "
            f"(by name, name@version or name@alias); {HOW_TO_LIST} lists them"
        )
        return SloraError(Reason.MODEL_NOT_FOUND, message, model=shown)


def _seen(adapter: AdapterEntry | None, tenant: Tenant) -> AdapterEntry | None:
    """`adapter`, unless it is one that does not exist for `tenant`: another tenant's."""
    return adapter if adapter is not None and tenant.may_see(adapter.name, adapter.tenant) else None


def _not_offered(model: str) -> SloraError:
    """The same whether there is no such adapter or it is another tenant's: names are not told."""
    shown = _shown(model)
    message = f"no model {shown!r} that you may use; {HOW_TO_LIST} lists those that you may"
    return SloraError(Reason.MODEL_NOT_FOUND, message, model=shown)


def _shown(model: str) -> str:
    return model if len(model) <= _NAME_SHOWN else model[:_NAME_SHOWN] + "…"


def _quoted(names: set[str]) -> str:
    return ", ".join(repr(name) for name in sorted(names))
