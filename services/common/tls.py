"""TLS in plain files: what a server shows and asks for, whom a channel believes, and how files are read and renewed.

All files are PEM. What they hold is checked when it is read: a service with files that cannot work ends at its start,
and one whose files are renewed takes the new ones when they fit together, at the next handshake.
"""

from __future__ import annotations

import logging
import os
import ssl
import stat
import threading
from dataclasses import dataclass
from pathlib import Path

from services.common.settings import UnusableSettingsError

logger = logging.getLogger(__name__)


class TlsError(UnusableSettingsError):
    """Files or settings of TLS cannot work; the message says which and why."""


@dataclass(frozen=True)
class PemContents:
    """What is shown (key and certificate chain) and whom is believed; empty where there is none."""

    certificate: bytes
    key: bytes
    ca: bytes


@dataclass(frozen=True)
class PemFiles:
    """Paths of a certificate chain (its own first), its key, and the certificates of authorities; empty for none."""

    certificate: str
    key: str
    ca: str

    def read(self) -> PemContents:
        """Their contents, which fit together. Raises TlsError."""
        if bool(self.certificate) != bool(self.key):
            given, missing = ("certificate", "key") if self.certificate else ("key", "certificate")
            raise TlsError(f"TLS: there is a {given}, {self.certificate or self.key}, without a {missing}")
        before = self.signature()
        contents = PemContents(*map(_read, self._paths()))
        self._check()
        if self.signature() != before:
            raise TlsError(f"TLS: {self.certificate or self.ca} changed while it was read")
        return contents

    def signature(self) -> tuple[tuple[int, int, int], ...]:
        """Changes when a file is written or replaced, also behind a symbolic link. Raises TlsError."""
        found = []
        for path in filter(None, self._paths()):
            try:
                seen = os.stat(path)
            except OSError as error:
                raise TlsError(f"TLS: {path}: {error.strerror}") from error
            found.append((seen.st_ino, seen.st_size, seen.st_mtime_ns))
        return tuple(found)

    def _paths(self) -> tuple[str, str, str]:
        return self.certificate, self.key, self.ca

    def _check(self) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        if self.certificate:
            load_certificate(context, self)
            if stat.S_IMODE(os.stat(self.key).st_mode) & stat.S_IRWXO:
                logger.warning("TLS: every user of this host may read the key %s: chmod o= it", self.key)
        if self.ca:
            load_authorities(context, self.ca)


def load_certificate(context: ssl.SSLContext, files: PemFiles) -> None:
    """Has `context` show the certificate of `files`. Raises TlsError."""
    try:
        # Without a password function, OpenSSL would ask for one on the terminal.
        context.load_cert_chain(files.certificate, files.key, password=lambda: b"")
    except (ssl.SSLError, OSError) as error:
        why = {"KEY_VALUES_MISMATCH": "the key is another certificate's"}.get(
            getattr(error, "reason", "") or "", "these are no PEM files of a certificate and its key without a password"
        )
        raise TlsError(f"TLS: {files.certificate} with {files.key}: {why} ({error})") from error


def load_authorities(context: ssl.SSLContext, ca: str) -> None:
    """Has `context` believe the authorities of the file `ca`. Raises TlsError."""
    try:
        context.load_verify_locations(ca)
    except (ssl.SSLError, OSError) as error:
        raise TlsError(f"TLS: {ca}: this is no PEM file of certificates ({error})") from error


class RenewedFiles:
    """Files that were read, and are read again when they change. Safe to share between threads."""

    def __init__(self, files: PemFiles) -> None:
        """Raises TlsError."""
        self.files = files
        self._lock = threading.Lock()
        self._seen: object = files.signature()
        self.contents = files.read()

    def renewed(self) -> PemContents | None:
        """The new contents if the files have changed since they were last looked at, and fit together.

        Files that do not (half of them is written) change nothing and are looked at again once they change.
        """
        with self._lock:
            try:
                seen: object = self.files.signature()
            except TlsError as error:
                seen = str(error)
            if seen == self._seen:
                return None
            self._seen = seen
            try:
                self.contents = self.files.read()
            except TlsError as error:
                logger.warning("%s; the certificate that was read before is kept", error)
                return None
        logger.info("TLS: read again", extra={"certificate": self.files.certificate, "ca": self.files.ca})
        return self.contents


@dataclass(frozen=True)
class ServerTls:
    """What a server shows its callers, and asks of them."""

    certificate: str = ""
    """Empty: plain text."""
    key: str = ""
    client_ca: str = ""
    """Callers must show a certificate of these authorities; empty: none is asked for."""

    @property
    def is_on(self) -> bool:
        """Whether anything is encrypted."""
        return bool(self.certificate)

    def open(self) -> RenewedFiles | None:
        """The files, read; None for plain text. Raises TlsError."""
        if not self.certificate and (self.key or self.client_ca):
            raise TlsError("TLS: tls_key and tls_client_ca do nothing without tls_certificate: give that too")
        return RenewedFiles(PemFiles(self.certificate, self.key, self.client_ca)) if self.certificate else None


@dataclass(frozen=True)
class ChannelSecurity:
    """Whom a channel believes that it speaks to, and what it shows of itself."""

    ca: str = ""
    """Authorities that the server's certificate must come from; empty: plain text."""
    certificate: str = ""
    """What is shown to a server that asks for a certificate."""
    key: str = ""
    server_name: str = ""
    """What the server's certificate must say, where that is not the host that is called."""
    token_file: str = ""
    """File with a token that every call carries; read for each call."""

    def read(self) -> PemContents | None:
        """The files' contents; None for plain text. Raises TlsError."""
        if not self.ca:
            if self.certificate or self.key or self.server_name:
                raise TlsError("TLS: certificate, key and server name of a channel do nothing without its CA: give one")
            if self.token_file:
                raise TlsError(f"TLS: the token in {self.token_file} is sent encrypted only: give the channel a CA")
            return None
        if self.token_file:
            read_token(self.token_file)
        return PemFiles(self.certificate, self.key, self.ca).read()


PLAIN_TEXT = ChannelSecurity()


def read_token(path: str) -> str:
    """The token in a file, its first line. Raises TlsError."""
    lines = _read(path).decode("utf-8", errors="replace").split()
    if not lines or not lines[0].isascii():
        raise TlsError(f"{path}: there is no token; `openssl rand -hex 32` makes one")
    return lines[0]


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes() if path else b""
    except OSError as error:
        raise TlsError(f"TLS: {path}: {error.strerror}") from error
