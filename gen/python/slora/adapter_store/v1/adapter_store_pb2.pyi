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
    __slots__ = ("name", "source_uri", "tenant")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SOURCE_URI_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    name: str
    source_uri: str
    tenant: str
    def __init__(self, name: _Optional[str] = ..., source_uri: _Optional[str] = ..., tenant: _Optional[str] = ...) -> None: ...

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
    __slots__ = ("name", "tenant")
    NAME_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    name: str
    tenant: str
    def __init__(self, name: _Optional[str] = ..., tenant: _Optional[str] = ...) -> None: ...

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
    __slots__ = ("digest", "offset")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    digest: str
    offset: int
    def __init__(self, digest: _Optional[str] = ..., offset: _Optional[int] = ...) -> None: ...

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
    __slots__ = ("digest", "copied")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    COPIED_FIELD_NUMBER: _ClassVar[int]
    digest: str
    copied: CopiedExtent
    def __init__(self, digest: _Optional[str] = ..., copied: _Optional[_Union[CopiedExtent, _Mapping]] = ...) -> None: ...

class CopiedExtent(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ShareAdapterResponse(_message.Message):
    __slots__ = ("manifest", "arena", "offset")
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    ARENA_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    manifest: _adapter_pb2.PackedManifest
    arena: Arena
    offset: int
    def __init__(self, manifest: _Optional[_Union[_adapter_pb2.PackedManifest, _Mapping]] = ..., arena: _Optional[_Union[Arena, _Mapping]] = ..., offset: _Optional[int] = ...) -> None: ...

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
