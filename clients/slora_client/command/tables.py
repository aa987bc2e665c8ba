"""Adapters, syncs, validations, tenants and keys as tables for people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from slora_client.values import Adapter, Key, SyncReport, Tenant, Validation

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_MOST_SHOWN = 20


def bytes_text(num_bytes: int) -> str:
    """Such as `16.8 MiB`; `-` for none."""
    if not num_bytes:
        return "-"
    size = float(num_bytes)
    for unit in _UNITS:
        if size < 1024 or unit == _UNITS[-1]:
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"


def age_text(time: datetime | None, now: datetime | None = None) -> str:
    """Such as `3 min ago`; `-` for never."""
    if time is None:
        return "-"
    seconds = max(((now or datetime.now(UTC)) - time).total_seconds(), 0.0)
    for unit, size in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def labels_text(adapter: Adapter) -> str:
    """Such as `team=search run=7`."""
    return " ".join(f"{key}={value}" for key, value in sorted(adapter.labels.items()))


def adapters_table(adapters: Iterable[Adapter]) -> Table:
    """One row a version."""
    headings = ("adapter", "aliases", "rank", "modules", "packed", "pinned", "last use", "created", "tenant", "labels")
    table = _table(headings, right=("rank", "packed"))
    for adapter in adapters:
        is_read = adapter.state == "ready"
        table.add_row(
            adapter.adapter_id,
            " ".join(adapter.aliases),
            str(adapter.rank) if is_read else "?",
            " ".join(adapter.target_modules) if is_read else "not read yet",
            bytes_text(adapter.packed_bytes),
            "yes" if adapter.pinned else "",
            age_text(adapter.last_use_time),
            age_text(adapter.create_time),
            adapter.tenant,
            labels_text(adapter),
        )
    return table


def adapter_details(adapter: Adapter) -> Table:
    """Everything about one version."""
    table = Table(box=None, show_header=False, pad_edge=False)
    rows = {
        "adapter": adapter.adapter_id,
        "state": adapter.state + (": read and validated when first used" if adapter.state == "discovered" else ""),
        "digest": adapter.digest,
        "aliases": " ".join(adapter.aliases) or "-",
        "labels": labels_text(adapter) or "-",
        "pinned": "yes" if adapter.pinned else "no",
        "rank": str(adapter.rank or "-"),
        "modules": " ".join(adapter.target_modules) or "-",
        "packed": bytes_text(adapter.packed_bytes),
        "files": f"{bytes_text(adapter.source_bytes)} in {adapter.source_uri}",
        "base model": adapter.base_model,
        "tenant": adapter.tenant or "-",
        "created": f"{adapter.create_time:%Y-%m-%d %H:%M:%S} UTC, {age_text(adapter.create_time)}",
        "last use": age_text(adapter.last_use_time),
    }
    for name, value in rows.items():
        table.add_row(name, Text(value))
    return table


def sync_summary(report: SyncReport) -> RenderableType:
    """Counts, and what was refused and why."""
    counts = (
        f"{report.source_uri}: {report.num_found} adapters; {report.num_added} added, {report.num_changed} changed, "
        f"{report.num_removed} removed, {report.num_refused} refused"
    )
    parts: list[RenderableType] = [Text(counts)]
    if not report.num_found and not report.refused:
        # A misspelt prefix, or that of one adapter, is no error to S3.
        parts.append(Text("  no folder lies there; an adapter is a folder under the prefix"))
    for title, names in (("added", report.added), ("changed", report.changed), ("removed", report.removed)):
        if names:
            parts.append(Text(f"  {title}: {_some(names)}"))
    if report.kept:
        parts.append(Text(f"  kept for their aliases, their files changed or are gone: {_some(report.kept)}"))
    if report.refused:
        table = _table(("refused", "reason", "what is wrong"))
        for refusal in report.refused:
            table.add_row(Text(refusal.name), refusal.reason, Text(refusal.message))
        parts.append(table)
    return Group(*parts)


def validation_summary(found: Validation) -> RenderableType:
    """What is wrong, the widths against the base model's, and the verdict."""
    fit = found.fit
    parts: list[RenderableType] = [Text(f"wrong: {problem.reason}: {problem.message}") for problem in found.problems]
    if fit.modules:
        table = _table(("module", "ranks", "in", "out", f"in {fit.base_model}", f"out {fit.base_model}", ""))
        for row in fit.modules:
            same = (row.in_features, row.out_features) == (row.base_in_features, row.base_out_features)
            widths = (row.in_features, row.out_features, row.base_in_features, row.base_out_features)
            ranks = " ".join(map(str, row.ranks))
            table.add_row(row.module, ranks, *(str(width or "?") for width in widths), "" if same else "differs")
        parts.append(table)
        stated = f"; its configuration names {fit.stated_base_model}" if fit.stated_base_model else ""
        parts.append(
            Text(f"the last layer that it changes is {fit.min_layers} of {fit.base_model}'s {fit.base_layers}{stated}")
        )
        parts.append(Text(f"its shapes {'fit' if fit.fits else 'do not fit'} the base model {fit.base_model}"))
    if found.is_valid:
        parts.append(Text(f"valid: rank {found.rank}, {bytes_text(found.packed_bytes)} packed, {found.digest}"))
    else:
        parts.append(Text("not valid: it is not served"))
    return Group(*parts)


def tenants_table(tenants: Iterable[Tenant]) -> Table:
    """One row a tenant."""
    headings = ("tenant", "requests/min", "tokens/min", "at a time", "max priority", "adapters")
    table = _table(headings, right=headings[1:5])
    for tenant in tenants:
        limits = (tenant.requests_per_minute, tenant.tokens_per_minute, tenant.max_concurrent)
        adapters = " ".join(tenant.adapter_patterns) or "none (base model only)"
        shown = (str(limit or "no limit") for limit in limits)
        table.add_row(tenant.name, *shown, str(tenant.max_priority), Text(adapters))
    return table


def keys_table(keys: Iterable[Key]) -> Table:
    """One row a key."""
    table = _table(("key", "tenant", "label", "created"))
    for key in keys:
        table.add_row(key.key_id, key.tenant, Text(key.label), age_text(key.create_time))
    return table


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_SHOWN} more" if len(names) > _MOST_SHOWN else ""
    return ", ".join(names[:_MOST_SHOWN]) + more


def _table(headings: Sequence[str], right: Sequence[str] = ()) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in headings:
        table.add_column(heading, justify="right" if heading in right else "left")
    return table
