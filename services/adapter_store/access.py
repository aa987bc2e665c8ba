"""Which callers may call which RPC of the store, and the door that every call goes through.

What a tenant then sees and changes is `isolation.py`'s. What is not named here is for nobody.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence

from services.adapter_store.callers import Caller, Callers, Role
from services.common.errors import Reason, SloraError, Status

_EVERYONE_BUT_ENGINES = frozenset({Role.OPERATOR, Role.GATEWAY, Role.TENANT})
_OWNERS = frozenset({Role.OPERATOR, Role.TENANT})

ALLOWED: Mapping[str, frozenset[Role]] = {
    # These read S3 with the store's own credentials: a tenant could have it read what is another's.
    "RegisterAdapter": frozenset({Role.OPERATOR, Role.GATEWAY}),
    "SyncAdapters": frozenset({Role.OPERATOR}),
    "UploadAdapter": _OWNERS,
    "ValidateAdapter": _OWNERS,
    "GetAdapter": _EVERYONE_BUT_ENGINES,
    "ListAdapters": _OWNERS,
    "WatchAdapters": _EVERYONE_BUT_ENGINES,
    "DeleteAdapter": _EVERYONE_BUT_ENGINES,
    "SetAlias": _OWNERS,
    "DeleteAlias": _OWNERS,
    "UpdateAdapter": _OWNERS,
    "FetchAdapter": frozenset({Role.OPERATOR, Role.ENGINE, Role.TENANT}),
    # The arena holds everyone's weights: who reads it must be trusted with all of them.
    "ShareAdapter": frozenset({Role.OPERATOR, Role.ENGINE}),
    "ReportCopies": frozenset({Role.OPERATOR, Role.ENGINE}),
    # Engines and gateways find the replicas by it; it says where arenas lie.
    "ListReplicas": frozenset({Role.OPERATOR, Role.GATEWAY, Role.ENGINE}),
    "ReportAdapterUse": frozenset({Role.OPERATOR, Role.GATEWAY}),
}

_ENDS = (Status.UNAUTHENTICATED, Status.PERMISSION_DENIED)


class Door:
    """Lets callers in, to the RPCs that are for them."""

    def __init__(self, callers: Callers, recheck_seconds: float) -> None:
        """A stream that lasts is looked at again every `recheck_seconds`."""
        self._callers = callers
        self._recheck_seconds = recheck_seconds

    async def admit(self, method: str, headers: Sequence[str]) -> Caller:
        """Who calls `method` with these values of `authorization`. Raises NOT_PERMITTED and errors of `Callers`."""
        caller = await self._callers.identify(headers)
        if caller.role not in ALLOWED.get(method, frozenset()):
            message = f"{method} is not for {'tenants' if caller.tenant else caller.role.value + 's'}"
            raise SloraError(Reason.NOT_PERMITTED, message, method=method)
        return caller

    @contextlib.asynccontextmanager
    async def attend(self, method: str, headers: Sequence[str], caller: Caller) -> AsyncIterator[Attendance]:
        """For the length of a long stream: who `caller` is now, and whether the stream is still theirs.

        With the Redis of tenants away it goes on, as what runs does.
        """
        attendance = Attendance(caller)

        async def look_again() -> None:
            while attendance.refusal is None:
                await asyncio.sleep(self._recheck_seconds)
                try:
                    attendance.caller = await self.admit(method, headers)
                except SloraError as error:
                    if error.reason.status in _ENDS:
                        attendance.refusal = error

        looking = asyncio.create_task(look_again())
        try:
            yield attendance
        finally:
            looking.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await looking


class Attendance:
    """A caller who stays. `refusal` is why they may stay no longer."""

    def __init__(self, caller: Caller) -> None:
        self.caller = caller
        self.refusal: SloraError | None = None
