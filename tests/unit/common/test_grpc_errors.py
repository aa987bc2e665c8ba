"""Errors as statuses: what is in them, and that they fit where they travel."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from services.common.errors import Reason, SloraError
from services.common.grpc_errors import abort, from_store_error, to_grpc_status


def decoded(status: grpc.Status) -> tuple[status_pb2.Status, error_details_pb2.ErrorInfo]:
    ((_, packed),) = status.trailing_metadata
    whole, info = status_pb2.Status(), error_details_pb2.ErrorInfo()
    whole.ParseFromString(packed)
    assert whole.details[0].Unpack(info)
    return whole, info


def test_a_status_says_reason_message_and_metadata() -> None:
    status = to_grpc_status(SloraError(Reason.PROMPT_EMPTY, "the prompt is empty", field="prompt", limit=3))
    whole, info = decoded(status)
    assert status.code is grpc.StatusCode.INVALID_ARGUMENT
    assert whole.message == status.details == "the prompt is empty"
    assert (info.reason, info.domain, dict(info.metadata)) == (
        "PROMPT_EMPTY",
        "slora",
        {"field": "prompt", "limit": "3"},
    )


def test_what_a_caller_sent_does_not_make_it_too_large() -> None:
    status = to_grpc_status(SloraError(Reason.ADAPTER_DIGEST_INVALID, "ä" * 100_000, adapter_id="ü" * 100_000))
    whole, info = decoded(status)
    assert len(status.details.encode()) + whole.ByteSize() < 6000
    assert whole.message.endswith("ä…")
    assert info.metadata["adapter_id"].endswith("ü…")


def test_a_full_queue_says_when_to_come_back() -> None:
    whole, _ = decoded(to_grpc_status(SloraError(Reason.QUEUE_FULL, "full")))
    info = error_details_pb2.RetryInfo()
    assert whole.details[1].Unpack(info)
    assert info.retry_delay.ToMilliseconds() == 1000


def test_when_to_retry_is_said_in_the_standard_way_too() -> None:
    whole, info = decoded(to_grpc_status(SloraError(Reason.OVERLOADED, "too many", retry_after_seconds="2.500")))
    retry = error_details_pb2.RetryInfo()
    assert whole.details[1].Unpack(retry)
    assert retry.retry_delay.ToMilliseconds() == 2500
    assert info.metadata["retry_after_seconds"] == "2.500", "and so that a gateway passes it on"


class Answer(grpc.RpcError):
    """A call that ended so."""

    def __init__(self, error: SloraError) -> None:
        self._status = to_grpc_status(error)

    def code(self) -> grpc.StatusCode:
        return self._status.code

    def details(self) -> str:
        return str(self._status.details)

    def trailing_metadata(self) -> object:
        return self._status.trailing_metadata


@pytest.mark.parametrize("reason", [Reason.API_KEY_MISSING, Reason.API_KEY_INVALID, Reason.NOT_PERMITTED])
def test_a_store_that_refuses_the_services_own_credentials_is_away(reason: Reason) -> None:
    error = from_store_error(Answer(SloraError(reason, "the token is not valid")))
    assert error.reason is Reason.ADAPTER_STORE_UNAVAILABLE
    assert "the token is not valid; see --store-token-file" in error.message


def test_other_errors_of_the_store_are_its_own() -> None:
    error = from_store_error(Answer(SloraError(Reason.ADAPTER_NOT_FOUND, "no such adapter", adapter_id="x")))
    assert (error.reason, error.metadata) == (Reason.ADAPTER_NOT_FOUND, {"adapter_id": "x"})


class Gone:
    """The context of a call whose caller left a moment ago: what is sent fails in gRPC's core."""

    async def abort(self, *status: object) -> None:
        raise grpc.aio.InternalError("Failed execute_batch")


async def test_a_caller_that_is_gone_is_told_nothing() -> None:
    """Its cancellation is what the call ends with; anything else gRPC would log as the server's own fault."""
    with pytest.raises(asyncio.CancelledError):
        await abort(cast(Any, Gone()), SloraError(Reason.QUEUE_FULL, "full"))
