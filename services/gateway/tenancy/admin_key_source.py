"""Where the admin key comes from: a file or the environment, never the command line, which everyone on a host sees."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from services.gateway.config import GatewaySettings

ADMIN_KEY_VARIABLE = "SLORA_GATEWAY_ADMIN_KEY"
SHORTEST = 32


def read_admin_key(settings: GatewaySettings, environ: Mapping[str, str]) -> str:
    """The admin key; empty if there is none. Raises ValueError, which says what would be right."""
    key, source = environ.get(ADMIN_KEY_VARIABLE, ""), ADMIN_KEY_VARIABLE
    if settings.admin_key_file:
        source = f"--admin-key-file {settings.admin_key_file}"
        try:
            key = Path(settings.admin_key_file).read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{source}: {error}") from error
    elif not key:
        return ""
    if len(key) < SHORTEST or not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError(
            f"{source}: an admin key has {SHORTEST} or more ASCII characters; `openssl rand -hex 32` makes one"
        )
    if not settings.tenancy_redis:
        raise ValueError(f"{source}: there are no tenants to administer without --tenancy-redis redis://…")
    return key
