"""API keys: `sk-slora-<id>-<secret>`. The id finds a key in Redis; of the secret only a digest is ever kept.

A secret is 256 random bits, so nobody can guess it from its SHA-256: slow hashes are for passwords that people choose,
and would cost every request what they cost a guesser.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from services.common.errors import Reason, SloraError

_ID_BYTES, _SECRET_BYTES = 8, 32
KEY_BEGINS = "sk-slora-"
_KEY = re.compile(r"sk-slora-([0-9a-f]{16})-([A-Za-z0-9_-]{43})")
_ID = re.compile(r"[0-9a-f]{16}")
_BEARER = re.compile(r"bearer +(\S+)", re.IGNORECASE)
_LONGEST_HEADER = 512


@dataclass(frozen=True)
class ApiKey:
    """A key as its owner presents it."""

    key_id: str
    secret: str

    def __repr__(self) -> str:
        """Never the secret: values end up in logs."""
        return f"ApiKey({self.key_id})"

    @property
    def text(self) -> str:
        """What is shown once, to who asked for the key."""
        return f"sk-slora-{self.key_id}-{self.secret}"

    @property
    def digest(self) -> str:
        """What is kept of the secret."""
        return digest_of(self.secret)

    def matches(self, digest: str) -> bool:
        """Whether this key's secret has `digest`; takes as long for a near miss as for any other."""
        return hmac.compare_digest(self.digest, digest)


def make_key() -> ApiKey:
    """A new key that nobody has."""
    return ApiKey(secrets.token_hex(_ID_BYTES), secrets.token_urlsafe(_SECRET_BYTES))


def digest_of(secret: str) -> str:
    """SHA-256 in hexadecimal digits."""
    return hashlib.sha256(secret.encode()).hexdigest()


def checked_key_id(key_id: str) -> str:
    """`key_id`, which a key can have. Raises API_KEY_NOT_FOUND."""
    if _ID.fullmatch(key_id) is None:
        message = "a key's id is the 16 hexadecimal digits behind `sk-slora-`; ListKeys lists them"
        raise SloraError(Reason.API_KEY_NOT_FOUND, message)
    return key_id


def bearer_token(headers: Sequence[str]) -> str:
    """The token in a call's `authorization` headers, of which there is to be one.

    Raises API_KEY_MISSING or API_KEY_INVALID; messages never hold what was sent.
    """
    if not headers:
        message = "an API key is asked for here: send it as `Authorization: Bearer sk-slora-…`"
        raise SloraError(Reason.API_KEY_MISSING, message)
    found = _BEARER.fullmatch(headers[0]) if len(headers) == 1 and len(headers[0]) <= _LONGEST_HEADER else None
    if found is None:
        message = "the authorization header is not understood: send it once, as `Authorization: Bearer sk-slora-…`"
        raise SloraError(Reason.API_KEY_INVALID, message)
    return found[1]


def presented_key(headers: Sequence[str]) -> ApiKey:
    """The API key in a call's `authorization` headers. Raises API_KEY_MISSING or API_KEY_INVALID."""
    found = _KEY.fullmatch(bearer_token(headers))
    if found is None:
        raise invalid_key()
    return ApiKey(found[1], found[2])


def invalid_key() -> SloraError:
    """The same for a key that never was, one that was revoked, and a wrong secret."""
    return SloraError(Reason.API_KEY_INVALID, "the API key is not valid: it is unknown here, or was revoked")
