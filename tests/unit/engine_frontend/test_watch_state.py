"""WatchState and PrefetchAdapter over real gRPC, with the core played by the test."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from slora.engine.v1 import engine_pb2

from services.common.errors import Reason, SloraError
from services.common.grpc_errors import from_rpc_error
from services.engine.messages import Abort, Adapter, AdapterLoaded, CoreLoad, Prefetch, RequestFailed


def adapter(number: int) -> Adapter:
    return Adapter(f"adapter-{number}@1", f"sha256:{number:064x}")


def loaded(number: int) -> AdapterLoaded:
    return AdapterLoaded(adapter(number), 0.25, 1000)


async def error_of(awaitable: Any) -> SloraError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await asyncio.wait_for(awaitable, 5)
    return from_rpc_error(caught.value, Reason.ENGINE_UNAVAILABLE)


async def drain_call(reader: Any) -> None:
    async for _ in reader:
        pass


def watch(engine: Any) -> Any:
    return engine.stub.WatchState(engine_pb2.WatchStateRequest()).__aiter__()


async def test_a_fresh_engine_is_empty_and_free(engine: Any) -> None:
    first = await watch(engine).__anext__()
    assert first.load.num_free_pages == first.profile.num_pages == 100
    assert not first.loaded_adapters


async def test_first_everything_then_changes(engine: Any) -> None:
    engine.core.report(loaded=[loaded(1), loaded(2)], load=CoreLoad(num_running=3, num_waiting=4, num_free_pages=5))
    reader = watch(engine)
    first = await reader.__anext__()
    assert first.profile.engine_id == "engine-1"
    assert first.profile.base_model == "tiny"
    assert (first.profile.max_model_len, first.profile.max_running, first.profile.num_pages) == (256, 8, 100)
    assert {a.adapter_id for a in first.loaded_adapters} == {"adapter-1@1", "adapter-2@1"}
    assert not first.evicted_digests
    assert (first.load.num_running, first.load.num_waiting, first.load.num_free_pages) == (3, 4, 5)
    load = CoreLoad(num_kv_pages=6, num_adapter_pages=7, num_evictable_pages=8, num_cached_pages=5)
    engine.core.report(loaded=[loaded(3)], evicted=[adapter(1).digest], load=load)
    second = await reader.__anext__()
    assert not second.HasField("profile")
    assert [(a.adapter_id, a.digest) for a in second.loaded_adapters] == [("adapter-3@1", adapter(3).digest)]
    assert list(second.evicted_digests) == [adapter(1).digest]
    assert (second.load.num_kv_pages, second.load.num_cached_pages) == (6, 5)
    assert (second.load.num_adapter_pages, second.load.num_evictable_pages) == (7, 8)
    late = await watch(engine).__anext__()
    assert {a.adapter_id for a in late.loaded_adapters} == {"adapter-2@1", "adapter-3@1"}


async def test_all_that_is_loading_is_in_every_message_until_it_is_not(engine: Any) -> None:
    both = (adapter(1).digest, adapter(2).digest)
    engine.core.report(loading=both)
    reader = watch(engine)
    assert tuple((await reader.__anext__()).loading_digests) == both
    engine.core.report(load=CoreLoad(num_running=1))  # says nothing of loads: they are as they were
    assert tuple((await reader.__anext__()).loading_digests) == both
    engine.core.report(loaded=[loaded(1)], loading=both[1:])
    message = await reader.__anext__()
    assert [a.digest for a in message.loaded_adapters] == [both[0]]
    assert tuple(message.loading_digests) == both[1:]
    engine.core.report(loading=())  # a load that failed is news, though nothing was loaded
    assert not (await reader.__anext__()).loading_digests
    engine.core.report(loading=both)
    engine.frontend.core_lost("killed", expected=False)
    engine.core.become_ready()
    assert not (await watch(engine).__anext__()).loading_digests


async def gap(reader: Any, what_comes: Callable[[], None] = lambda: None) -> float:
    """Seconds until the next message, while something comes all the time."""
    began, waiting = time.monotonic(), asyncio.ensure_future(reader.__anext__())
    while not waiting.done():
        what_comes()
        await asyncio.sleep(0.01)
    await waiting
    return time.monotonic() - began


async def some_gap(reader: Any, at_least: float, at_most: float, what_comes: Callable[[], None] = lambda: None) -> bool:
    """Whether a gap is so long. Of several, for a process that is held up while a message comes finds the gap before
    it too long and the one behind it too short."""
    for _ in range(10):
        if at_least < await gap(reader, what_comes) < at_most:
            return True
    return False


async def test_at_most_ten_and_at_least_one_a_second(engine: Any) -> None:
    reader = watch(engine)
    await reader.__anext__()
    began = time.monotonic()
    gaps = [
        await gap(reader, lambda: engine.core.report(load=CoreLoad(num_running=random.randrange(1000))))
        for _ in range(7)
    ]
    assert time.monotonic() - began > 0.59, "six times 0.1 s, and what is left of the first one's"
    assert min(gaps) < 0.5, "a change does not wait for the second to pass"
    await reader.__anext__()  # what changed last
    assert await some_gap(reader, 0.7, 1.3)


async def test_steps_that_change_nothing_are_no_news(engine: Any) -> None:
    reader = watch(engine)
    await reader.__anext__()
    assert await some_gap(reader, 0.7, 60.0, engine.core.report)


async def test_every_watcher_can_follow(engine: Any) -> None:
    """Random loads and evictions: a watcher that applies what it is told knows what is resident, at any pace."""
    seed = random.randrange(2**32)
    print("seed", seed)
    draw = random.Random(seed)

    async def follow(pause: float) -> None:
        known: set[str] = set()
        reader = watch(engine)
        async for message in reader:
            together = {a.digest for a in message.loaded_adapters} & set(message.evicted_digests)
            assert not together
            known |= {a.digest for a in message.loaded_adapters}
            known -= set(message.evicted_digests)
            if message.load.num_running == 999:
                assert known == {adapter(n).digest for n in resident}
                return
            await asyncio.sleep(pause)

    resident: set[int] = set()
    watchers = [asyncio.create_task(follow(pause)) for pause in (0, 0, 0.25)]
    for step in range(200):
        evict = set(draw.sample(sorted(resident), min(len(resident), draw.randint(0, 2))))
        load = set(draw.sample(range(12), draw.randint(0, 2))) - (resident - evict)
        resident = (resident - evict) | load
        changes = {"loaded": [loaded(n) for n in load], "evicted": [adapter(n).digest for n in evict]}
        engine.core.report(load=CoreLoad(num_running=step), **changes)
        await asyncio.sleep(0.003)
    engine.core.report(load=CoreLoad(num_running=999))
    await asyncio.wait_for(asyncio.gather(*watchers), 60)


async def test_core_death_ends_watches_and_a_new_core_is_a_new_engine(engine: Any) -> None:
    engine.core.report(loaded=[loaded(1)])
    readers = [watch(engine) for _ in range(3)]
    for reader in readers:
        assert (await reader.__anext__()).profile.engine_id == "engine-1"
    engine.frontend.core_lost("killed", expected=False)
    for reader in readers:
        error = await error_of(drain_call(reader))
        assert error.reason is Reason.ENGINE_CORE_DEAD
    assert (await error_of(watch(engine).__anext__())).reason is Reason.ENGINE_CORE_DEAD
    engine.core.become_ready()
    first = await watch(engine).__anext__()
    assert first.profile.engine_id == "engine-2"
    assert not first.loaded_adapters


async def test_watchers_that_leave_are_forgotten(engine: Any) -> None:
    calls = [engine.stub.WatchState(engine_pb2.WatchStateRequest()) for _ in range(3)]
    for call in calls:
        await call.read()
    assert len(engine.frontend.state._watches) == 3
    for call in calls:
        call.cancel()
    for _ in range(500):
        if not engine.frontend.state._watches:
            return
        await asyncio.sleep(0.01)
    pytest.fail("watches are left")


async def test_prefetch(engine: Any) -> None:
    ref = {"adapter_id": "adapter-1@1", "digest": adapter(1).digest}
    call = engine.stub.PrefetchAdapter(engine_pb2.PrefetchAdapterRequest(adapter=ref))
    sent = await engine.core.take(Prefetch)
    assert sent.adapter == adapter(1)
    engine.core.report(prefetched=[(sent.request_id, 1.5)], loaded=[loaded(1)])
    assert (await call).load_time.ToTimedelta().total_seconds() == 1.5
    assert engine.core.sent == []


async def test_prefetch_that_fails(engine: Any) -> None:
    ref = {"adapter_id": "adapter-1@1", "digest": adapter(1).digest}
    call = engine.stub.PrefetchAdapter(engine_pb2.PrefetchAdapterRequest(adapter=ref))
    sent = await engine.core.take(Prefetch)
    engine.core.report(failures=[RequestFailed(sent.request_id, "POOL_EXHAUSTED", "no room", {"num_pages": "5"})])
    error = await error_of(call)
    assert error.reason is Reason.POOL_EXHAUSTED
    assert error.metadata == {"num_pages": "5"}


async def test_prefetch_ends_with_the_core_or_the_caller(engine: Any) -> None:
    ref = {"adapter_id": "adapter-1@1", "digest": adapter(1).digest}
    request = engine_pb2.PrefetchAdapterRequest(adapter=ref)
    call = engine.stub.PrefetchAdapter(request)
    sent = await engine.core.take(Prefetch)
    call.cancel()
    assert (await engine.core.take(Abort)).request_id == sent.request_id
    call = engine.stub.PrefetchAdapter(request)
    await engine.core.take(Prefetch)
    engine.frontend.core_lost("killed", expected=False)
    assert (await error_of(call)).reason is Reason.ENGINE_CORE_DEAD
    assert (await error_of(engine.stub.PrefetchAdapter(request))).reason is Reason.ENGINE_CORE_DEAD
