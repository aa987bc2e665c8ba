"""Messages of syncs, of adapters that were looked over, and of replicas."""

from __future__ import annotations

from slora.adapter_store.v1 import adapter_pb2
from slora.adapter_store.v1 import adapter_store_pb2 as pb

from services.adapter_store.base_model import BaseModel
from services.adapter_store.inspection import Inspection, ModuleFit
from services.adapter_store.membership import Membership
from services.adapter_store.sync import SyncReport
from services.common.errors import Reason, SloraError

MAX_LISTED = 1000
MAX_USES = 10_000


def sync_message(report: SyncReport) -> pb.SyncAdaptersResponse:
    """What a sync did."""
    refused = [
        pb.SyncRefusal(name=name, reason=error.reason.name, message=error.message)
        for name, error in list(report.refused.items())[:MAX_LISTED]
    ]
    return pb.SyncAdaptersResponse(
        source_uri=report.source_uri,
        num_found=report.num_found,
        num_added=len(report.added),
        num_changed=len(report.changed),
        num_removed=len(report.removed),
        num_refused=len(report.refused),
        added=report.added[:MAX_LISTED],
        changed=report.changed[:MAX_LISTED],
        removed=report.removed[:MAX_LISTED],
        refused=refused,
        kept=report.kept[:MAX_LISTED],
    )


def use_times(request: pb.ReportAdapterUseRequest) -> dict[str, int]:
    """Milliseconds since the epoch by `name@version`; REQUEST_INVALID for too many, or a time that is none."""
    if len(request.uses) > MAX_USES:
        message = f"{len(request.uses)} uses at once; at most {MAX_USES} are taken"
        raise SloraError(Reason.REQUEST_INVALID, message, field="uses", limit=MAX_USES)
    times = {}
    for use in request.uses:
        try:
            times[use.adapter_id] = use.last_use_time.ToMilliseconds()
        except ValueError as error:
            message = f"the last_use_time of {use.adapter_id[:160]!r} is no time: {error}"
            raise SloraError(Reason.REQUEST_INVALID, message, field="last_use_time") from error
    return times


def inspection_message(found: Inspection, base: BaseModel) -> pb.ValidateAdapterResponse:
    """What was found of an adapter."""
    adapter = None
    if found.layout is not None:
        adapter = adapter_pb2.Adapter(
            digest=found.digest,
            rank=found.layout.max_rank,
            target_modules=[f"TARGET_MODULE_{module.name}" for module in found.layout.target_modules],
            packed_bytes=found.layout.packed_bytes,
            base_model=base.name,
        )
    fit = pb.AdapterFit(
        stated_base_model=found.fit.stated_base_model,
        min_layers=found.fit.min_layers,
        modules=[_module_message(module) for module in found.fit.modules],
        base_model=base.name,
        base_layers=base.num_layers,
        fits=found.fit.fits,
    )
    problems = [pb.AdapterProblem(reason=error.reason.name, message=error.message) for error in found.problems]
    return pb.ValidateAdapterResponse(problems=problems, fit=fit, adapter=adapter)


def _module_message(module: ModuleFit) -> pb.ModuleWidths:
    return pb.ModuleWidths(
        target_module=f"TARGET_MODULE_{module.module.name}",
        ranks=module.ranks,
        in_features=module.in_features,
        out_features=module.out_features,
        base_in_features=module.base_in_features,
        base_out_features=module.base_out_features,
    )


def replicas_message(membership: Membership) -> pb.ListReplicasResponse:
    """The replicas, as one of them sees it."""
    replicas = [
        pb.Replica(
            replica_id=replica.replica_id,
            address=replica.address,
            weight=replica.arena_bytes,
            is_draining=replica.is_draining,
            arena=pb.Arena(
                arena_id=bytes.fromhex(replica.arena_id), path=replica.arena_path, num_bytes=replica.arena_bytes
            ),
        )
        for replica in membership.replicas
    ]
    return pb.ListReplicasResponse(replicas=replicas, num_homes=membership.num_homes, is_current=membership.is_current)
