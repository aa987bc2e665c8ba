import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from slora.adapter_store.v1 import adapter_pb2 as _adapter_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class WatchEvent(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WATCH_EVENT_UNSPECIFIED: _ClassVar[WatchEvent]
    WATCH_EVENT_REGISTERED: _ClassVar[WatchEvent]
    WATCH_EVENT_DELETED: _ClassVar[WatchEvent]
    WATCH_EVENT_SYNCED: _ClassVar[WatchEvent]
    WATCH_EVENT_RESET: _ClassVar[WatchEvent]
WATCH_EVENT_UNSPECIFIED: WatchEvent
WATCH_EVENT_REGISTERED: WatchEvent
WATCH_EVENT_DELETED: WatchEvent
WATCH_EVENT_SYNCED: WatchEvent
WATCH_EVENT_RESET: WatchEvent

class RegisterAdapterRequest(_message.Message):
    __slots__ = ("name", "source_uri", "tenant", "labels")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    SOURCE_URI_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    name: str
    source_uri: str
    tenant: str
    labels: _containers.ScalarMap[str, str]
    def __init__(self, name: _Optional[str] = ..., source_uri: _Optional[str] = ..., tenant: _Optional[str] = ..., labels: _Optional[_Mapping[str, str]] = ...) -> None: ...

class RegisterAdapterResponse(_message.Message):
    __slots__ = ("adapter", "created")
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    adapter: _adapter_pb2.Adapter
    created: bool
    def __init__(self, adapter: _Optional[_Union[_adapter_pb2.Adapter, _Mapping]] = ..., created: _Optional[bool] = ...) -> None: ...

class UploadAdapterRequest(_message.Message):
    __slots__ = ("header", "config_chunk", "weights_chunk")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CONFIG_CHUNK_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_CHUNK_FIELD_NUMBER: _ClassVar[int]
    header: UploadAdapterHeader
    config_chunk: bytes
    weights_chunk: bytes
    def __init__(self, header: _Optional[_Union[UploadAdapterHeader, _Mapping]] = ..., config_chunk: _Optional[bytes] = ..., weights_chunk: _Optional[bytes] = ...) -> None: ...

class UploadAdapterHeader(_message.Message):
    __slots__ = ("name", "tenant", "labels")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    name: str
    tenant: str
    labels: _containers.ScalarMap[str, str]
    def __init__(self, name: _Optional[str] = ..., tenant: _Optional[str] = ..., labels: _Optional[_Mapping[str, str]] = ...) -> None: ...

class UploadAdapterResponse(_message.Message):
    __slots__ = ("adapter", "created")
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    adapter: _adapter_pb2.Adapter
    created: bool
    def __init__(self, adapter: _Optional[_Union[_adapter_pb2.Adapter, _Mapping]] = ..., created: _Optional[bool] = ...) -> None: ...

class GetAdapterRequest(_message.Message):
    __slots__ = ("adapter_id",)
    ADAPTER_ID_FIELD_NUMBER: _ClassVar[int]
    adapter_id: str
    def __init__(self, adapter_id: _Optional[str] = ...) -> None: ...

class GetAdapterResponse(_message.Message):
    __slots__ = ("adapter",)
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    adapter: _adapter_pb2.Adapter
    def __init__(self, adapter: _Optional[_Union[_adapter_pb2.Adapter, _Mapping]] = ...) -> None: ...

class ListAdaptersRequest(_message.Message):
    __slots__ = ("page_size", "page_token", "name_prefix", "tenant")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    NAME_PREFIX_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    name_prefix: str
    tenant: str
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ..., name_prefix: _Optional[str] = ..., tenant: _Optional[str] = ...) -> None: ...

class ListAdaptersResponse(_message.Message):
    __slots__ = ("adapters", "next_page_token")
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    adapters: _containers.RepeatedCompositeFieldContainer[_adapter_pb2.Adapter]
    next_page_token: str
    def __init__(self, adapters: _Optional[_Iterable[_Union[_adapter_pb2.Adapter, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class DeleteAdapterRequest(_message.Message):
    __slots__ = ("adapter_id",)
    ADAPTER_ID_FIELD_NUMBER: _ClassVar[int]
    adapter_id: str
    def __init__(self, adapter_id: _Optional[str] = ...) -> None: ...

class DeleteAdapterResponse(_message.Message):
    __slots__ = ("num_deleted",)
    NUM_DELETED_FIELD_NUMBER: _ClassVar[int]
    num_deleted: int
    def __init__(self, num_deleted: _Optional[int] = ...) -> None: ...

class FetchAdapterRequest(_message.Message):
    __slots__ = ("digest", "offset", "tp_rank", "tp_size")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    TP_RANK_FIELD_NUMBER: _ClassVar[int]
    TP_SIZE_FIELD_NUMBER: _ClassVar[int]
    digest: str
    offset: int
    tp_rank: int
    tp_size: int
    def __init__(self, digest: _Optional[str] = ..., offset: _Optional[int] = ..., tp_rank: _Optional[int] = ..., tp_size: _Optional[int] = ...) -> None: ...

class FetchAdapterResponse(_message.Message):
    __slots__ = ("manifest", "chunk", "arena_id")
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    ARENA_ID_FIELD_NUMBER: _ClassVar[int]
    manifest: _adapter_pb2.PackedManifest
    chunk: bytes
    arena_id: bytes
    def __init__(self, manifest: _Optional[_Union[_adapter_pb2.PackedManifest, _Mapping]] = ..., chunk: _Optional[bytes] = ..., arena_id: _Optional[bytes] = ...) -> None: ...

class ShareAdapterRequest(_message.Message):
    __slots__ = ("digest", "copied", "only_resident", "tp_rank", "tp_size")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    COPIED_FIELD_NUMBER: _ClassVar[int]
    ONLY_RESIDENT_FIELD_NUMBER: _ClassVar[int]
    TP_RANK_FIELD_NUMBER: _ClassVar[int]
    TP_SIZE_FIELD_NUMBER: _ClassVar[int]
    digest: str
    copied: CopiedExtent
    only_resident: bool
    tp_rank: int
    tp_size: int
    def __init__(self, digest: _Optional[str] = ..., copied: _Optional[_Union[CopiedExtent, _Mapping]] = ..., only_resident: _Optional[bool] = ..., tp_rank: _Optional[int] = ..., tp_size: _Optional[int] = ...) -> None: ...

class CopiedExtent(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ShareAdapterResponse(_message.Message):
    __slots__ = ("manifest", "arena", "offset", "residency_id", "residency_word")
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    ARENA_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    RESIDENCY_ID_FIELD_NUMBER: _ClassVar[int]
    RESIDENCY_WORD_FIELD_NUMBER: _ClassVar[int]
    manifest: _adapter_pb2.PackedManifest
    arena: Arena
    offset: int
    residency_id: int
    residency_word: int
    def __init__(self, manifest: _Optional[_Union[_adapter_pb2.PackedManifest, _Mapping]] = ..., arena: _Optional[_Union[Arena, _Mapping]] = ..., offset: _Optional[int] = ..., residency_id: _Optional[int] = ..., residency_word: _Optional[int] = ...) -> None: ...

class ReportCopiesRequest(_message.Message):
    __slots__ = ("copies",)
    COPIES_FIELD_NUMBER: _ClassVar[int]
    copies: _containers.RepeatedCompositeFieldContainer[CopiedAdapter]
    def __init__(self, copies: _Optional[_Iterable[_Union[CopiedAdapter, _Mapping]]] = ...) -> None: ...

class CopiedAdapter(_message.Message):
    __slots__ = ("digest", "tp_rank", "tp_size", "num_copies")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    TP_RANK_FIELD_NUMBER: _ClassVar[int]
    TP_SIZE_FIELD_NUMBER: _ClassVar[int]
    NUM_COPIES_FIELD_NUMBER: _ClassVar[int]
    digest: str
    tp_rank: int
    tp_size: int
    num_copies: int
    def __init__(self, digest: _Optional[str] = ..., tp_rank: _Optional[int] = ..., tp_size: _Optional[int] = ..., num_copies: _Optional[int] = ...) -> None: ...

class ReportCopiesResponse(_message.Message):
    __slots__ = ("num_noted",)
    NUM_NOTED_FIELD_NUMBER: _ClassVar[int]
    num_noted: int
    def __init__(self, num_noted: _Optional[int] = ...) -> None: ...

class Arena(_message.Message):
    __slots__ = ("arena_id", "path", "num_bytes")
    ARENA_ID_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    arena_id: bytes
    path: str
    num_bytes: int
    def __init__(self, arena_id: _Optional[bytes] = ..., path: _Optional[str] = ..., num_bytes: _Optional[int] = ...) -> None: ...

class WatchAdaptersRequest(_message.Message):
    __slots__ = ("resume_token",)
    RESUME_TOKEN_FIELD_NUMBER: _ClassVar[int]
    resume_token: str
    def __init__(self, resume_token: _Optional[str] = ...) -> None: ...

class WatchAdaptersResponse(_message.Message):
    __slots__ = ("event", "adapter", "resume_token")
    EVENT_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    RESUME_TOKEN_FIELD_NUMBER: _ClassVar[int]
    event: WatchEvent
    adapter: _adapter_pb2.Adapter
    resume_token: str
    def __init__(self, event: _Optional[_Union[WatchEvent, str]] = ..., adapter: _Optional[_Union[_adapter_pb2.Adapter, _Mapping]] = ..., resume_token: _Optional[str] = ...) -> None: ...

class SetAliasRequest(_message.Message):
    __slots__ = ("name", "alias", "version", "expected_version")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ALIAS_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_VERSION_FIELD_NUMBER: _ClassVar[int]
    name: str
    alias: str
    version: int
    expected_version: int
    def __init__(self, name: _Optional[str] = ..., alias: _Optional[str] = ..., version: _Optional[int] = ..., expected_version: _Optional[int] = ...) -> None: ...

class SetAliasResponse(_message.Message):
    __slots__ = ("adapter",)
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    adapter: _adapter_pb2.Adapter
    def __init__(self, adapter: _Optional[_Union[_adapter_pb2.Adapter, _Mapping]] = ...) -> None: ...

class DeleteAliasRequest(_message.Message):
    __slots__ = ("name", "alias", "expected_version")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ALIAS_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_VERSION_FIELD_NUMBER: _ClassVar[int]
    name: str
    alias: str
    expected_version: int
    def __init__(self, name: _Optional[str] = ..., alias: _Optional[str] = ..., expected_version: _Optional[int] = ...) -> None: ...

class DeleteAliasResponse(_message.Message):
    __slots__ = ("adapter",)
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    adapter: _adapter_pb2.Adapter
    def __init__(self, adapter: _Optional[_Union[_adapter_pb2.Adapter, _Mapping]] = ...) -> None: ...

class UpdateAdapterRequest(_message.Message):
    __slots__ = ("adapter_id", "set_labels", "remove_labels", "pinned")
    class SetLabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    ADAPTER_ID_FIELD_NUMBER: _ClassVar[int]
    SET_LABELS_FIELD_NUMBER: _ClassVar[int]
    REMOVE_LABELS_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    adapter_id: str
    set_labels: _containers.ScalarMap[str, str]
    remove_labels: _containers.RepeatedScalarFieldContainer[str]
    pinned: bool
    def __init__(self, adapter_id: _Optional[str] = ..., set_labels: _Optional[_Mapping[str, str]] = ..., remove_labels: _Optional[_Iterable[str]] = ..., pinned: _Optional[bool] = ...) -> None: ...

class UpdateAdapterResponse(_message.Message):
    __slots__ = ("adapter",)
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    adapter: _adapter_pb2.Adapter
    def __init__(self, adapter: _Optional[_Union[_adapter_pb2.Adapter, _Mapping]] = ...) -> None: ...

class ReportAdapterUseRequest(_message.Message):
    __slots__ = ("uses",)
    USES_FIELD_NUMBER: _ClassVar[int]
    uses: _containers.RepeatedCompositeFieldContainer[AdapterUse]
    def __init__(self, uses: _Optional[_Iterable[_Union[AdapterUse, _Mapping]]] = ...) -> None: ...

class AdapterUse(_message.Message):
    __slots__ = ("adapter_id", "last_use_time")
    ADAPTER_ID_FIELD_NUMBER: _ClassVar[int]
    LAST_USE_TIME_FIELD_NUMBER: _ClassVar[int]
    adapter_id: str
    last_use_time: _timestamp_pb2.Timestamp
    def __init__(self, adapter_id: _Optional[str] = ..., last_use_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class ReportAdapterUseResponse(_message.Message):
    __slots__ = ("num_noted",)
    NUM_NOTED_FIELD_NUMBER: _ClassVar[int]
    num_noted: int
    def __init__(self, num_noted: _Optional[int] = ...) -> None: ...

class SyncAdaptersRequest(_message.Message):
    __slots__ = ("source_uri", "tenant", "allow_empty")
    SOURCE_URI_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    ALLOW_EMPTY_FIELD_NUMBER: _ClassVar[int]
    source_uri: str
    tenant: str
    allow_empty: bool
    def __init__(self, source_uri: _Optional[str] = ..., tenant: _Optional[str] = ..., allow_empty: _Optional[bool] = ...) -> None: ...

class SyncAdaptersResponse(_message.Message):
    __slots__ = ("source_uri", "num_found", "num_added", "num_changed", "num_removed", "num_refused", "added", "changed", "removed", "refused", "kept")
    SOURCE_URI_FIELD_NUMBER: _ClassVar[int]
    NUM_FOUND_FIELD_NUMBER: _ClassVar[int]
    NUM_ADDED_FIELD_NUMBER: _ClassVar[int]
    NUM_CHANGED_FIELD_NUMBER: _ClassVar[int]
    NUM_REMOVED_FIELD_NUMBER: _ClassVar[int]
    NUM_REFUSED_FIELD_NUMBER: _ClassVar[int]
    ADDED_FIELD_NUMBER: _ClassVar[int]
    CHANGED_FIELD_NUMBER: _ClassVar[int]
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    KEPT_FIELD_NUMBER: _ClassVar[int]
    source_uri: str
    num_found: int
    num_added: int
    num_changed: int
    num_removed: int
    num_refused: int
    added: _containers.RepeatedScalarFieldContainer[str]
    changed: _containers.RepeatedScalarFieldContainer[str]
    removed: _containers.RepeatedScalarFieldContainer[str]
    refused: _containers.RepeatedCompositeFieldContainer[SyncRefusal]
    kept: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, source_uri: _Optional[str] = ..., num_found: _Optional[int] = ..., num_added: _Optional[int] = ..., num_changed: _Optional[int] = ..., num_removed: _Optional[int] = ..., num_refused: _Optional[int] = ..., added: _Optional[_Iterable[str]] = ..., changed: _Optional[_Iterable[str]] = ..., removed: _Optional[_Iterable[str]] = ..., refused: _Optional[_Iterable[_Union[SyncRefusal, _Mapping]]] = ..., kept: _Optional[_Iterable[str]] = ...) -> None: ...

class SyncRefusal(_message.Message):
    __slots__ = ("name", "reason", "message")
    NAME_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    name: str
    reason: str
    message: str
    def __init__(self, name: _Optional[str] = ..., reason: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...

class ValidateAdapterRequest(_message.Message):
    __slots__ = ("config_chunk", "weights_chunk")
    CONFIG_CHUNK_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_CHUNK_FIELD_NUMBER: _ClassVar[int]
    config_chunk: bytes
    weights_chunk: bytes
    def __init__(self, config_chunk: _Optional[bytes] = ..., weights_chunk: _Optional[bytes] = ...) -> None: ...

class ValidateAdapterResponse(_message.Message):
    __slots__ = ("problems", "fit", "adapter")
    PROBLEMS_FIELD_NUMBER: _ClassVar[int]
    FIT_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    problems: _containers.RepeatedCompositeFieldContainer[AdapterProblem]
    fit: AdapterFit
    adapter: _adapter_pb2.Adapter
    def __init__(self, problems: _Optional[_Iterable[_Union[AdapterProblem, _Mapping]]] = ..., fit: _Optional[_Union[AdapterFit, _Mapping]] = ..., adapter: _Optional[_Union[_adapter_pb2.Adapter, _Mapping]] = ...) -> None: ...

class AdapterProblem(_message.Message):
    __slots__ = ("reason", "message")
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    reason: str
    message: str
    def __init__(self, reason: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...

class AdapterFit(_message.Message):
    __slots__ = ("stated_base_model", "min_layers", "modules", "base_model", "base_layers", "fits")
    STATED_BASE_MODEL_FIELD_NUMBER: _ClassVar[int]
    MIN_LAYERS_FIELD_NUMBER: _ClassVar[int]
    MODULES_FIELD_NUMBER: _ClassVar[int]
    BASE_MODEL_FIELD_NUMBER: _ClassVar[int]
    BASE_LAYERS_FIELD_NUMBER: _ClassVar[int]
    FITS_FIELD_NUMBER: _ClassVar[int]
    stated_base_model: str
    min_layers: int
    modules: _containers.RepeatedCompositeFieldContainer[ModuleWidths]
    base_model: str
    base_layers: int
    fits: bool
    def __init__(self, stated_base_model: _Optional[str] = ..., min_layers: _Optional[int] = ..., modules: _Optional[_Iterable[_Union[ModuleWidths, _Mapping]]] = ..., base_model: _Optional[str] = ..., base_layers: _Optional[int] = ..., fits: _Optional[bool] = ...) -> None: ...

class ModuleWidths(_message.Message):
    __slots__ = ("target_module", "ranks", "in_features", "out_features", "base_in_features", "base_out_features")
    TARGET_MODULE_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    IN_FEATURES_FIELD_NUMBER: _ClassVar[int]
    OUT_FEATURES_FIELD_NUMBER: _ClassVar[int]
    BASE_IN_FEATURES_FIELD_NUMBER: _ClassVar[int]
    BASE_OUT_FEATURES_FIELD_NUMBER: _ClassVar[int]
    target_module: _adapter_pb2.TargetModule
    ranks: _containers.RepeatedScalarFieldContainer[int]
    in_features: int
    out_features: int
    base_in_features: int
    base_out_features: int
    def __init__(self, target_module: _Optional[_Union[_adapter_pb2.TargetModule, str]] = ..., ranks: _Optional[_Iterable[int]] = ..., in_features: _Optional[int] = ..., out_features: _Optional[int] = ..., base_in_features: _Optional[int] = ..., base_out_features: _Optional[int] = ...) -> None: ...

class ListReplicasRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListReplicasResponse(_message.Message):
    __slots__ = ("replicas", "num_homes", "is_current")
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    NUM_HOMES_FIELD_NUMBER: _ClassVar[int]
    IS_CURRENT_FIELD_NUMBER: _ClassVar[int]
    replicas: _containers.RepeatedCompositeFieldContainer[Replica]
    num_homes: int
    is_current: bool
    def __init__(self, replicas: _Optional[_Iterable[_Union[Replica, _Mapping]]] = ..., num_homes: _Optional[int] = ..., is_current: _Optional[bool] = ...) -> None: ...

class Replica(_message.Message):
    __slots__ = ("replica_id", "address", "weight", "is_draining", "arena")
    REPLICA_ID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    IS_DRAINING_FIELD_NUMBER: _ClassVar[int]
    ARENA_FIELD_NUMBER: _ClassVar[int]
    replica_id: str
    address: str
    weight: int
    is_draining: bool
    arena: Arena
    def __init__(self, replica_id: _Optional[str] = ..., address: _Optional[str] = ..., weight: _Optional[int] = ..., is_draining: _Optional[bool] = ..., arena: _Optional[_Union[Arena, _Mapping]] = ...) -> None: ...
