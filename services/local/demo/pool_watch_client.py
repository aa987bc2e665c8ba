"""Watches an engine's pool through its state stream."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from slora.engine.v1 import engine_pb2, engine_pb2_grpc

from services.common.grpc_client import open_channel


@dataclass(frozen=True)
class PoolSample:
    """The pool at a moment, in pages; `seconds` since the watch began. KV is in use, or cached."""

    seconds: float
    num_kv_pages: int
    num_cached_pages: int
    num_adapter_pages: int
    num_free_pages: int
    num_resident: int
    num_running: int
    num_waiting: int


@dataclass
class PoolWatch:
    """What has been seen so far."""

    num_pages: int = 0
    num_loads: int = 0
    num_evictions: int = 0
    samples: list[PoolSample] = field(default_factory=list)
    _began: float = field(default_factory=time.perf_counter)
    _num_resident: int = 0
    _changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def settled(self, timeout_seconds: float) -> PoolSample:
        """The newest sample, once no sequence holds KV; after `timeout_seconds` the newest one as it is."""
        with contextlib.suppress(asyncio.TimeoutError):
            async with self._changed:
                await asyncio.wait_for(self._changed.wait_for(self._is_idle), timeout_seconds)
        return self.samples[-1]

    def _is_idle(self) -> bool:
        last = self.samples[-1] if self.samples else None
        return last is not None and last.num_kv_pages == last.num_running == last.num_waiting == 0

    async def _follow(self, address: str) -> None:
        async with open_channel(address) as channel:
            stub = engine_pb2_grpc.EngineServiceStub(channel)
            async for state in stub.WatchState(engine_pb2.WatchStateRequest()):
                await self._note(state)

    async def _note(self, state: engine_pb2.WatchStateResponse) -> None:
        if state.HasField("profile"):
            self.num_pages = state.profile.num_pages
        self.num_loads += len(state.loaded_adapters)
        self.num_evictions += len(state.evicted_digests)
        self._num_resident += len(state.loaded_adapters) - len(state.evicted_digests)
        load = state.load
        self.samples.append(
            PoolSample(
                time.perf_counter() - self._began,
                load.num_kv_pages - load.num_cached_pages,
                load.num_cached_pages,
                load.num_adapter_pages,
                load.num_free_pages,
                self._num_resident,
                load.num_running,
                load.num_waiting,
            )
        )
        async with self._changed:
            self._changed.notify_all()


@asynccontextmanager
async def watch_pool(engine_address: str) -> AsyncIterator[PoolWatch]:
    """Samples the pool of the engine at `host:port` for the length of the block."""
    watch = PoolWatch()
    following = asyncio.create_task(watch._follow(engine_address))
    try:
        yield watch
    finally:
        following.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await following
