"""How catalogue records, and the opaque tokens that callers hand back, are written as text."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from services.adapter_store.loop_turns import in_turns
from services.adapter_store.manifest import AdapterRecord, Marks, SourceLocation, TargetModule

# Separates name and version in index members. It sorts before every character a name may have, so that members sort
# by name first: `a!1` before `a-b!1`.
_SEPARATOR = "!"
ROW_PARTS = 5
# Of names and a tenant at their longest there are some 2000; a megabyte would take the event loop a while to parse.
_MAX_TOKEN_CHARS = 4096
LAST = "\x7f"  # sorts behind every character a member may have


def index_member(name: str, version: int) -> str:
    """The member of the sorted index for `name@version`; members sort by name, then version."""
    return f"{name}{_SEPARATOR}{version:010d}"


def split_member(member: str) -> tuple[str, int]:
    """Name and version of an index member."""
    name, _, version = member.partition(_SEPARATOR)
    return name, int(version)


def decode_aliases(text: str) -> dict[str, int]:
    """A name's aliases and the versions they mean, in order; of '' none."""
    return {alias: int(version) for alias, version in sorted(json.loads(text).items())} if text else {}


def encode_record(record: AdapterRecord) -> str:
    """The record as JSON, without its version and marks: the one is given by the catalogue and kept in the index
    member, the others change and are kept beside it."""
    return json.dumps(
        {
            "rank": record.rank,
            "digest": record.digest,
            "modules": [module.name for module in record.target_modules],
            "packed_bytes": record.packed_bytes,
            "packed_digest": record.packed_digest,
            "packing": record.packing,
            "config_bytes": record.config_bytes,
            "weights_bytes": record.weights_bytes,
            "config_etag": record.config_etag,
            "weights_etag": record.weights_etag,
            "uri": record.source.uri,
            "managed": record.source.managed,
            "tenant": record.tenant,
            "base_model": record.base_model,
            "create_time_ms": record.create_time_ms,
            "content": record.content,
        },
        ensure_ascii=False,
        separators=(",", ":"),
    )


def encode_marks(labels: Mapping[str, str], pinned: bool = False) -> str:
    """Labels and pin as JSON."""
    marks: dict[str, Any] = {"labels": dict(labels)} if labels else {}
    return json.dumps(marks | ({"pinned": True} if pinned else {}), ensure_ascii=False, separators=(",", ":"))


async def decode_rows(flat: Sequence[str]) -> list[AdapterRecord]:
    """The records of rows, one behind the other."""
    begins = in_turns(range(0, len(flat), ROW_PARTS))
    return [decode_row(*flat[begin : begin + ROW_PARTS]) async for begin in begins]


def decode_row(member: str, text: str, marks: str, aliases: str, used: str) -> AdapterRecord:
    """The record of a row, as the scripts give it; `aliases` are those of its name."""
    name, version = split_member(member)
    fields = json.loads(text)
    return AdapterRecord(
        name=name,
        version=version,
        digest=fields["digest"],
        rank=fields["rank"],
        target_modules=tuple(TargetModule[module] for module in fields["modules"]),
        packed_bytes=fields["packed_bytes"],
        packed_digest=fields["packed_digest"],
        packing=fields["packing"],
        config_bytes=fields["config_bytes"],
        weights_bytes=fields["weights_bytes"],
        config_etag=fields["config_etag"],
        weights_etag=fields["weights_etag"],
        source=SourceLocation(fields["uri"], fields["managed"]),
        tenant=fields["tenant"],
        base_model=fields["base_model"],
        create_time_ms=fields["create_time_ms"],
        content=fields.get("content", fields["digest"]),
        marks=_decode_marks(version, marks, aliases, used),
    )


def _decode_marks(version: int, marks: str, aliases: str, used: str) -> Marks:
    if not (marks or aliases or used):
        return Marks()
    fields = json.loads(marks) if marks else {}
    return Marks(
        aliases=tuple(alias for alias, means in decode_aliases(aliases).items() if means == version),
        labels=tuple(sorted(fields.get("labels", {}).items())),
        pinned=fields.get("pinned", False),
        last_use_ms=int(used) if used else 0,
    )


@dataclass(frozen=True, slots=True)
class PageToken:
    """Where a listing goes on: behind `after`, with the same filters."""

    after: str
    name_prefix: str
    tenant: str | None

    def encode(self) -> str:
        """As text for the caller."""
        return _encode([self.after, self.name_prefix, self.tenant])

    @classmethod
    def decode(cls, token: str) -> PageToken:
        """The token again; ValueError if it is not one that was given out."""
        after, name_prefix, tenant = _decode(token, 3)
        if not (
            isinstance(after, str) and isinstance(name_prefix, str) and (tenant is None or isinstance(tenant, str))
        ):
            raise ValueError("not a page token")
        return cls(after, name_prefix, tenant)


@dataclass(frozen=True, slots=True)
class ResumeToken:
    """Where a watch goes on.

    `epoch` names the catalogue's history (a Redis that lost its data begins a new one) and `sequence` the last change
    seen. `after` is set while the first listing is under way: the last index member sent; the listing goes on there
    and then every change behind `sequence` follows.
    """

    epoch: str
    sequence: int
    after: str | None = None

    @property
    def listing(self) -> bool:
        """Whether the first listing is under way."""
        return self.after is not None

    def encode(self) -> str:
        """As text for the caller."""
        return _encode([self.epoch, self.sequence, self.after])

    @classmethod
    def decode(cls, token: str) -> ResumeToken:
        """The token again; ValueError if it is not one that was given out."""
        epoch, sequence, after = _decode(token, 3)
        if not (isinstance(epoch, str) and type(sequence) is int and (after is None or isinstance(after, str))):
            raise ValueError("not a resume token")
        if not 0 <= sequence < 2**53:
            raise ValueError("not a resume token")
        return cls(epoch, sequence, after)


def _encode(fields: list[Any]) -> str:
    return base64.urlsafe_b64encode(json.dumps(fields, separators=(",", ":")).encode()).decode()


def _decode(token: str, num_fields: int) -> list[Any]:
    if len(token) > _MAX_TOKEN_CHARS:
        raise ValueError("not a token")
    try:
        fields = json.loads(base64.b64decode(token.encode(), altchars=b"-_", validate=True))
        json.dumps(fields, ensure_ascii=False).encode()  # half a surrogate pair is a ValueError
    except (ValueError, RecursionError, binascii.Error) as error:
        raise ValueError("not a token") from error
    if not isinstance(fields, list) or len(fields) != num_fields:
        raise ValueError("not a token")
    return fields
