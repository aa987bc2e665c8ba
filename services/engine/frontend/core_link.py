"""The socket to the core, as an asyncio protocol: whole messages in, whole messages out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

import msgspec

from services.common.errors import Reason, SloraError
from services.engine.messages import (
    LENGTH,
    MAX_MESSAGE_BYTES,
    ToCore,
    ToFrontend,
    frame,
    to_frontend_decoder,
)

MAX_UNREAD_BYTES = 32 * 2**20
"""New requests are refused while the core has this much to read: room for thousands of prompts of a thousand tokens,
and far less than what would endanger the host."""


class CoreLink(asyncio.Protocol):
    """Cuts what the core sends into messages and hands them on; `on_closed` is called once, with the reason."""

    def __init__(self, on_message: Callable[[ToFrontend], None], on_closed: Callable[[str], None]) -> None:
        self._on_message = on_message
        self._on_closed = on_closed
        self._transport: asyncio.Transport | None = None
        self._unparsed = bytearray()
        self._fault = ""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by asyncio."""
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by asyncio at the end of file, after an error, or after `close`."""
        self._transport = None
        self._on_closed(
            self._fault or (f"the socket to the core failed: {exc}" if exc else "the core closed its socket")
        )

    def data_received(self, data: bytes) -> None:
        """Called by asyncio with whatever has arrived."""
        self._unparsed += data
        try:
            consumed = self._parse()
        except (msgspec.DecodeError, ValueError) as error:
            # Nothing that follows can be trusted: which token belongs to whom is what is being parsed.
            self._fault = f"the core sent something unintelligible: {error}"
            self.close()
            return
        del self._unparsed[:consumed]

    def _parse(self) -> int:
        """Hands on every whole message; returns how many bytes they took."""
        position, size = 0, len(self._unparsed)
        with memoryview(self._unparsed) as view:
            while size - position >= LENGTH.size:
                (length,) = LENGTH.unpack_from(view, position)
                if length > MAX_MESSAGE_BYTES:
                    raise ValueError(f"a message of {length} bytes; the limit is {MAX_MESSAGE_BYTES}")
                start = position + LENGTH.size
                if size - start < length:
                    break
                with view[start : start + length] as body:
                    message = to_frontend_decoder.decode(body)
                position = start + length
                self._on_message(message)
        return position

    def send(self, message: ToCore) -> None:
        """Writes without waiting; nothing happens once the socket is closed."""
        if self._transport is not None:
            self._transport.write(frame(message))

    def check_room(self) -> None:
        """Raises ENGINE_UNAVAILABLE while the core does not read what it was sent."""
        unread = 0 if self._transport is None else self._transport.get_write_buffer_size()
        if unread > MAX_UNREAD_BYTES:
            raise SloraError(
                Reason.ENGINE_UNAVAILABLE,
                f"the engine's core has {unread} bytes of requests to read; try another engine, or again soon",
                unread_bytes=unread,
                max_unread_bytes=MAX_UNREAD_BYTES,
            )

    def close(self, fault: str = "") -> None:
        """Closes the socket: the core sees the end of file and ends. `fault`: what it is given up for."""
        self._fault = self._fault or fault
        if self._transport is not None:
            self._transport.abort()
