"""Rendezvous hashing (highest random weight, Thaler and Ravishankar 1998): each key ranks all members in its own order.

Nobody keeps a table: who knows the members knows the ranking. A member that leaves moves only the keys that ranked it
highest, and one that joins takes only those that rank it highest from now on: 1/n of them. With weights a member is
ranked highest by a share of the keys in proportion to its weight, and a change of its weight moves keys to it or from
it, and no others.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable
from typing import TypeVar

M = TypeVar("M")


def score(member: str, key: str, weight: float = 1.0) -> float:
    """How high `key` ranks `member`: -weight / ln(u), where u in (0, 1) is made of a 64-bit hash of both.

    The same in every process and release: members must agree without talking to each other. `weight` is above 0.
    """
    # The length keeps ("ab", "c") and ("a", "bc") apart.
    content = f"{len(key)}:{key}{member}".encode()
    drawn = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")
    # The upper 52 bits and a half: neither 0 nor, by rounding, 1.
    return -weight / math.log(((drawn >> 12) + 0.5) / 2**52)


def ranked(
    members: Iterable[M], key: str, name_of: Callable[[M], str], weight_of: Callable[[M], float] = lambda member: 1.0
) -> list[M]:
    """The members, the highest for `key` first; their order in `members` does not matter, and names differ."""

    def rank(member: M) -> tuple[float, str]:
        name = name_of(member)
        return score(name, key, weight_of(member)), name

    return sorted(members, key=rank, reverse=True)
