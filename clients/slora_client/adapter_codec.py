"""Between the adapter store's messages and this package's values, for what is kept of adapters besides their files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from slora.adapter_store.v1 import adapter_store_pb2

from slora_client.codec import AdapterFiles, Progress, to_module_name
from slora_client.values import AdapterFit, ModuleWidths, Problem, SyncRefusal, SyncReport, Validation


def split_version(adapter_id: str) -> tuple[str, int]:
    """`name@version` as name and version; ValueError for anything else."""
    name, _, version = adapter_id.rpartition("@")
    if not name or not version.isascii() or not version.isdigit():
        raise ValueError(f"{adapter_id!r} names no version: it must be name@version")
    return name, int(version)


def to_set_alias(adapter_id: str, alias: str, expected: int | None) -> adapter_store_pb2.SetAliasRequest:
    """Asks that `alias` mean `name@version`."""
    name, version = split_version(adapter_id)
    return adapter_store_pb2.SetAliasRequest(name=name, alias=alias, version=version, expected_version=expected)


def to_update(
    adapter_id: str, set_labels: Mapping[str, str] | None, remove_labels: Sequence[str], pinned: bool | None
) -> adapter_store_pb2.UpdateAdapterRequest:
    """Asks to change labels and pin."""
    return adapter_store_pb2.UpdateAdapterRequest(
        adapter_id=adapter_id, set_labels=set_labels or {}, remove_labels=remove_labels, pinned=pinned
    )


def to_sync_report(response: adapter_store_pb2.SyncAdaptersResponse) -> SyncReport:
    """What a sync did."""
    return SyncReport(
        source_uri=response.source_uri,
        num_found=response.num_found,
        num_added=response.num_added,
        num_changed=response.num_changed,
        num_removed=response.num_removed,
        num_refused=response.num_refused,
        added=tuple(response.added),
        changed=tuple(response.changed),
        removed=tuple(response.removed),
        kept=tuple(response.kept),
        refused=tuple(SyncRefusal(r.name, r.reason, r.message) for r in response.refused),
    )


class ValidationSource(AdapterFiles):
    """An adapter directory as the messages of a validation."""

    def __init__(self, directory: str | Path, on_progress: Progress | None = None) -> None:
        request = adapter_store_pb2.ValidateAdapterRequest
        super().__init__(
            directory,
            lambda chunk: request(config_chunk=chunk),
            lambda chunk: request(weights_chunk=chunk),
            on_progress,
        )


def to_validation(response: adapter_store_pb2.ValidateAdapterResponse) -> Validation:
    """What was found of an adapter."""
    fit = response.fit
    adapter = response.adapter if response.HasField("adapter") else None
    return Validation(
        problems=tuple(Problem(problem.reason, problem.message) for problem in response.problems),
        fit=AdapterFit(
            stated_base_model=fit.stated_base_model,
            min_layers=fit.min_layers,
            modules=tuple(map(_to_widths, fit.modules)),
            base_model=fit.base_model,
            base_layers=fit.base_layers,
            fits=fit.fits,
        ),
        digest=adapter.digest if adapter else "",
        rank=adapter.rank if adapter else 0,
        packed_bytes=adapter.packed_bytes if adapter else 0,
    )


def _to_widths(module: adapter_store_pb2.ModuleWidths) -> ModuleWidths:
    return ModuleWidths(
        module=to_module_name(module.target_module),
        ranks=tuple(module.ranks),
        in_features=module.in_features,
        out_features=module.out_features,
        base_in_features=module.base_in_features,
        base_out_features=module.base_out_features,
    )
