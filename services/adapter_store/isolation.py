"""What a tenant sees of the catalogue, and may change: its own adapters, and nobody's in particular to read.

Names come first: a name that none of the tenant's patterns covers does not exist for it, whoever has it. What is
another tenant's, and what is not there, is refused in the same words after the same work. Services and operators are
not held apart.
"""

from __future__ import annotations

from services.adapter_store.callers import Caller
from services.adapter_store.catalogue import Catalogue, name_taken
from services.adapter_store.identifiers import AdapterId, check_digest, check_name, parse_adapter_id
from services.adapter_store.manifest import AdapterRecord
from services.adapter_store.residency import unknown_digest
from services.common.errors import Reason, SloraError


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
        """See `Catalogue.list_page`. A tenant's page may hold fewer than its size though another follows."""
        owners = None
        if caller.tenant is not None:
            owners = tuple(owner for owner in ("", caller.tenant.name) if tenant in (None, owner))
        records, token = await self._catalogue.list_page(page_size, page_token, name_prefix, tenant, owners)
        return [record for record in records if self.sees(caller, record)], token

    async def check_fetch(self, caller: Caller, digest: str) -> None:
        """Raises ADAPTER_NOT_FOUND unless a version that the caller sees has this digest."""
        if caller.tenant is None:
            return
        records = await self._catalogue.find_digest(check_digest(digest))
        if not any(self.sees(caller, record) for record in records):
            raise unknown_digest(digest)

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


def _unseen(adapter_id: AdapterId) -> SloraError:
    """The same whether there is no such adapter or it is another tenant's."""
    message = f"no adapter '{adapter_id}' that you may see; ListAdapters lists those that you may"
    return SloraError(Reason.ADAPTER_NOT_FOUND, message, adapter_id=adapter_id)
