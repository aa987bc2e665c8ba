"""Administration of a gateway's tenants and keys, for threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import TypeVar

import grpc
from slora.gateway.v1 import admin_pb2, admin_pb2_grpc

from slora_client.codec import PAGE_SIZE
from slora_client.grpc_channels import open_channel
from slora_client.grpc_errors import authorization, to_request_error
from slora_client.tls import Tls
from slora_client.values import Key, Tenant

T = TypeVar("T")


class AdminClient:
    """Speaks to a gateway at `host:port` that has an admin key. Close it, or use it in a `with`.

    Failed calls raise `SloraRequestError`. `timeout` is in seconds, for each call; None waits for ever.
    """

    def __init__(self, address: str, admin_key: str, tls: Tls | None = None) -> None:
        self._channel = open_channel(address, tls)
        self._stub = admin_pb2_grpc.AdminServiceStub(self._channel)
        self._metadata = authorization(admin_key)

    def set_tenant(
        self,
        name: str,
        *,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
        max_concurrent: int | None = None,
        adapter_patterns: Sequence[str] | None = None,
        max_priority: int | None = None,
        timeout: float | None = None,
    ) -> Tenant:
        """Makes a tenant, or changes of it what is given; a limit of 0 is none.

        `max_priority`, in [-10, 10], is the highest that its requests may have. One that leaves its priority out has
        0: below 0 each has to say one.
        """
        request = admin_pb2.SetTenantRequest(
            name=name,
            requests_per_minute=requests_per_minute,
            tokens_per_minute=tokens_per_minute,
            max_concurrent=max_concurrent,
            max_priority=max_priority,
        )
        if adapter_patterns is not None:
            request.adapters.CopyFrom(admin_pb2.AdapterPatterns(patterns=adapter_patterns))
        return _to_tenant(self._call(self._stub.SetTenant, request, timeout).tenant)

    def get_tenant(self, name: str, *, timeout: float | None = None) -> Tenant:
        """A tenant."""
        return _to_tenant(self._call(self._stub.GetTenant, admin_pb2.GetTenantRequest(name=name), timeout).tenant)

    def list_tenants(self, *, timeout: float | None = None) -> tuple[Tenant, ...]:
        """All tenants, by name."""
        request = admin_pb2.ListTenantsRequest(page_size=PAGE_SIZE)
        tenants: tuple[Tenant, ...] = ()
        while True:
            response = self._call(self._stub.ListTenants, request, timeout)
            tenants += tuple(map(_to_tenant, response.tenants))
            request.page_token = response.next_page_token
            if not request.page_token:
                return tenants

    def create_key(self, tenant: str, *, label: str = "", timeout: float | None = None) -> tuple[str, Key]:
        """A new API key, which is told this once, and what is kept of it."""
        request = admin_pb2.CreateKeyRequest(tenant=tenant, label=label)
        response = self._call(self._stub.CreateKey, request, timeout)
        return str(response.api_key), _to_key(response.key)

    def list_keys(self, *, tenant: str = "", timeout: float | None = None) -> tuple[Key, ...]:
        """All keys, or those of one tenant."""
        request = admin_pb2.ListKeysRequest(tenant=tenant, page_size=PAGE_SIZE)
        keys: tuple[Key, ...] = ()
        while True:
            response = self._call(self._stub.ListKeys, request, timeout)
            keys += tuple(map(_to_key, response.keys))
            request.page_token = response.next_page_token
            if not request.page_token:
                return keys

    def revoke_key(self, key_id: str, *, timeout: float | None = None) -> None:
        """Ends a key; gateways notice within seconds."""
        self._call(self._stub.RevokeKey, admin_pb2.RevokeKeyRequest(key_id=key_id), timeout)

    def close(self) -> None:
        """Closes the connection."""
        self._channel.close()

    def __enter__(self) -> AdminClient:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _call(self, method: Callable[..., T], request: object, timeout: float | None) -> T:
        try:
            return method(request, timeout=timeout, metadata=self._metadata)
        except grpc.RpcError as error:
            raise to_request_error(error) from None


def _to_tenant(tenant: admin_pb2.Tenant) -> Tenant:
    return Tenant(
        name=tenant.name,
        requests_per_minute=tenant.requests_per_minute,
        tokens_per_minute=tenant.tokens_per_minute,
        max_concurrent=tenant.max_concurrent,
        adapter_patterns=tuple(tenant.adapter_patterns),
        max_priority=tenant.max_priority,
    )


def _to_key(key: admin_pb2.Key) -> Key:
    return Key(key.key_id, key.tenant, key.label, datetime.fromtimestamp(key.create_time.seconds, UTC))
