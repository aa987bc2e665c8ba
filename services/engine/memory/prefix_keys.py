"""Names for the KV of a page: a chain of keyed hashes over whose KV it is and all tokens up to its end."""

from __future__ import annotations

import hashlib
import secrets
from array import array
from collections.abc import Sequence

KEY_BYTES = 32


class PrefixKeys:
    """Equal keys mean equal KV: the same adapter's content, the same tokens from the first on, one scope.

    A page's key is BLAKE2b of 256 bits over the key of the page before it (of the first one: over adapter and scope)
    and its own token ids. Nobody can make two pages collide, or work a key out: the hash has a secret that is drawn
    when the process starts and never leaves it.
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
        if len(keys) >= num_pages:
            return
        size = self._tokens_per_page
        key = keys[-1] if keys else self._root(digest, scope)
        for place in range(len(keys), num_pages):
            tokens = array("I", token_ids[place * size : (place + 1) * size])
            if len(tokens) != size:
                raise ValueError(f"page {place} is not full: {len(token_ids)} tokens")
            hashed = hashlib.blake2b(key, key=self._secret, digest_size=KEY_BYTES, person=b"page")
            hashed.update(tokens)
            key = hashed.digest()
            keys.append(key)

    def _root(self, digest: str | None, scope: str) -> bytes:
        # `repr`, since no two pairs have the same.
        whose = repr((digest, scope)).encode()
        return hashlib.blake2b(whose, key=self._secret, digest_size=KEY_BYTES, person=b"root").digest()
