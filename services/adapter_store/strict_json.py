"""JSON that a stranger wrote: one object, each name once, nothing that is no JSON, and no more parts than asked for.

The parser holds the interpreter to its end: a megabyte of `[],[],…` would stop every stream of the process for most of
a second. So lists and objects are counted before it begins.
"""

from __future__ import annotations

import json
from typing import Any, NoReturn


def parse_object(text: bytes, max_containers: int) -> dict[str, Any]:
    """The object that `text` (UTF-8) holds. Names can be written as UTF-8; texts may hold half a surrogate pair.

    ValueError, saying why, if it is none, or if it may have more than `max_containers` lists and objects: brackets are
    counted inside of texts too, so the limit must leave room for those.
    """
    num_containers = text.count(b"[") + text.count(b"{")
    if num_containers > max_containers:
        raise ValueError(f"it has {num_containers} lists and objects; at most {max_containers} are read")
    try:
        found = json.loads(text.decode(), object_pairs_hook=_unique_names, parse_constant=_no_constant)
    except RecursionError as error:
        raise ValueError(str(error)) from None
    if not isinstance(found, dict):
        raise ValueError("it must hold one JSON object")
    return found


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    for name in found:
        name.encode()  # half a surrogate pair is a ValueError
    if len(found) != len(pairs):
        raise ValueError("a name appears twice in one object")
    return found


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON value")
