"""Names for the KV of a page: a chain of hashes over whose KV it is and all tokens up to its end."""

from __future__ import annotations

import hashlib
import secrets
from array import array
from collections.abc import Sequence

KEY_BYTES = 32


class PrefixKeys:
    """Equal keys mean equal KV: the same adapter's content, the same tokens from the first on, one scope.

    A page's key is BLAKE2b of 256 bits over the key of the page before it (of the first one: over adapter and scope,
    with a secret that is drawn when the process starts and never leaves it) and its own token ids. Nobody can make two
    pages collide, or work a key out. Only the beginning of a chain is keyed: what follows is secret by that, and a hash
    with a key of its own takes three times as long.
    """

    def __init__(self, tokens_per_page: int, secret: bytes | None = None) -> None:
        """`secret`: for tests that compare; drawn otherwise."""
        self._tokens_per_page = tokens_per_page
        self._secret = secrets.token_bytes(hashlib.blake2b.MAX_KEY_SIZE) if secret is None else secret

    def extend(
        self, keys: list[bytes], num_pages: int, token_ids: Sequence[int], digest: str | None, scope: str
    ) -> None:
        """Appends to the keys of a sequence's first pages until there are `num_pages`, all of them full.

        `digest` is the adapter's content, None for the base model alone; `scope` names those who may share.
        """
        begin, end = len(keys) * self._tokens_per_page, num_pages * self._tokens_per_page
        if begin >= end:
            return
        if len(token_ids) < end:
            raise ValueError(f"page {num_pages - 1} is not full: {len(token_ids)} tokens")
        key = keys[-1] if keys else self._root(digest, scope)
        tokens = array("I", token_ids[begin:end])
        page_bytes = self._tokens_per_page * tokens.itemsize
        content = tokens.tobytes()
        for place in range(0, len(content), page_bytes):
            key = hashlib.blake2b(key + content[place : place + page_bytes], digest_size=KEY_BYTES).digest()
            keys.append(key)

    def _root(self, digest: str | None, scope: str) -> bytes:
        # `repr`, since no two pairs have the same.
        whose = repr((digest, scope)).encode()
        return hashlib.blake2b(whose, key=self._secret, digest_size=KEY_BYTES).digest()
