"""What a model says, on a terminal."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Iterator

from slora_client.async_client import AsyncSloraClient
from slora_client.options import GenerationOptions
from slora_client.tls import Tls
from slora_client.values import Chunk, Prompt

_KEPT = frozenset("\n\t")


def shown(text: str) -> str:
    """`text` without control characters: a model's words must not move the cursor or write to the clipboard."""
    return "".join(c for c in text if c in _KEPT or not (ord(c) < 0x20 or 0x7F <= ord(c) < 0xA0))


class Speaker:
    """Writes answers to standard output, one after the other.

    An answer runs on an event loop, because there Ctrl-C is a cancellation. A KeyboardInterrupt that comes while a
    thread waits for gRPC may be lost, or leave its locks in disorder.
    """

    def __init__(self, runner: asyncio.Runner, client: AsyncSloraClient) -> None:
        self._runner = runner
        self._client = client

    def say(self, model: str, prompt: Prompt, options: GenerationOptions, said: list[Chunk]) -> None:
        """Generates, and gathers in `said` what came. Raises SloraRequestError; KeyboardInterrupt when the generation
        has been stopped."""
        self._runner.run(_write_stream(self._client.stream(model, prompt, **options), said))


@contextlib.contextmanager
def speaker(address: str, api_key: str, tls: Tls | None) -> Iterator[Speaker]:
    """A speaker for a gateway's models."""

    async def connect() -> AsyncSloraClient:
        return AsyncSloraClient(address, api_key, tls)

    with asyncio.Runner() as runner:
        client = runner.run(connect())
        try:
            yield Speaker(runner, client)
        finally:
            runner.run(client.close())


async def _write_stream(chunks: AsyncIterator[Chunk], said: list[Chunk]) -> None:
    """Writes a stream to standard output as it comes, and gathers it in `said`, also if it is interrupted.

    Into a pipe or a file it goes unchanged.
    """
    is_terminal = sys.stdout.isatty()
    async for chunk in chunks:
        said.append(chunk)
        sys.stdout.write(shown(chunk.text) if is_terminal else chunk.text)
        sys.stdout.flush()
