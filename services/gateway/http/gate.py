"""Before every route: who calls. What a request is for is not looked at until that is known."""

from __future__ import annotations

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from services.common.errors import SloraError
from services.gateway.http.errors import ApiError, to_api_error
from services.tenancy.authentication import AdminKey, Authenticator
from services.tenancy.tenants import ANONYMOUS, Tenant

_HEADER = b"authorization"
_OPEN = frozenset({"/health"})
_ADMINISTRATIVE = frozenset({"/v1/load_lora_adapter", "/v1/unload_lora_adapter"})


class Gate:
    """Tells who calls; puts the `Tenant` into the request's state.

    `/health` is open. Where keys are asked for, the routes that change adapters are for the admin key alone: they
    change what every tenant gets.
    """

    def __init__(self, authenticator: Authenticator, admin_key: AdminKey | None, asks_for_keys: bool) -> None:
        self._authenticator = authenticator
        self._admin_key = admin_key
        self._asks_for_keys = asks_for_keys

    def around(self, app: ASGIApp) -> ASGIApp:
        """`app`, asked only by those who are let in."""

        async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
            try:
                scope["state"]["tenant"] = await self._caller(scope)
            except (ApiError, SloraError) as error:
                shown = to_api_error(error)
                await JSONResponse(shown.body(), shown.status, headers=shown.headers)(scope, receive, send)
                return
            await app(scope, receive, send)

        return guarded

    async def _caller(self, scope: Scope) -> Tenant:
        path = scope["path"]
        if path in _OPEN:
            return ANONYMOUS
        headers = [value.decode("latin-1") for name, value in scope["headers"] if name == _HEADER]
        if path in _ADMINISTRATIVE and self._asks_for_keys:
            if self._admin_key is None:
                raise ApiError(403, "this gateway has no admin key, so nobody changes adapters", "adapter_updates_off")
            self._admin_key.check(headers)
            return ANONYMOUS
        return await self._authenticator.authenticate(headers)
