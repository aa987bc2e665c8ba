"""What a tenant sees of the catalogue, and may change: its own adapters, and nobody's in particular to read.

Names come first: a name that none of the tenant's patterns covers does not exist for it, whoever has it. What is
another tenant's, and what is not there, is refused in the same words after the same work. Services and operators are
not held apart.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence

from services.adapter_store.callers import Caller
from services.adapter_store.catalogue import MAX_PAGE_SIZE, Catalogue, cut_page, member_of, name_taken, page_start
from services.adapter_store.cold_fetch import unknown_digest
from services.adapter_store.identifiers import AdapterId, check_digest, check_name, parse_adapter_id
from services.adapter_store.manifest import AdapterRecord
from services.common.errors import Reason, SloraError

_TELL_OF_PLACES = {Reason.ADAPTER_CHANGED, Reason.BLOB_STORE_UNAVAILABLE, Reason.INTERNAL}

logger = logging.getLogger(__name__)


class Isolation:
    """Decides for each caller; everything is true of the catalogue as it is when it is asked."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue

    def sees(self, caller: Caller, record: AdapterRecord) -> bool:
        """Whether `record` exists for the caller."""
        return caller.tenant is None or caller.tenant.may_see(record.name, record.tenant)

    async def get(self, caller: Caller, adapter_id: str) -> AdapterRecord:
        """The version that is meant. Raises ADAPTER_NOT_FOUND; to a tenant it says nothing of the name."""
        meant = parse_adapter_id(adapter_id)
        if caller.tenant is None:
            return await self._catalogue.get(meant)
        record = await self._catalogue.find(meant) if caller.tenant.may_use(meant.name) else None
        if record is None or not self.sees(caller, record):
            raise _unseen(meant)
        return record

    async def list_page(
        self, caller: Caller, page_size: int, page_token: str, name_prefix: str, tenant: str | None
    ) -> tuple[list[AdapterRecord], str]:
        """See `Catalogue.list_page`. A tenant's pages, and the tokens between them, are of what it sees."""
        if caller.tenant is None:
            return await self._catalogue.list_page(page_size, page_token, name_prefix, tenant)
        page_size, after = page_start(page_size, page_token, name_prefix, tenant)
        owners = tuple(owner for owner in ("", caller.tenant.name) if tenant in (None, owner))
        found: list[AdapterRecord] = []
        for beginning in _beginnings(caller.tenant.adapters, name_prefix):
            found += await self._seen_records(caller, owners, beginning, after, page_size + 1 - len(found))
        return cut_page(found, page_size, name_prefix, tenant)

    async def _seen_records(
        self, caller: Caller, owners: Sequence[str], beginning: str, after: str, limit: int
    ) -> list[AdapterRecord]:
        """The first records that the caller sees among those whose names begin so."""
        found: list[AdapterRecord] = []
        while len(found) < limit:
            some = await self._catalogue.records(owners, beginning, after, MAX_PAGE_SIZE)
            found += [record for record in some if self.sees(caller, record)]
            if len(some) < MAX_PAGE_SIZE:
                break
            after = member_of(some[-1])
        return found[:limit]

    async def check_fetch(self, caller: Caller, digest: str) -> None:
        """Raises ADAPTER_NOT_FOUND unless a version that the caller sees has this digest."""
        if caller.tenant is None:
            return
        records = await self._catalogue.find_digest(check_digest(digest))
        if not any(self.sees(caller, record) for record in records):
            raise unknown_digest(digest)

    @contextlib.contextmanager
    def veiled(self, caller: Caller) -> Iterator[None]:
        """Around what reads weights: errors name the place that failed, and with equal files that may be another's."""
        try:
            yield
        except SloraError as error:
            if caller.tenant is None or error.reason not in _TELL_OF_PLACES:
                raise
            logger.warning("told to a tenant without its place: %s", error.message)
            message = (
                "the adapter's files cannot be read as they were registered; operators find more in the store's log"
            )
            raise SloraError(error.reason, message) from None

    async def check_change(self, caller: Caller, name: str) -> None:
        """Whether the caller may change what has this name: of a tenant, only if each version is its own.

        Raises ADAPTER_NOT_FOUND where the tenant sees no version, NOT_PERMITTED where it sees some that are not its
        own, or has the name not to itself.
        """
        if caller.tenant is None:
            return
        check_name(name)
        num_own = num_seen = num_versions = 0
        if caller.tenant.may_use(name):
            num_versions, num_own, num_shared = await self._catalogue.count_versions(name, caller.tenant.name)
            num_seen = num_own + num_shared
        if not num_seen:
            raise _unseen(AdapterId(name))
        if num_own < num_versions:
            raise name_taken(name)

    async def check_upload(self, caller: Caller, name: str, tenant: str) -> str:
        """Whose an upload under this name is. A tenant's are its own, and under names that nobody else has.

        `Catalogue.register` looks again as it registers. Raises NOT_PERMITTED.
        """
        if caller.tenant is None:
            return tenant
        own = caller.tenant.name
        if tenant not in ("", own):
            raise SloraError(Reason.NOT_PERMITTED, f"you are the tenant {own}: upload for no other", tenant=tenant)
        if not caller.tenant.may_use(name):
            raise name_taken(name)
        num_versions, num_own, _ = await self._catalogue.count_versions(name, own)
        if num_own < num_versions:
            raise name_taken(name)
        return own


def _beginnings(patterns: Sequence[str], name_prefix: str) -> list[str]:
    """What a name begins with that one of the patterns covers and that begins with `name_prefix`: in order, none the
    beginning of another. Only there a tenant's adapters are looked for, however many others there are."""
    fixed = [pattern.partition("*")[0] for pattern in patterns]
    fitting = {max(part, name_prefix, key=len) for part in fixed if _is_beginning(part, name_prefix)}
    return [part for part in sorted(fitting) if not any(part != other and part.startswith(other) for other in fitting)]


def _is_beginning(one: str, other: str) -> bool:
    """Whether one of them begins with the other."""
    return one.startswith(other) or other.startswith(one)


def _unseen(adapter_id: AdapterId) -> SloraError:
    """The same whether there is no such adapter or it is another tenant's."""
    message = f"no adapter '{adapter_id}' that you may see; ListAdapters lists those that you may"
    return SloraError(Reason.ADAPTER_NOT_FOUND, message, adapter_id=adapter_id)
