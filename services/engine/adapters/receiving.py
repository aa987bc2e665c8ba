"""Puts an adapter's chunks together in one buffer and computes their digest on the way, on several threads."""

from __future__ import annotations

from concurrent.futures import Executor, Future, wait
from types import TracebackType

import numpy as np
import numpy.typing as npt

from services.common.block_digest import BLOCK_BYTES, digest_of_blocks, hash_block

Bytes = npt.NDArray[np.uint8]


class BlockReceiver:
    """Fills `content` with `add`, from its beginning; `digest` when all is there. Used by one thread.

    A context manager: once it is left, also by an error, nothing writes to `content` any more. Copies go through numpy,
    which lets other threads of the interpreter run meanwhile: the core's above all.
    """

    def __init__(self, content: memoryview, executor: Executor) -> None:
        self._content = np.frombuffer(content, np.uint8)
        self._executor = executor
        self._hashes: list[Future[bytes]] = []
        self.received = 0

    def __enter__(self) -> BlockReceiver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # The buffer goes to the next load: a late copy would spoil bytes of it that were verified already.
        wait(self._hashes)

    def add(self, chunk: bytes | memoryview) -> None:
        """Appends `chunk`, which must fit; it must not change until `digest` has returned."""
        source = np.frombuffer(chunk, np.uint8)
        if self.received + len(source) > len(self._content):
            raise ValueError(f"{self.received + len(source)} bytes for a buffer of {len(self._content)}")
        while len(source):
            begin = self.received - self.received % BLOCK_BYTES
            block = self._content[begin : begin + BLOCK_BYTES]
            filled = self.received - begin
            piece, source = np.split(source, [len(block) - filled])
            self.received += len(piece)
            if len(piece) == len(block):
                self._hashes.append(self._executor.submit(_copy_and_hash, block, piece))
                continue
            np.copyto(block[filled : filled + len(piece)], piece)
            if filled + len(piece) == len(block):
                self._hashes.append(self._executor.submit(hash_block, block.data))

    def digest(self) -> str:
        """Waits for the digest of what was received."""
        return digest_of_blocks(future.result() for future in self._hashes)


def _copy_and_hash(target: Bytes, source: Bytes) -> bytes:
    np.copyto(target, source)
    return hash_block(target.data)
