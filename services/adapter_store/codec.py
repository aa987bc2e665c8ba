"""Between the store's own values and the messages of slora.adapter_store.v1."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from google.protobuf.timestamp_pb2 import Timestamp
from slora.adapter_store.v1 import adapter_pb2, adapter_store_pb2

from services.adapter_store.catalogue_watch import CatalogueEvent, EventKind
from services.adapter_store.identifiers import MAX_LABELS, too_many_labels
from services.adapter_store.manifest import AdapterRecord, PackedName
from services.common.errors import Reason, SloraError

MAX_COPIED = 10_000
"""Adapters in one report of copies."""


def adapter_message(record: AdapterRecord, deleted: bool = False) -> adapter_pb2.Adapter:
    """A catalogue record as callers see it."""
    if deleted:
        state = adapter_pb2.ADAPTER_STATE_DELETED
    else:
        state = adapter_pb2.ADAPTER_STATE_READY if record.content else adapter_pb2.ADAPTER_STATE_DISCOVERED
    marks = record.marks
    return adapter_pb2.Adapter(
        name=record.name,
        version=record.version,
        adapter_id=record.adapter_id,
        digest=record.digest,
        state=state,
        rank=record.rank,
        target_modules=[f"TARGET_MODULE_{module.name}" for module in record.target_modules],
        packed_bytes=record.packed_bytes,
        source_bytes=record.source_bytes,
        source_uri=record.source.uri,
        tenant=record.tenant,
        base_model=record.base_model,
        create_time=_timestamp(record.create_time_ms),
        aliases=marks.aliases,
        labels=dict(marks.labels),
        pinned=marks.pinned,
        last_use_time=_timestamp(marks.last_use_ms) if marks.last_use_ms else None,
    )


def few_labels(labels: Mapping[str, str]) -> dict[str, str]:
    """Labels of a request. LABELS_INVALID for too many, before the thousands that fit in a message are copied."""
    if len(labels) > MAX_LABELS:
        raise too_many_labels(len(labels))
    return dict(labels)


def _timestamp(milliseconds: int) -> Timestamp:
    timestamp = Timestamp()
    timestamp.FromMilliseconds(milliseconds)
    return timestamp


def event_message(event: CatalogueEvent) -> adapter_store_pb2.WatchAdaptersResponse:
    """An event of a watch."""
    deleted = event.kind is EventKind.DELETED
    return adapter_store_pb2.WatchAdaptersResponse(
        event=f"WATCH_EVENT_{event.kind.name}",
        adapter=None if event.record is None else adapter_message(event.record, deleted),
        resume_token=event.resume_token,
    )


def copies_by_name(request: adapter_store_pb2.ReportCopiesRequest) -> Counter[PackedName]:
    """How often each adapter or shard was copied; REQUEST_INVALID for too many."""
    if len(request.copies) > MAX_COPIED:
        message = f"{len(request.copies)} adapters at once; at most {MAX_COPIED} are taken"
        raise SloraError(Reason.REQUEST_INVALID, message, field="copies", limit=MAX_COPIED)
    counted: Counter[PackedName] = Counter()
    for copied in request.copies:
        counted[PackedName(copied.digest, copied.tp_rank, copied.tp_size or 1)] += copied.num_copies
    return counted
