"""The digest of packed weights: BLAKE3, a tree hash, which several threads can compute and one computes fast."""

from __future__ import annotations

from blake3 import blake3

PREFIX = "blake3:"
"""What every digest begins with; then 64 hexadecimal digits. Part of the format: see PackedManifest.packed_digest."""


def packed_digest(content: bytes | memoryview) -> str:
    """The digest of `content`. Other threads of the interpreter run meanwhile."""
    # AUTO is one team of threads for the whole process; less than 128 KiB are not divided.
    return PREFIX + blake3(content, max_threads=blake3.AUTO).hexdigest()
