import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class AdapterState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ADAPTER_STATE_UNSPECIFIED: _ClassVar[AdapterState]
    ADAPTER_STATE_READY: _ClassVar[AdapterState]
    ADAPTER_STATE_DELETED: _ClassVar[AdapterState]
    ADAPTER_STATE_DISCOVERED: _ClassVar[AdapterState]

class TargetModule(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TARGET_MODULE_UNSPECIFIED: _ClassVar[TargetModule]
    TARGET_MODULE_Q: _ClassVar[TargetModule]
    TARGET_MODULE_K: _ClassVar[TargetModule]
    TARGET_MODULE_V: _ClassVar[TargetModule]
    TARGET_MODULE_O: _ClassVar[TargetModule]
    TARGET_MODULE_GATE: _ClassVar[TargetModule]
    TARGET_MODULE_UP: _ClassVar[TargetModule]
    TARGET_MODULE_DOWN: _ClassVar[TargetModule]

class ElementType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ELEMENT_TYPE_UNSPECIFIED: _ClassVar[ElementType]
    ELEMENT_TYPE_FLOAT32: _ClassVar[ElementType]
    ELEMENT_TYPE_FLOAT16: _ClassVar[ElementType]
    ELEMENT_TYPE_BFLOAT16: _ClassVar[ElementType]
ADAPTER_STATE_UNSPECIFIED: AdapterState
ADAPTER_STATE_READY: AdapterState
ADAPTER_STATE_DELETED: AdapterState
ADAPTER_STATE_DISCOVERED: AdapterState
TARGET_MODULE_UNSPECIFIED: TargetModule
TARGET_MODULE_Q: TargetModule
TARGET_MODULE_K: TargetModule
TARGET_MODULE_V: TargetModule
TARGET_MODULE_O: TargetModule
TARGET_MODULE_GATE: TargetModule
TARGET_MODULE_UP: TargetModule
TARGET_MODULE_DOWN: TargetModule
ELEMENT_TYPE_UNSPECIFIED: ElementType
ELEMENT_TYPE_FLOAT32: ElementType
ELEMENT_TYPE_FLOAT16: ElementType
ELEMENT_TYPE_BFLOAT16: ElementType

class Adapter(_message.Message):
    __slots__ = ("name", "version", "adapter_id", "digest", "state", "rank", "target_modules", "packed_bytes", "source_bytes", "source_uri", "tenant", "base_model", "create_time", "aliases", "labels", "pinned", "last_use_time")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_ID_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    TARGET_MODULES_FIELD_NUMBER: _ClassVar[int]
    PACKED_BYTES_FIELD_NUMBER: _ClassVar[int]
    SOURCE_BYTES_FIELD_NUMBER: _ClassVar[int]
    SOURCE_URI_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    BASE_MODEL_FIELD_NUMBER: _ClassVar[int]
    CREATE_TIME_FIELD_NUMBER: _ClassVar[int]
    ALIASES_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    LAST_USE_TIME_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: int
    adapter_id: str
    digest: str
    state: AdapterState
    rank: int
    target_modules: _containers.RepeatedScalarFieldContainer[TargetModule]
    packed_bytes: int
    source_bytes: int
    source_uri: str
    tenant: str
    base_model: str
    create_time: _timestamp_pb2.Timestamp
    aliases: _containers.RepeatedScalarFieldContainer[str]
    labels: _containers.ScalarMap[str, str]
    pinned: bool
    last_use_time: _timestamp_pb2.Timestamp
    def __init__(self, name: _Optional[str] = ..., version: _Optional[int] = ..., adapter_id: _Optional[str] = ..., digest: _Optional[str] = ..., state: _Optional[_Union[AdapterState, str]] = ..., rank: _Optional[int] = ..., target_modules: _Optional[_Iterable[_Union[TargetModule, str]]] = ..., packed_bytes: _Optional[int] = ..., source_bytes: _Optional[int] = ..., source_uri: _Optional[str] = ..., tenant: _Optional[str] = ..., base_model: _Optional[str] = ..., create_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., aliases: _Optional[_Iterable[str]] = ..., labels: _Optional[_Mapping[str, str]] = ..., pinned: _Optional[bool] = ..., last_use_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class PackedManifest(_message.Message):
    __slots__ = ("digest", "packed_digest", "element_type", "tile_elems", "num_layers", "layer_elems", "packed_bytes", "layers", "tp_rank", "tp_size")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    PACKED_DIGEST_FIELD_NUMBER: _ClassVar[int]
    ELEMENT_TYPE_FIELD_NUMBER: _ClassVar[int]
    TILE_ELEMS_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    LAYER_ELEMS_FIELD_NUMBER: _ClassVar[int]
    PACKED_BYTES_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    TP_RANK_FIELD_NUMBER: _ClassVar[int]
    TP_SIZE_FIELD_NUMBER: _ClassVar[int]
    digest: str
    packed_digest: str
    element_type: ElementType
    tile_elems: int
    num_layers: int
    layer_elems: int
    packed_bytes: int
    layers: _containers.RepeatedCompositeFieldContainer[PackedLayer]
    tp_rank: int
    tp_size: int
    def __init__(self, digest: _Optional[str] = ..., packed_digest: _Optional[str] = ..., element_type: _Optional[_Union[ElementType, str]] = ..., tile_elems: _Optional[int] = ..., num_layers: _Optional[int] = ..., layer_elems: _Optional[int] = ..., packed_bytes: _Optional[int] = ..., layers: _Optional[_Iterable[_Union[PackedLayer, _Mapping]]] = ..., tp_rank: _Optional[int] = ..., tp_size: _Optional[int] = ...) -> None: ...

class PackedLayer(_message.Message):
    __slots__ = ("modules",)
    MODULES_FIELD_NUMBER: _ClassVar[int]
    modules: _containers.RepeatedCompositeFieldContainer[PackedModule]
    def __init__(self, modules: _Optional[_Iterable[_Union[PackedModule, _Mapping]]] = ...) -> None: ...

class PackedModule(_message.Message):
    __slots__ = ("target_module", "rank", "in_features", "out_features", "lora_a_offset", "lora_b_offset")
    TARGET_MODULE_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    IN_FEATURES_FIELD_NUMBER: _ClassVar[int]
    OUT_FEATURES_FIELD_NUMBER: _ClassVar[int]
    LORA_A_OFFSET_FIELD_NUMBER: _ClassVar[int]
    LORA_B_OFFSET_FIELD_NUMBER: _ClassVar[int]
    target_module: TargetModule
    rank: int
    in_features: int
    out_features: int
    lora_a_offset: int
    lora_b_offset: int
    def __init__(self, target_module: _Optional[_Union[TargetModule, str]] = ..., rank: _Optional[int] = ..., in_features: _Optional[int] = ..., out_features: _Optional[int] = ..., lora_a_offset: _Optional[int] = ..., lora_b_offset: _Optional[int] = ...) -> None: ...
