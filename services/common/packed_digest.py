"""The digest of packed weights: BLAKE3, a tree hash, which several threads can compute and one computes fast."""

from __future__ import annotations

from blake3 import blake3

PREFIX = "blake3:"
"""What every digest begins with; then 64 hexadecimal digits. Part of the format: see PackedManifest.packed_digest."""


class PackedHasher:
    """Computes the digest of bytes that come in pieces. Lets other threads of the interpreter run meanwhile."""

    def __init__(self) -> None:
        # One team of threads for the whole process; pieces below 128 KiB are not divided.
        self._hasher = blake3(max_threads=blake3.AUTO)

    def update(self, piece: bytes | memoryview) -> None:
        """Takes in the next bytes."""
        self._hasher.update(piece)

    def digest(self) -> str:
        """The digest of all bytes so far."""
        return PREFIX + self._hasher.hexdigest()


def packed_digest(content: bytes | memoryview) -> str:
    """The digest of `content`."""
    hasher = PackedHasher()
    hasher.update(content)
    return hasher.digest()
