"""slora.gateway.v1.AdminService."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import grpc
from slora.gateway.v1 import admin_pb2, admin_pb2_grpc

from services.common.grpc_errors import abort
from services.common.grpc_server import GrpcServer, authorization_of
from services.gateway.admin_codec import (
    from_position_token,
    to_key,
    to_limits,
    to_max_priority,
    to_patterns,
    to_position_token,
    to_tenant,
)
from services.gateway.codec import to_page_size
from services.tenancy.authentication import AdminKey
from services.tenancy.directory import TenantDirectory

ADMIN_SERVICE_NAME: str = admin_pb2.DESCRIPTOR.services_by_name["AdminService"].full_name

Context = grpc.aio.ServicerContext[Any, Any]
T = TypeVar("T")


class AdminServicer(admin_pb2_grpc.AdminServiceServicer):
    """Tenants and keys, for who has the admin key. See protos/slora/gateway/v1/admin.proto."""

    def __init__(self, directory: TenantDirectory, admin_key: AdminKey) -> None:
        self._directory = directory
        self._admin_key = admin_key

    def add_to(self, server: GrpcServer) -> None:
        """Makes `server` serve this."""
        admin_pb2_grpc.add_AdminServiceServicer_to_server(self, server.grpc)

    async def SetTenant(  # noqa: N802
        self, request: admin_pb2.SetTenantRequest, context: Context
    ) -> admin_pb2.SetTenantResponse:
        """Makes or changes a tenant."""
        limits, patterns, max_priority = to_limits(request), to_patterns(request), to_max_priority(request)
        tenant = await self._permitted(
            context, lambda: self._directory.set_tenant(request.name, limits, patterns, max_priority)
        )
        return admin_pb2.SetTenantResponse(tenant=to_tenant(tenant))

    async def GetTenant(  # noqa: N802
        self, request: admin_pb2.GetTenantRequest, context: Context
    ) -> admin_pb2.GetTenantResponse:
        """Gives a tenant."""
        tenant = await self._permitted(context, lambda: self._directory.get_tenant(request.name))
        return admin_pb2.GetTenantResponse(tenant=to_tenant(tenant))

    async def ListTenants(  # noqa: N802
        self, request: admin_pb2.ListTenantsRequest, context: Context
    ) -> admin_pb2.ListTenantsResponse:
        """Lists tenants."""
        return await self._permitted(context, lambda: self._page_of_tenants(request))

    async def CreateKey(  # noqa: N802
        self, request: admin_pb2.CreateKeyRequest, context: Context
    ) -> admin_pb2.CreateKeyResponse:
        """Makes a key."""
        key, record = await self._permitted(context, lambda: self._directory.create_key(request.tenant, request.label))
        return admin_pb2.CreateKeyResponse(key=to_key(record), api_key=key.text)

    async def ListKeys(  # noqa: N802
        self, request: admin_pb2.ListKeysRequest, context: Context
    ) -> admin_pb2.ListKeysResponse:
        """Lists keys."""
        return await self._permitted(context, lambda: self._page_of_keys(request))

    async def RevokeKey(  # noqa: N802
        self, request: admin_pb2.RevokeKeyRequest, context: Context
    ) -> admin_pb2.RevokeKeyResponse:
        """Revokes a key."""
        await self._permitted(context, lambda: self._directory.revoke_key(request.key_id))
        return admin_pb2.RevokeKeyResponse()

    async def _page_of_tenants(self, request: admin_pb2.ListTenantsRequest) -> admin_pb2.ListTenantsResponse:
        size = to_page_size(request.page_size)
        found = await self._directory.list_tenants(from_position_token(request.page_token), size + 1)
        next_token = to_position_token(found[size - 1].name) if len(found) > size else ""
        return admin_pb2.ListTenantsResponse(tenants=map(to_tenant, found[:size]), next_page_token=next_token)

    async def _page_of_keys(self, request: admin_pb2.ListKeysRequest) -> admin_pb2.ListKeysResponse:
        size = to_page_size(request.page_size)
        found = await self._directory.list_keys(from_position_token(request.page_token), request.tenant, size + 1)
        next_token = to_position_token(found[size - 1].position) if len(found) > size else ""
        return admin_pb2.ListKeysResponse(keys=map(to_key, found[:size]), next_page_token=next_token)

    async def _permitted(self, context: Context, work: Callable[[], Awaitable[T]]) -> T:
        """What `work` gives; it never begins without the admin key."""
        try:
            self._admin_key.check(authorization_of(context))
            return await work()
        except Exception as error:
            await abort(context, error)
            raise
