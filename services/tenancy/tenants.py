"""A tenant: its limits and the adapters it may use. Plain values."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass

from services.common.errors import FieldError, Reason, SloraError
from services.common.priorities import MAX_PRIORITY, MIN_PRIORITY, checked_priority

MAX_REQUESTS_PER_MINUTE = 1_000_000
"""Buckets count in microseconds: over this, rounding one request's share of a minute would be felt."""
MAX_TOKENS_PER_MINUTE = 10**9
MAX_CONCURRENT = 1_000_000
MAX_PATTERNS = 64

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_PATTERN = re.compile(r"[A-Za-z0-9._*-]{1,128}")


@dataclass(frozen=True)
class Limits:
    """What a tenant may use at most; 0 means without a limit."""

    requests_per_minute: int = 0
    """Generations; a burst may take a whole minute's at once."""
    tokens_per_minute: int = 0
    """Of prompts and completions; likewise."""
    max_concurrent: int = 0
    """Generations at the same time, over all gateways."""

    @property
    def are_none(self) -> bool:
        """Whether nothing is limited."""
        return not (self.requests_per_minute or self.tokens_per_minute or self.max_concurrent)


@dataclass(frozen=True)
class Tenant:
    """Who a request is for."""

    name: str
    limits: Limits = Limits()
    adapters: tuple[str, ...] = ()
    """Names of adapters that it may use, `*` for any characters. Everyone may use the base model."""
    max_priority: int = 0
    """The highest priority that its requests may have, in [-10, 10]: what keeps it from passing the others."""

    def may_use(self, adapter: str) -> bool:
        """Whether it may use the adapter of this name (without a version)."""
        return any(fnmatch.fnmatchcase(adapter, pattern) for pattern in self.adapters)

    def may_see(self, adapter: str, owner: str) -> bool:
        """Whether the adapter of this name exists for it, if it is `owner`'s (empty: nobody's in particular).

        Another tenant's do not, even under names that it may use.
        """
        return self.may_use(adapter) and (not self.name or owner in ("", self.name))

    def permitted_priority(self, priority: int) -> int:
        """`priority`, which a request of its may have; one that leaves it out has 0.

        Raises REQUEST_INVALID where nobody's may, NOT_PERMITTED where its may not: it is told, not given less.
        """
        if checked_priority(priority) <= self.max_priority:
            return priority
        complaint = f"is {priority}; requests of tenant {self.name!r} may have at most {self.max_priority}"
        raise FieldError(
            Reason.NOT_PERMITTED, "priority", complaint, value=priority, limit=self.max_priority, tenant=self.name
        )


ANONYMOUS = Tenant("", adapters=("*",), max_priority=MAX_PRIORITY)
"""Every caller of a gateway without keys."""


def checked_name(name: str) -> str:
    """`name`, which a tenant can have. Raises TENANT_INVALID."""
    if _NAME.fullmatch(name) is None:
        message = "a tenant's name is 1 to 63 of letters, digits, '.', '_', '-', beginning with a letter or digit"
        raise SloraError(Reason.TENANT_INVALID, message, field="tenant")
    return name


def check_limit(field: str, value: int, highest: int) -> None:
    """Raises TENANT_INVALID unless `value` is a limit."""
    if not 0 <= value <= highest:
        complaint = f"is {value}; it must be in [0, {highest}], where 0 is no limit"
        raise FieldError(Reason.TENANT_INVALID, field, complaint, limit=highest)


def checked_max_priority(priority: int) -> int:
    """`priority`, which can be `Tenant.max_priority`. Raises TENANT_INVALID."""
    if MIN_PRIORITY <= priority <= MAX_PRIORITY:
        return priority
    complaint = f"is {priority}; it must be in [{MIN_PRIORITY}, {MAX_PRIORITY}]"
    raise FieldError(Reason.TENANT_INVALID, "max_priority", complaint, value=priority)


def checked_patterns(patterns: Sequence[str]) -> tuple[str, ...]:
    """`patterns`, each of which can be one of `Tenant.adapters`. Raises TENANT_INVALID."""
    if len(patterns) > MAX_PATTERNS:
        message = f"a tenant has at most {MAX_PATTERNS} patterns of adapters, not {len(patterns)}"
        raise SloraError(Reason.TENANT_INVALID, message, field="adapters", limit=MAX_PATTERNS)
    for pattern in patterns:
        if _PATTERN.fullmatch(pattern) is None:
            message = "a pattern of adapters is 1 to 128 of letters, digits, '.', '_', '-' and '*', without a version"
            raise SloraError(Reason.TENANT_INVALID, message, field="adapters", pattern=pattern)
    return tuple(dict.fromkeys(patterns))
