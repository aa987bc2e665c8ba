"""Errors as statuses: what is in them, and that they fit where they travel."""

from __future__ import annotations

import asyncio
import random
from typing import Any, cast

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from services.common.errors import FieldError, Reason, SloraError
from services.common.grpc_errors import abort, from_rpc_error, from_store_error, to_grpc_status, write
from tests.fixtures.ended_call import EndedCall


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
    assert whole.message.endswith("ä…")
    assert info.metadata["adapter_id"].endswith("ü…")


ALPHABETS = ("a", "aä日🙂\n%", "日本語", "🙂", "\0\x7f\n%")


@pytest.mark.parametrize("alphabet", ALPHABETS)
@pytest.mark.parametrize("num_characters", [0, 1, 80, 300, 2000, 50_000])
async def test_whatever_is_in_an_error_it_arrives(alphabet: str, num_characters: int) -> None:
    """What is too much for gRPC's headers would end the call with another status, or a 500 at the gateway."""
    text = "".join(random.choices(alphabet, k=num_characters))
    metadata = dict.fromkeys(("adapter_id", "versions", "aliases", "limit", "value"), text)
    error = FieldError(Reason.CHAT_INVALID, "prompt.chat.messages", f"has {text}", **metadata, retry_after_seconds="2")
    server = grpc.aio.server()
    server.add_generic_rpc_handlers([Refusing(error)])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.unary_unary("/any/Call")(b"", timeout=20)
        found = from_rpc_error(caught.value, unavailable=Reason.ENGINE_UNAVAILABLE)
        assert (found.reason, found.metadata["field"]) == (Reason.CHAT_INVALID, "prompt.chat.messages")
        shown = found.message.removeprefix("prompt.chat.messages has ").removesuffix("…")
        assert text.startswith(shown)
        assert shown == text or len(shown) > 15
        assert found.metadata["value"].removesuffix("…") == text[: len(found.metadata["value"].removesuffix("…"))]
    finally:
        await server.stop(0)


class Refusing(grpc.GenericRpcHandler):
    """Ends every call with the same error."""

    def __init__(self, error: SloraError) -> None:
        self._error = error

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        async def refuse(request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
            await abort(context, self._error)
            raise AssertionError("abort raises")

        return grpc.unary_unary_rpc_method_handler(refuse)


def test_details_of_another_status_are_left_alone() -> None:
    """As where headers were too large for whoever reads them: gRPC puts its own code beside our details."""

    class Mixed(EndedCall):
        def code(self) -> grpc.StatusCode:
            return grpc.StatusCode.RESOURCE_EXHAUSTED

        def details(self) -> str:
            return "Stream removed"

    error = from_rpc_error(Mixed(to_grpc_status(SloraError(Reason.CHAT_INVALID, "x"))), Reason.ENGINE_UNAVAILABLE)
    assert (error.reason, error.message) == (Reason.REQUEST_TOO_LARGE, "Stream removed")


def test_a_call_that_broke_off_while_a_message_was_written_has_found_nobody() -> None:
    nothing = grpc.aio.Metadata()
    ended = grpc.aio.AioRpcError(grpc.StatusCode.INTERNAL, nothing, nothing, "Internal error from Core")
    assert from_rpc_error(ended, Reason.ENGINE_UNAVAILABLE).reason is Reason.ENGINE_UNAVAILABLE
    failed = grpc.aio.AioRpcError(grpc.StatusCode.INTERNAL, nothing, nothing, "a bug")
    assert from_rpc_error(failed, Reason.ENGINE_UNAVAILABLE).reason is Reason.INTERNAL


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


def test_a_field_is_named_apart_from_what_is_wrong_with_it() -> None:
    error = FieldError(Reason.SAMPLING_INVALID, "sampling.top_p", "is 2; it is at most 1", value=2)
    whole, info = decoded(to_grpc_status(error))
    bad = error_details_pb2.BadRequest()
    assert whole.details[1].Unpack(bad)
    assert whole.message == "sampling.top_p is 2; it is at most 1"
    assert [(v.field, v.description) for v in bad.field_violations] == [("sampling.top_p", "is 2; it is at most 1")]
    assert dict(info.metadata) == {"field": "sampling.top_p", "value": "2"}


def test_an_error_of_a_field_is_one_again_at_the_other_end() -> None:
    error = FieldError(Reason.SAMPLING_INVALID, "sampling.top_p", "is 2; it is at most 1", value=2)
    found = from_rpc_error(EndedCall(to_grpc_status(error)), unavailable=Reason.ENGINE_UNAVAILABLE)
    assert isinstance(found, FieldError)
    assert (found.reason, found.field, found.complaint) == (error.reason, error.field, error.complaint)
    assert (found.message, found.metadata) == (error.message, error.metadata)


def test_a_violation_that_names_nothing_is_no_error_of_a_field() -> None:
    status = to_grpc_status(SloraError(Reason.SAMPLING_INVALID, "no token can be drawn"))
    whole, _ = decoded(status)
    whole.details.add().Pack(error_details_pb2.BadRequest())
    found = from_rpc_error(EndedCall(rpc_status.to_status(whole)), unavailable=Reason.ENGINE_UNAVAILABLE)
    assert (type(found), found.message) == (SloraError, "no token can be drawn")


@pytest.mark.parametrize("reason", [Reason.API_KEY_MISSING, Reason.API_KEY_INVALID, Reason.NOT_PERMITTED])
def test_a_store_that_refuses_the_services_own_credentials_is_away(reason: Reason) -> None:
    error = from_store_error(EndedCall(to_grpc_status(SloraError(reason, "the token is not valid"))))
    assert error.reason is Reason.ADAPTER_STORE_UNAVAILABLE
    assert "the token is not valid; see --store-token-file" in error.message


def test_other_errors_of_the_store_are_its_own() -> None:
    status = to_grpc_status(SloraError(Reason.ADAPTER_NOT_FOUND, "no such adapter", adapter_id="x"))
    error = from_store_error(EndedCall(status))
    assert (error.reason, error.metadata) == (Reason.ADAPTER_NOT_FOUND, {"adapter_id": "x"})


class Gone:
    """The context of a call whose caller left a moment ago: what is sent fails in gRPC's core."""

    async def abort(self, *status: object) -> None:
        raise grpc.aio.InternalError("Failed execute_batch")

    async def write(self, message: object) -> None:
        raise grpc.aio.InternalError("Failed execute_batch")


async def test_a_caller_that_is_gone_is_told_nothing() -> None:
    """Its cancellation is what the call ends with; anything else gRPC would log as the server's own fault."""
    with pytest.raises(asyncio.CancelledError):
        await abort(cast(Any, Gone()), SloraError(Reason.QUEUE_FULL, "full"))


async def test_a_message_to_a_caller_that_is_gone_ends_the_call_as_its_cancellation_would() -> None:
    with pytest.raises(asyncio.CancelledError):
        await write(cast(Any, Gone()), "a message")
