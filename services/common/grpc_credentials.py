"""TLS as grpc takes it: credentials of servers, which follow their files, and of channels, which do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc

from services.common.tls import ChannelSecurity, PemContents, ServerTls, TlsError, read_token


def server_credentials(tls: ServerTls) -> grpc.ServerCredentials | None:
    """What a port is opened with; None for plain text. A handshake after the files changed shows the new ones.

    Raises TlsError.
    """
    files = tls.open()
    if files is None:
        return None

    def renewed() -> grpc.ServerCertificateConfiguration | None:
        contents = files.renewed()
        return None if contents is None else _configuration(contents)

    asks = bool(tls.client_ca)
    # None is grpc's own word for "as before"; its types do not say so.
    return grpc.dynamic_ssl_server_credentials(_configuration(files.contents), renewed, asks)  # type: ignore[arg-type]


def channel_credentials(security: ChannelSecurity) -> grpc.ChannelCredentials | None:
    """What a channel is opened with; None for plain text.

    grpc keeps what was read for as long as the channel lives: new authorities or a new certificate of the channel's own
    need a new one. The token is read for each call. Raises TlsError.
    """
    contents = security.read()
    if contents is None:
        return None
    shown = (contents.key, contents.certificate) if contents.certificate else (None, None)
    credentials = grpc.ssl_channel_credentials(contents.ca, *shown)
    if not security.token_file:
        return credentials
    token = grpc.metadata_call_credentials(_TokenFile(security.token_file))
    return grpc.composite_channel_credentials(credentials, token)


class _TokenFile(grpc.AuthMetadataPlugin):
    """Adds the token that a file has just now."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __call__(self, context: grpc.AuthMetadataContext, callback: Callable[[Any, Exception | None], None]) -> None:
        """Called by grpc for each call, on a thread."""
        try:
            callback((("authorization", f"Bearer {read_token(self._path)}"),), None)
        except TlsError as error:
            callback((), error)


def _configuration(contents: PemContents) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(contents.key, contents.certificate)], contents.ca or None)
