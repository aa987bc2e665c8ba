"""The gateway's gRPC service by itself."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any, cast

import grpc
import pytest
from slora.engine.v1 import engine_pb2
from slora.gateway.v1 import inference_pb2

from services.gateway.generations import Answer, Ask
from services.gateway.models import ResolvedModel
from services.gateway.servicer import InferenceServicer
from services.tenancy.tenants import ANONYMOUS, Tenant


class Anyone:
    """Lets everybody in."""

    async def authenticate(self, authorization: list[str]) -> Tenant:
        return ANONYMOUS


class OneAnswer:
    """A generation, and how it was left."""

    left_by: BaseException | None = None

    @contextlib.asynccontextmanager
    async def open(self, ask: Ask) -> AsyncIterator[Answer]:
        async def messages() -> Any:
            yield engine_pb2.GenerateResponse(token_ids=[1])

        try:
            yield Answer("r", ResolvedModel("base", None), None, messages())
        except BaseException as error:
            self.left_by = error
            raise


class Leaving:
    """The context of a call whose caller has just left: gRPC's core knows, and has yet to say so."""

    def invocation_metadata(self) -> None:
        return None

    def time_remaining(self) -> None:
        return None

    def done(self) -> bool:
        return False

    async def write(self, *message: object) -> None:
        raise grpc.aio.InternalError("Failed execute_batch")

    abort = write


async def test_a_caller_that_left_a_moment_ago_is_no_error_of_ours(caplog: pytest.LogCaptureFixture) -> None:
    """Its generation counts as cancelled, not as failed, and nothing is logged."""
    generations: Any = OneAnswer()
    servicer = InferenceServicer(cast(Any, None), generations, cast(Any, Anyone()))
    with pytest.raises(asyncio.CancelledError):
        await servicer.Generate(inference_pb2.GenerateRequest(model="base"), cast(Any, Leaving()))
    assert isinstance(generations.left_by, asyncio.CancelledError)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
