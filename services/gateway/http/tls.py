"""TLS of the HTTP port, under the same settings as that of gRPC."""

from __future__ import annotations

import ssl

from services.common.tls import PemFiles, ServerTls, TlsError, load_authorities, load_certificate


def http_context(tls: ServerTls) -> ssl.SSLContext | None:
    """What connections are encrypted by, each by the files as they are when it begins; None for plain text.

    Raises TlsError.
    """
    files = tls.open()
    if files is None:
        return None
    context = newest = _context(files.files)

    def follow(connection: ssl.SSLObject, server_name: str | None, _: ssl.SSLContext) -> None:
        """Called by OpenSSL as a handshake begins, whether or not the client names a server."""
        nonlocal newest
        if files.renewed() is not None:
            try:
                newest = _context(files.files)
            except TlsError:
                return  # replaced again just now: the next connection finds out
        connection.context = newest

    context.sni_callback = follow
    return context


def _context(files: PemFiles) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    load_certificate(context, files)
    if files.ca:
        load_authorities(context, files.ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context
