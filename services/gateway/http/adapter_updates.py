"""vLLM's `/v1/load_lora_adapter` and `/v1/unload_lora_adapter`, as registration in the adapter store."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Protocol

import msgspec
from msgspec import Struct
from starlette.requests import Request
from starlette.responses import PlainTextResponse

from services.common.errors import Reason, SloraError
from services.gateway.http.bodies import read_body
from services.gateway.http.errors import ApiError, invalid, to_api_error


class AdapterRegistry(Protocol):
    """What is asked of the adapter store; raises `SloraError`."""

    async def register(self, name: str, source_uri: str) -> str:
        """Registers the adapter under `s3://bucket/prefix/`; returns `name@version`."""
        ...

    async def delete(self, adapter_id: str) -> int:
        """Deletes `name@version`, or every version of `name`; returns how many."""
        ...


class LoadBody(Struct, forbid_unknown_fields=True):
    """What is to be loaded."""

    lora_name: str
    lora_path: str
    base_model_name: str | None = None
    load_inplace: bool | None = None
    """A name may always get a new version."""


class UnloadBody(Struct, forbid_unknown_fields=True):
    """What is to be unloaded."""

    lora_name: str
    lora_int_id: int | None = None


_NAME, _PATH = "lora_name", "lora_path"

_PARAMETERS: Mapping[Reason, str] = {
    Reason.ADAPTER_NAME_INVALID: _NAME,
    Reason.ADAPTER_NOT_FOUND: _NAME,
    Reason.SOURCE_URI_INVALID: _PATH,
    Reason.SOURCE_NOT_FOUND: _PATH,
    Reason.ADAPTER_FILE_INVALID: _PATH,
    Reason.ADAPTER_CONFIG_INVALID: _PATH,
    Reason.ADAPTER_UNSUPPORTED: _PATH,
    Reason.ADAPTER_RANK_INVALID: _PATH,
    Reason.ADAPTER_TENSORS_INVALID: _PATH,
    Reason.ADAPTER_NOT_FINITE: _PATH,
    Reason.ADAPTER_BASE_MISMATCH: _PATH,
    Reason.ADAPTER_TOO_LARGE: _PATH,
    Reason.ADAPTER_CHANGED: _PATH,
}
"""Which parameter is to blame for what the store complains of: the name, or what lies at the path."""

_load_decoder = msgspec.json.Decoder(LoadBody)
_unload_decoder = msgspec.json.Decoder(UnloadBody)


class AdapterUpdates:
    """Off unless it is allowed: whoever can ask for generations could otherwise change what others get."""

    def __init__(self, registry: AdapterRegistry, is_allowed: bool, max_body_bytes: int) -> None:
        self._registry = registry
        self._is_allowed = is_allowed
        self._max_body_bytes = max_body_bytes

    async def load(self, request: Request) -> PlainTextResponse:
        """Registers `lora_path` (an S3 URI) as `lora_name`. Idempotent: the same content gives the version it has."""
        self._check_allowed()
        body = await read_body(request, _load_decoder, self._max_body_bytes)
        if not body.lora_path.startswith("s3://"):
            raise invalid("lora_path", "lora_path is s3://bucket/prefix/, where the adapter's two files lie")
        with _put_down_to_parameters():
            adapter_id = await self._registry.register(body.lora_name, body.lora_path)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully as {adapter_id}.")

    async def unload(self, request: Request) -> PlainTextResponse:
        """Deletes `lora_name` (every version, or with `@version` one) from the catalogue."""
        self._check_allowed()
        body = await read_body(request, _unload_decoder, self._max_body_bytes)
        with _put_down_to_parameters():
            await self._registry.delete(body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    def _check_allowed(self) -> None:
        if not self._is_allowed:
            message = (
                "changing adapters over HTTP is off; start the gateway with --http-allow-adapter-updates true, or use "
                "the adapter store's own API"
            )
            raise ApiError(403, message, "adapter_updates_off")


@contextlib.contextmanager
def _put_down_to_parameters() -> Iterator[None]:
    try:
        yield
    except SloraError as error:
        answered = to_api_error(error, {"source_uri": _PATH})
        answered.param = _PARAMETERS.get(error.reason, answered.param)
        raise answered from None
