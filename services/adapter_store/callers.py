"""Who calls a store: a service or an operator by a token, a tenant by its API key; or nobody is asked.

Tokens lie in a directory, a file a role; each line of a file is one, so that the next can be let in before the last is
taken out. The files are read again when they change. API keys are the gateways'.
"""

from __future__ import annotations

import enum
import hmac
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from services.common.errors import Reason, SloraError
from services.common.settings import UnusableSettingsError
from services.tenancy.api_keys import KEY_BEGINS, bearer_token, digest_of
from services.tenancy.authentication import Authenticator
from services.tenancy.tenants import Tenant

SHORTEST_TOKEN = 32

logger = logging.getLogger(__name__)


class Role(enum.Enum):
    """What a caller is; the value is the name of the file with its tokens."""

    ENGINE = "engine"
    GATEWAY = "gateway"
    OPERATOR = "operator"
    TENANT = "tenant"


SERVICES = (Role.ENGINE, Role.GATEWAY, Role.OPERATOR)


@dataclass(frozen=True)
class Caller:
    """Who calls. `tenant` is set for a tenant, and only then."""

    role: Role
    tenant: Tenant | None = None


class Callers(Protocol):
    """Tells callers apart."""

    async def identify(self, headers: Sequence[str]) -> Caller:
        """Who sent these values of `authorization`. Raises API_KEY_MISSING, API_KEY_INVALID, TENANCY_UNAVAILABLE."""
        ...


class Anyone:
    """A store that asks nobody: whoever reaches it may do everything."""

    async def identify(self, headers: Sequence[str]) -> Caller:
        """See `Callers`."""
        return Caller(Role.OPERATOR)


class KnownCallers:
    """Holders of tokens, and of API keys where there are tenants."""

    def __init__(self, tokens: ServiceTokens, key_holders: Authenticator | None) -> None:
        self._tokens = tokens
        self._key_holders = key_holders

    async def identify(self, headers: Sequence[str]) -> Caller:
        """See `Callers`."""
        token = bearer_token(headers)
        if token.startswith(KEY_BEGINS):
            if self._key_holders is None:
                raise SloraError(Reason.API_KEY_INVALID, "this store takes tokens of services only, and no API keys")
            return Caller(Role.TENANT, await self._key_holders.authenticate(headers))
        role = self._tokens.role_of(token)
        if role is None:
            raise SloraError(Reason.API_KEY_INVALID, "the token is not valid: it is unknown here, or was taken out")
        return Caller(role)


class ServiceTokens:
    """The tokens in a directory; only digests of them are kept."""

    def __init__(self, directory: str) -> None:
        """Raises UnusableSettingsError for tokens that are missing, can be guessed, or are of two roles."""
        self._directory = Path(directory)
        self._seen = self._signature()
        self._digests = self._read()
        roles = sorted({role.value for role in self._digests.values()})
        logger.info("callers must say who they are", extra={"roles": roles})

    def role_of(self, token: str) -> Role | None:
        """Whose token it is now; None if nobody's."""
        self._follow()
        presented, found = digest_of(token), None
        for digest, role in self._digests.items():
            if hmac.compare_digest(presented, digest):
                found = role
        return found

    def _follow(self) -> None:
        seen = self._signature()
        if seen == self._seen:
            return
        self._seen = seen
        try:
            self._digests = self._read()
            logger.info("tokens were read again")
        except UnusableSettingsError as error:
            logger.warning("%s; the tokens that were read before are kept", error)

    def _read(self) -> Mapping[str, Role]:
        digests: dict[str, Role] = {}
        for role in SERVICES:
            path = self._directory / role.value
            for token in _lines(path):
                if len(token) < SHORTEST_TOKEN or not token.isascii() or token.startswith(KEY_BEGINS):
                    raise UnusableSettingsError(
                        f"{path}: a token has {SHORTEST_TOKEN} or more ASCII characters; "
                        "`openssl rand -hex 32` makes one"
                    )
                if digests.setdefault(digest_of(token), role) is not role:
                    raise UnusableSettingsError(f"{path}: this token is in the file of another role too")
        if not digests:
            names = ", ".join(role.value for role in SERVICES)
            raise UnusableSettingsError(f"--service-tokens {self._directory}: there is no token in any of {names}")
        return digests

    def _signature(self) -> tuple[object, ...]:
        found: list[object] = []
        for role in SERVICES:
            try:
                seen = os.stat(self._directory / role.value)
                found.append((seen.st_ino, seen.st_size, seen.st_mtime_ns))
            except OSError:
                found.append(None)
        return tuple(found)


def _lines(path: Path) -> list[str]:
    """The tokens in a file; none if there is no file: no service of that role may call."""
    try:
        return path.read_text(encoding="utf-8").split()
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise UnusableSettingsError(f"{path}: {error}") from error
