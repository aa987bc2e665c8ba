"""vLLM's routes that load and unload adapters: whom what the store complains of is put down to."""

from __future__ import annotations

import json

import pytest
from starlette.requests import Request
from starlette.types import Message

from services.common.errors import FieldError, Reason, SloraError, Status
from services.gateway.http.adapter_updates import AdapterUpdates
from services.gateway.http.errors import ApiError


class RefusingRegistry:
    """Refuses everything for one reason."""

    def __init__(self, error: SloraError) -> None:
        self.error = error

    async def register(self, name: str, source_uri: str) -> str:
        raise self.error

    async def delete(self, adapter_id: str) -> int:
        raise self.error


def request_of(**body: str) -> Request:
    async def receive() -> Message:
        return {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}

    headers = [(b"content-type", b"application/json")]
    return Request({"type": "http", "method": "POST", "path": "/", "headers": headers}, receive)


async def refusal(error: SloraError, lora_path: str | None = "s3://bucket/bard/") -> ApiError:
    """What a caller is told who loads an adapter, or unloads one where there is no path."""
    updates = AdapterUpdates(RefusingRegistry(error), is_allowed=True, max_body_bytes=1000)
    if lora_path is None:
        call = updates.unload(request_of(lora_name="bard"))
    else:
        call = updates.load(request_of(lora_name="bard", lora_path=lora_path))
    with pytest.raises(ApiError) as refused:
        await call
    return refused.value


# What engines alone say, and what is about aliases and syncs, a caller of these routes cannot meet.
ELSEWHERE = {Reason.ADAPTER_INCOMPATIBLE, Reason.CHAT_TEMPLATE_MISSING, Reason.SYNC_EMPTY}
ABOUT_FILES = [
    reason
    for reason in Reason
    if reason.status is Status.FAILED_PRECONDITION and reason not in ELSEWHERE and not reason.name.startswith("ALIAS_")
]


@pytest.mark.parametrize("reason", [*ABOUT_FILES, Reason.SOURCE_NOT_FOUND, Reason.ADAPTER_TOO_LARGE])
async def test_what_is_wrong_with_the_files_is_put_down_to_the_path(reason: Reason) -> None:
    told = await refusal(SloraError(reason, "what is right"))
    assert (told.code, told.message, told.param) == (reason.name.lower(), "what is right", "lora_path")


@pytest.mark.parametrize("reason", [Reason.ADAPTER_NOT_FOUND, Reason.ADAPTER_NAME_INVALID])
async def test_a_name_is_to_blame_in_both(reason: Reason) -> None:
    for path in ("s3://bucket/bard/", None):
        assert (await refusal(SloraError(reason, "what is right"), path)).param == "lora_name"


async def test_a_field_is_called_what_the_caller_called_it() -> None:
    told = await refusal(FieldError(Reason.SOURCE_URI_INVALID, "source_uri", "has no bucket"))
    assert (told.param, told.message) == ("lora_path", "lora_path has no bucket")


@pytest.mark.parametrize("reason", [Reason.ADAPTER_STORE_UNAVAILABLE, Reason.CATALOGUE_UNAVAILABLE, Reason.INTERNAL])
async def test_what_is_not_the_callers_fault_names_none(reason: Reason) -> None:
    assert (await refusal(SloraError(reason, "later"))).param is None
