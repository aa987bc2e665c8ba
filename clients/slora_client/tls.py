"""How a client knows its server, and shows who it is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Tls:
    """Encrypted calls. Paths of PEM files, read when a client is made."""

    ca: str | Path = ""
    """Authorities that the server's certificate must come from; empty: those that grpc brings."""
    certificate: str | Path = ""
    """The client's own, for a server that asks for one; then its issuers."""
    key: str | Path = ""
    """That certificate's."""
    server_name: str = ""
    """What the server's certificate must say, where that is not the host that is called."""

    def __post_init__(self) -> None:
        if bool(self.certificate) != bool(self.key):
            raise ValueError("a certificate and its key go together: give both, or neither")
