"""Between the services' messages and this package's values."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, Literal, TypeVar

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from slora.adapter_store.v1 import adapter_pb2, adapter_store_pb2
from slora.engine.v1 import generation_pb2
from slora.gateway.v1 import inference_pb2

from slora_client.errors import SloraRequestError
from slora_client.options import REQUEST_OPTIONS, SAMPLING_OPTIONS, STOPPING_OPTIONS, GenerationOptions
from slora_client.values import (
    Adapter,
    ChatMessage,
    Chunk,
    FinishReason,
    Generation,
    Model,
    Prompt,
    TokenLogprob,
    TopLogprob,
    Usage,
)

M = TypeVar("M", bound=Message)

UPLOAD_CHUNK_BYTES = 2**20
PAGE_SIZE = 1000

_FINISH_REASONS: dict[int, FinishReason] = {
    generation_pb2.FINISH_REASON_STOP: "stop",
    generation_pb2.FINISH_REASON_LENGTH: "length",
}
_TARGET_PREFIX = "TARGET_MODULE_"
_STATES: dict[int, Literal["ready", "discovered"]] = {
    adapter_pb2.ADAPTER_STATE_READY: "ready",
    adapter_pb2.ADAPTER_STATE_DISCOVERED: "discovered",
}

_INTEGER_LIMITS = {
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
}

Progress = Callable[[int, int], None]


def to_generate_request(model: str, prompt: Prompt, options: GenerationOptions) -> inference_pb2.GenerateRequest:
    """The request. Raises ValueError or TypeError, naming the option, for what cannot be put into one."""
    given = {key: value for key, value in options.items() if value is not None}
    known = SAMPLING_OPTIONS | STOPPING_OPTIONS | REQUEST_OPTIONS
    if unknown := given.keys() - known:
        raise TypeError(f"unknown options: {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}")
    sampling = {key: value for key, value in given.items() if key in SAMPLING_OPTIONS}
    stopping = {key: value for key, value in given.items() if key in STOPPING_OPTIONS}
    stop = stopping.pop("stop", ())
    stopping["stop_strings"] = [stop] if isinstance(stop, str) else stop
    request = _message(
        inference_pb2.GenerateRequest,
        {"model": model, **{key: value for key, value in given.items() if key in REQUEST_OPTIONS}},
    )
    request.prompt.CopyFrom(_to_prompt(prompt))
    request.sampling.CopyFrom(_message(generation_pb2.SamplingParameters, sampling))
    request.stopping.CopyFrom(_message(generation_pb2.StoppingCriteria, stopping, {"stop_strings": "stop"}))
    return request


def _to_prompt(prompt: Prompt) -> generation_pb2.Prompt:
    if prompt is None:  # what a message takes for an empty list
        raise TypeError("prompt cannot be None: it is a text, token ids or chat messages")
    if isinstance(prompt, str):
        return generation_pb2.Prompt(text=prompt)
    if any(isinstance(part, ChatMessage) for part in prompt):
        messages = [
            _message(generation_pb2.ChatMessage, part._asdict() if isinstance(part, ChatMessage) else {"role": part})
            for part in prompt
        ]
        return generation_pb2.Prompt(chat=generation_pb2.Chat(messages=messages))
    token_ids = _message(generation_pb2.TokenIds, {"ids": prompt}, {"ids": "prompt"})
    return generation_pb2.Prompt(token_ids=token_ids)


def _message(kind: type[M], fields: Mapping[str, object], options: Mapping[str, str] | None = None) -> M:
    """`kind(**fields)`; an error names the field, or what `options` says that its option is called."""
    try:
        return kind(**fields)
    except (TypeError, ValueError):
        for name, value in fields.items():
            try:
                kind(**{name: value})
            except (TypeError, ValueError) as error:
                what = f"{(options or {}).get(name, name)} cannot be {reprlib.repr(value)}: {_why(kind, name, error)}"
                raise (TypeError if isinstance(error, TypeError) else ValueError)(what) from None
        raise


def _why(kind: type[M], name: str, error: TypeError | ValueError) -> str:
    """What protobuf says; for a number, or a list's, that its type cannot hold, what the type can."""
    limits = _INTEGER_LIMITS.get(kind.DESCRIPTOR.fields_by_name[name].cpp_type)
    if isinstance(error, TypeError) or limits is None:
        return str(error)
    return f"it is from {limits[0]} to {limits[1]}"


class ChunkReader:
    """Turns a stream's messages into chunks; each carries the model and request id of the first message."""

    def __init__(self) -> None:
        self._model = ""
        self._request_id = ""
        self.is_complete = False

    def read(self, response: inference_pb2.GenerateResponse) -> Chunk:
        """The next message as a chunk."""
        self._model = response.model or self._model
        self._request_id = response.request_id or self._request_id
        logprobs = tuple(map(_to_token_logprob, response.logprobs)) if response.logprobs else ()
        if not response.HasField("completion"):
            return Chunk(response.text, tuple(response.token_ids), logprobs, self._model, self._request_id)
        self.is_complete = True
        completion = response.completion
        return Chunk(
            response.text,
            tuple(response.token_ids),
            logprobs,
            self._model,
            self._request_id,
            finish_reason=_FINISH_REASONS.get(completion.finish_reason),
            stop_string=completion.stop_string if completion.HasField("stop_string") else None,
            stop_token_id=completion.stop_token_id if completion.HasField("stop_token_id") else None,
            usage=Usage(
                completion.usage.num_prompt_tokens,
                completion.usage.num_completion_tokens,
                completion.usage.num_cached_tokens,
            ),
        )

    def check_complete(self) -> None:
        """Raises `SloraRequestError` if the stream ended without saying how the generation ended."""
        if not self.is_complete:
            raise SloraRequestError("INTERNAL", "", "the stream ended before the generation was complete")


def join_chunks(chunks: Sequence[Chunk]) -> Generation:
    """The whole answer of a stream that ended well."""
    last = chunks[-1]
    if last.finish_reason is None or last.usage is None:
        raise SloraRequestError("INTERNAL", "", "the generation ended for a reason that this client does not know")
    return Generation(
        text="".join(chunk.text for chunk in chunks),
        token_ids=tuple(token_id for chunk in chunks for token_id in chunk.token_ids),
        logprobs=tuple(entry for chunk in chunks for entry in chunk.logprobs),
        model=last.model,
        request_id=last.request_id,
        finish_reason=last.finish_reason,
        stop_string=last.stop_string,
        stop_token_id=last.stop_token_id,
        usage=last.usage,
    )


def to_model(model: inference_pb2.Model) -> Model:
    """A model of ListModels."""
    return Model(
        name=model.name,
        adapter_id=model.adapter_id,
        base_model=model.base_model,
        rank=model.rank,
        create_time=_to_datetime(model.create_time) if model.HasField("create_time") else None,
        num_resident_engines=model.num_resident_engines,
    )


def to_pushed(
    response: adapter_store_pb2.RegisterAdapterResponse | adapter_store_pb2.UploadAdapterResponse,
) -> Adapter:
    """An adapter that was registered or uploaded, which knows whether it was there before."""
    return to_adapter(response.adapter, is_new=response.created)


def to_adapter(adapter: adapter_pb2.Adapter, is_new: bool | None = None) -> Adapter:
    """An adapter of the store."""
    return Adapter(
        name=adapter.name,
        version=adapter.version,
        adapter_id=adapter.adapter_id,
        digest=adapter.digest,
        rank=adapter.rank,
        target_modules=tuple(map(to_module_name, adapter.target_modules)),
        packed_bytes=adapter.packed_bytes,
        source_bytes=adapter.source_bytes,
        source_uri=adapter.source_uri,
        tenant=adapter.tenant,
        base_model=adapter.base_model,
        create_time=_to_datetime(adapter.create_time),
        state=_STATES.get(adapter.state, "ready"),
        aliases=tuple(adapter.aliases),
        labels=dict(adapter.labels),
        pinned=adapter.pinned,
        last_use_time=_to_datetime(adapter.last_use_time) if adapter.HasField("last_use_time") else None,
        is_new=is_new,
    )


def to_module_name(module: adapter_pb2.TargetModule) -> str:
    """Of `q k v o gate up down`."""
    return adapter_pb2.TargetModule.Name(module).removeprefix(_TARGET_PREFIX).lower()


class AdapterFiles:
    """An adapter directory in PEFT's layout, as the chunks of a stream.

    Raises FileNotFoundError, naming the file, if `directory` lacks one of the two. `on_progress` hears how many bytes
    of how many were taken from the files.
    """

    def __init__(
        self,
        directory: str | Path,
        config_part: Callable[[bytes], M],
        weights_part: Callable[[bytes], M],
        on_progress: Progress | None = None,
    ) -> None:
        self._on_progress = on_progress or (lambda done, total: None)
        self._files = (
            (Path(directory) / "adapter_config.json", config_part),
            (Path(directory) / "adapter_model.safetensors", weights_part),
        )
        if not Path(directory).is_dir():
            raise NotADirectoryError(f"{directory} is no directory; give one that PEFT's save_pretrained made")
        for path, _ in self._files:
            if not path.is_file():
                raise FileNotFoundError(f"{path} is missing; save the adapter with PEFT's save_pretrained")
        self.num_bytes = sum(path.stat().st_size for path, _ in self._files)

    def messages(self) -> Iterator[Message]:
        """The configuration, then the weights, in chunks of about 1 MiB."""
        done = 0
        for path, part in self._files:
            with path.open("rb") as file:
                for chunk in _chunks(file):
                    yield part(chunk)
                    done += len(chunk)
                    self._on_progress(done, self.num_bytes)


class UploadSource(AdapterFiles):
    """An adapter directory as the messages of an upload: the header first."""

    def __init__(
        self,
        name: str,
        directory: str | Path,
        tenant: str,
        labels: Mapping[str, str] | None = None,
        on_progress: Progress | None = None,
    ) -> None:
        request = adapter_store_pb2.UploadAdapterRequest
        super().__init__(
            directory,
            lambda chunk: request(config_chunk=chunk),
            lambda chunk: request(weights_chunk=chunk),
            on_progress,
        )
        header = adapter_store_pb2.UploadAdapterHeader(name=name, tenant=tenant, labels=labels or {})
        self._header = request(header=header)

    def messages(self) -> Iterator[Message]:
        """The header, then the chunks."""
        yield self._header
        yield from super().messages()


def _chunks(file: BinaryIO) -> Iterable[bytes]:
    while chunk := file.read(UPLOAD_CHUNK_BYTES):
        yield chunk


def _to_token_logprob(entry: generation_pb2.TokenLogprobs) -> TokenLogprob:
    top = tuple(TopLogprob(t.token_id, t.logprob, t.text) for t in entry.top)
    return TokenLogprob(entry.token_id, entry.logprob, entry.text, top)


def _to_datetime(timestamp: Timestamp) -> datetime:
    return timestamp.ToDatetime(tzinfo=UTC)
