import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from slora.engine.v1 import generation_pb2 as _generation_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class AdapterRef(_message.Message):
    __slots__ = ("adapter_id", "digest")
    ADAPTER_ID_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    adapter_id: str
    digest: str
    def __init__(self, adapter_id: _Optional[str] = ..., digest: _Optional[str] = ...) -> None: ...

class GenerateRequest(_message.Message):
    __slots__ = ("request_id", "adapter", "prompt", "sampling", "stopping", "num_logprobs", "priority", "tenant")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    STOPPING_FIELD_NUMBER: _ClassVar[int]
    NUM_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    adapter: AdapterRef
    prompt: _generation_pb2.Prompt
    sampling: _generation_pb2.SamplingParameters
    stopping: _generation_pb2.StoppingCriteria
    num_logprobs: int
    priority: int
    tenant: str
    def __init__(self, request_id: _Optional[str] = ..., adapter: _Optional[_Union[AdapterRef, _Mapping]] = ..., prompt: _Optional[_Union[_generation_pb2.Prompt, _Mapping]] = ..., sampling: _Optional[_Union[_generation_pb2.SamplingParameters, _Mapping]] = ..., stopping: _Optional[_Union[_generation_pb2.StoppingCriteria, _Mapping]] = ..., num_logprobs: _Optional[int] = ..., priority: _Optional[int] = ..., tenant: _Optional[str] = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("text", "token_ids", "logprobs", "completion")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_FIELD_NUMBER: _ClassVar[int]
    text: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedCompositeFieldContainer[_generation_pb2.TokenLogprobs]
    completion: _generation_pb2.Completion
    def __init__(self, text: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[_Union[_generation_pb2.TokenLogprobs, _Mapping]]] = ..., completion: _Optional[_Union[_generation_pb2.Completion, _Mapping]] = ...) -> None: ...

class GenerateManyRequest(_message.Message):
    __slots__ = ("start", "cancelled_number")
    START_FIELD_NUMBER: _ClassVar[int]
    CANCELLED_NUMBER_FIELD_NUMBER: _ClassVar[int]
    start: GenerationStart
    cancelled_number: int
    def __init__(self, start: _Optional[_Union[GenerationStart, _Mapping]] = ..., cancelled_number: _Optional[int] = ...) -> None: ...

class GenerationStart(_message.Message):
    __slots__ = ("number", "request", "timeout", "trace_headers")
    class TraceHeadersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_FIELD_NUMBER: _ClassVar[int]
    TRACE_HEADERS_FIELD_NUMBER: _ClassVar[int]
    number: int
    request: GenerateRequest
    timeout: _duration_pb2.Duration
    trace_headers: _containers.ScalarMap[str, str]
    def __init__(self, number: _Optional[int] = ..., request: _Optional[_Union[GenerateRequest, _Mapping]] = ..., timeout: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., trace_headers: _Optional[_Mapping[str, str]] = ...) -> None: ...

class GenerateManyResponse(_message.Message):
    __slots__ = ("updates",)
    UPDATES_FIELD_NUMBER: _ClassVar[int]
    updates: _containers.RepeatedCompositeFieldContainer[GenerationUpdate]
    def __init__(self, updates: _Optional[_Iterable[_Union[GenerationUpdate, _Mapping]]] = ...) -> None: ...

class GenerationUpdate(_message.Message):
    __slots__ = ("number", "response", "failure")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    RESPONSE_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    number: int
    response: GenerateResponse
    failure: bytes
    def __init__(self, number: _Optional[int] = ..., response: _Optional[_Union[GenerateResponse, _Mapping]] = ..., failure: _Optional[bytes] = ...) -> None: ...

class PrefetchAdapterRequest(_message.Message):
    __slots__ = ("adapter",)
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    adapter: AdapterRef
    def __init__(self, adapter: _Optional[_Union[AdapterRef, _Mapping]] = ...) -> None: ...

class PrefetchAdapterResponse(_message.Message):
    __slots__ = ("load_time",)
    LOAD_TIME_FIELD_NUMBER: _ClassVar[int]
    load_time: _duration_pb2.Duration
    def __init__(self, load_time: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class WatchStateRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WatchStateResponse(_message.Message):
    __slots__ = ("profile", "load", "loaded_adapters", "evicted_digests", "loading_digests")
    PROFILE_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    LOADED_ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    EVICTED_DIGESTS_FIELD_NUMBER: _ClassVar[int]
    LOADING_DIGESTS_FIELD_NUMBER: _ClassVar[int]
    profile: EngineProfile
    load: EngineLoad
    loaded_adapters: _containers.RepeatedCompositeFieldContainer[AdapterRef]
    evicted_digests: _containers.RepeatedScalarFieldContainer[str]
    loading_digests: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, profile: _Optional[_Union[EngineProfile, _Mapping]] = ..., load: _Optional[_Union[EngineLoad, _Mapping]] = ..., loaded_adapters: _Optional[_Iterable[_Union[AdapterRef, _Mapping]]] = ..., evicted_digests: _Optional[_Iterable[str]] = ..., loading_digests: _Optional[_Iterable[str]] = ...) -> None: ...

class EngineProfile(_message.Message):
    __slots__ = ("engine_id", "base_model", "max_model_len", "max_running", "num_pages")
    ENGINE_ID_FIELD_NUMBER: _ClassVar[int]
    BASE_MODEL_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    MAX_RUNNING_FIELD_NUMBER: _ClassVar[int]
    NUM_PAGES_FIELD_NUMBER: _ClassVar[int]
    engine_id: str
    base_model: str
    max_model_len: int
    max_running: int
    num_pages: int
    def __init__(self, engine_id: _Optional[str] = ..., base_model: _Optional[str] = ..., max_model_len: _Optional[int] = ..., max_running: _Optional[int] = ..., num_pages: _Optional[int] = ...) -> None: ...

class EngineLoad(_message.Message):
    __slots__ = ("num_running", "num_waiting", "num_free_pages", "num_kv_pages", "num_adapter_pages", "num_evictable_pages", "draining", "num_cached_pages")
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    NUM_FREE_PAGES_FIELD_NUMBER: _ClassVar[int]
    NUM_KV_PAGES_FIELD_NUMBER: _ClassVar[int]
    NUM_ADAPTER_PAGES_FIELD_NUMBER: _ClassVar[int]
    NUM_EVICTABLE_PAGES_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    NUM_CACHED_PAGES_FIELD_NUMBER: _ClassVar[int]
    num_running: int
    num_waiting: int
    num_free_pages: int
    num_kv_pages: int
    num_adapter_pages: int
    num_evictable_pages: int
    draining: bool
    num_cached_pages: int
    def __init__(self, num_running: _Optional[int] = ..., num_waiting: _Optional[int] = ..., num_free_pages: _Optional[int] = ..., num_kv_pages: _Optional[int] = ..., num_adapter_pages: _Optional[int] = ..., num_evictable_pages: _Optional[int] = ..., draining: _Optional[bool] = ..., num_cached_pages: _Optional[int] = ...) -> None: ...
