"""What a tenant may still use, as the headers that OpenAI's clients know."""

from __future__ import annotations

from services.gateway.tenancy.limiter import Quota


def rate_limit_headers(quota: Quota) -> dict[str, str]:
    """`x-ratelimit-*` of the limits that there are; `reset` is the time until the whole minute's worth is there."""
    limits = quota.limits
    kinds = (
        ("requests", limits.requests_per_minute, quota.remaining_requests, quota.requests_reset_seconds),
        ("tokens", limits.tokens_per_minute, quota.remaining_tokens, quota.tokens_reset_seconds),
    )
    headers: dict[str, str] = {}
    for kind, limit, remaining, reset_seconds in kinds:
        if limit:
            headers[f"x-ratelimit-limit-{kind}"] = str(limit)
            headers[f"x-ratelimit-remaining-{kind}"] = str(remaining)
            headers[f"x-ratelimit-reset-{kind}"] = f"{reset_seconds:.3f}s"
    return headers
