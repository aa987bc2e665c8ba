"""The digest of packed weights: BLAKE3, a tree hash, which several threads can compute and one computes fast."""

from __future__ import annotations

from blake3 import blake3

PREFIX = "blake3:"
"""What every digest begins with; then 64 hexadecimal digits. Part of the format: see PackedManifest.packed_digest."""

DIVIDED_BYTES = 2**20
"""From so many bytes on several threads digest. For fewer, waking them takes longer than what they save: one thread
digests 64 KiB in 11 us, the team in 23."""


def packed_digest(content: bytes | memoryview) -> str:
    """The digest of `content`. Other threads of the interpreter run meanwhile."""
    # AUTO is one team of threads for the whole process. It divides anything from 32 KiB on.
    threads = blake3.AUTO if len(content) >= DIVIDED_BYTES else 1
    return PREFIX + blake3(content, max_threads=threads).hexdigest()
