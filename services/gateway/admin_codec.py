"""Between the messages of AdminService and plain values."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence

from slora.gateway.v1 import admin_pb2

from services.common.errors import FieldError, Reason
from services.tenancy.directory import KeyRecord
from services.tenancy.tenants import Tenant

_LIMITS = ("requests_per_minute", "tokens_per_minute", "max_concurrent")


def to_limits(request: admin_pb2.SetTenantRequest) -> dict[str, int]:
    """The limits that are to be changed, by name."""
    return {name: getattr(request, name) for name in _LIMITS if request.HasField(name)}


def to_patterns(request: admin_pb2.SetTenantRequest) -> Sequence[str] | None:
    """The patterns of adapters that the tenant is to have; None if they are to stay."""
    return list(request.adapters.patterns) if request.HasField("adapters") else None


def to_max_priority(request: admin_pb2.SetTenantRequest) -> int | None:
    """The highest priority that the tenant's requests may have; None if it is to stay."""
    return request.max_priority if request.HasField("max_priority") else None


def to_tenant(tenant: Tenant) -> admin_pb2.Tenant:
    """A tenant as it is told."""
    limits = tenant.limits
    return admin_pb2.Tenant(
        name=tenant.name,
        requests_per_minute=limits.requests_per_minute,
        tokens_per_minute=limits.tokens_per_minute,
        max_concurrent=limits.max_concurrent,
        adapter_patterns=tenant.adapters,
        max_priority=tenant.max_priority,
    )


def to_key(record: KeyRecord) -> admin_pb2.Key:
    """A key as it is told."""
    key = admin_pb2.Key(key_id=record.key_id, tenant=record.tenant, label=record.label)
    key.create_time.seconds = record.created
    return key


def to_position_token(position: str) -> str:
    """Where a list goes on, opaque to callers."""
    return base64.urlsafe_b64encode(position.encode()).decode().rstrip("=")


def from_position_token(token: str) -> str:
    """The reverse of `to_position_token`; empty for the first page. Raises PAGE_INVALID."""
    try:
        return base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True).decode()
    except (binascii.Error, ValueError):
        complaint = "is not one that was given out; begin again with an empty one"
        raise FieldError(Reason.PAGE_INVALID, "page_token", complaint) from None
