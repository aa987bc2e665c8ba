"""A gateway in this process, before fake engines and a fake adapter store, all of them real gRPC servers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import pytest
from prometheus_client import CollectorRegistry
from slora.engine.v1 import generation_pb2
from slora.gateway.v1 import inference_pb2, inference_pb2_grpc

from services.common.errors import Reason, SloraError
from services.common.grpc_errors import from_rpc_error
from services.common.tracing import NO_TRACING
from services.gateway.config import GatewaySettings
from services.gateway.gateway import Gateway
from tests.fakes.fake_adapter_store import FakeAdapterStore
from tests.fakes.fake_engine import FakeEngine, expected_tokens
from tests.integration.gateway.tenancy_desk import Desk

PROMPT = "tell me"


async def eventually(what: str, condition: Callable[[], Any], timeout: float = 30.0) -> None:
    """Returns when `condition` holds; fails after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout} s: {what}"
        await asyncio.sleep(0.01)


class Fleet:
    """Engines, a store, and the gateway before them."""

    def __init__(self, engines: list[FakeEngine], store: FakeAdapterStore) -> None:
        self.engines = engines
        self.store = store
        self.registry = CollectorRegistry()
        self.gateway: Gateway | None = None
        self.channel: grpc.aio.Channel | None = None

    async def start(self, **settings: Any) -> None:
        """Starts the gateway; the engines and the store must have ports by now."""
        # A slow machine may need long for what is meant to come; where it does not come, tests say how long to wait.
        patient = {"engine_wait_seconds": 30.0, "store_timeout_seconds": 20.0, "tenancy_timeout_seconds": 20.0}
        addresses = tuple(engine.address for engine in self.engines)
        everything: dict[str, Any] = {"listen": "127.0.0.1:0", "http": "127.0.0.1:0", **patient, **settings}
        admin_secret = everything.pop("admin_secret", "")
        tracing = everything.pop("tracing", NO_TRACING)
        settings_given = GatewaySettings(addresses, (self.store.address,), **everything)
        self.gateway = Gateway(settings_given, self.registry, admin_secret, tracing)
        await self.gateway.start()
        self.channel = grpc.aio.insecure_channel(f"127.0.0.1:{self.gateway.server.port}")
        self.stub = inference_pb2_grpc.InferenceServiceStub(self.channel)

    @property
    def http_port(self) -> int:
        """Where the gateway serves HTTP."""
        assert self.gateway is not None
        assert self.gateway.http is not None
        return self.gateway.http.port

    async def close(self) -> None:
        """Stops everything."""
        if self.channel is not None:
            await self.channel.close()
        if self.gateway is not None:
            await self.gateway.server.grpc.stop(None)
            await self.gateway.close()
        for server in (*self.engines, self.store):
            await server.stop()

    def call(
        self, model: str = "base", num_tokens: int = 4, deadline: float | None = 60, **fields: Any
    ) -> grpc.aio.UnaryStreamCall[inference_pb2.GenerateRequest, inference_pb2.GenerateResponse]:
        """Starts a generation."""
        request = inference_pb2.GenerateRequest(
            model=model,
            prompt=generation_pb2.Prompt(text=PROMPT),
            stopping=generation_pb2.StoppingCriteria(max_tokens=num_tokens),
            **fields,
        )
        return self.stub.Generate(request, timeout=deadline)

    async def ask(
        self, model: str = "base", num_tokens: int = 4, **fields: Any
    ) -> list[inference_pb2.GenerateResponse]:
        """A whole answer."""
        return [message async for message in self.call(model, num_tokens, **fields)]

    async def right(self, model: str = "base", adapter_id: str = "", num_tokens: int = 4) -> str:
        """Asks and checks every token; returns what the gateway says answered."""
        digest = self.store.adapters[adapter_id].digest if adapter_id else ""
        messages = await self.ask(model, num_tokens)
        tokens = [token for message in messages for token in message.token_ids]
        assert tokens == expected_tokens(PROMPT, digest, num_tokens)
        return messages[0].model

    async def refusal(self, answer: Awaitable[Any]) -> SloraError:
        """The error that `answer` ends in."""
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await answer
        return from_rpc_error(caught.value, Reason.INTERNAL)

    def value(self, name: str, **labels: str) -> float:
        """A metric of the gateway; 0 where it was never touched."""
        return self.registry.get_sample_value(f"slora_gateway_{name}", labels) or 0.0

    def stop_clock(self) -> Callable[[float], None]:
        """From now on time stands still for the choice of engines; gives what lets some seconds pass there."""
        assert self.gateway is not None
        now = time.monotonic()

        def pass_by(seconds: float) -> None:
            nonlocal now
            now += seconds

        self.gateway.pool._clock = lambda: now
        return pass_by

    def in_state(self, number: int) -> Any:
        """What the gateway thinks of an engine."""
        assert self.gateway is not None
        return self.gateway.pool.states[number]


FleetFactory = Callable[..., Awaitable[Fleet]]


@pytest.fixture
async def fleet_of() -> AsyncIterator[FleetFactory]:
    """`await fleet_of(2, adapters=["a@1"], script=..., **settings)`: a started fleet."""
    fleets: list[Fleet] = []

    async def make(
        num_engines: int = 2, adapters: tuple[str, ...] = ("poet@1", "poet@2", "cook@1"), **more: Any
    ) -> Fleet:
        for_engine = {key: more.pop(key) for key in ("script", "max_running", "base_model") if key in more}
        fleet = Fleet([FakeEngine(**for_engine) for _ in range(num_engines)], FakeAdapterStore())
        fleets.append(fleet)
        for adapter_id in adapters:
            name, _, version = adapter_id.partition("@")
            fleet.store.add(name, int(version))
        for server in (*fleet.engines, fleet.store):
            await server.start()
        await fleet.start(**more)
        gateway = fleet.gateway
        assert gateway is not None
        await eventually("the catalogue is complete", lambda: gateway.catalogue.is_complete)
        return fleet

    yield make
    for fleet in fleets:
        await fleet.close()


@pytest.fixture
async def desk(redis_url: str) -> AsyncIterator[Desk]:
    """Where tests make tenants and keys."""
    made = Desk(redis_url)
    yield made
    await made.redis.close()
