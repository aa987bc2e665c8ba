"""A loop that takes all that grpc has to tell at once."""

from __future__ import annotations

import asyncio
import random
import selectors
import socket
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any

import grpc

from services.common.grpc_loop import GrpcEventLoop, run
from services.common.grpc_server import GrpcServer

NUM_STREAMS, NUM_MESSAGES = 64, 50


class PollerCompletionQueue:
    """As grpc's: what is over is queued, then a byte is sent; a turn takes one byte and the whole queue."""

    def __init__(self) -> None:
        self.reader, self.writer = socket.socketpair()
        self.reader.setblocking(False)
        self.queue: list[int] = []
        self.batches: list[list[int]] = []

    def tell(self, number: int) -> None:
        self.queue.append(number)
        self.writer.send(b"1")

    def handle(self, _: asyncio.AbstractEventLoop) -> None:
        assert self.reader.recv(1) == b"1"
        self.batches.append(self.queue)
        self.queue = []

    def close(self) -> None:
        self.reader.close()
        self.writer.close()


class LatePoller(PollerCompletionQueue):
    """Something more is over while the first batch is handled."""

    def handle(self, loop: asyncio.AbstractEventLoop) -> None:
        super().handle(loop)
        if len(self.batches) == 1:
            self.tell(-1)


# The loop goes by the name.
LatePoller.__name__ = PollerCompletionQueue.__name__


def batches_of(poller: PollerCompletionQueue, sizes: list[int]) -> list[list[int]]:
    async def tell_in_bursts() -> None:
        loop = asyncio.get_running_loop()
        loop.add_reader(poller.reader, partial(poller.handle, loop))
        for size in sizes:
            for number in range(size):
                poller.tell(number)
            for _ in range(4):
                await asyncio.sleep(0)
        loop.remove_reader(poller.reader)

    try:
        run(tell_in_bursts())
    finally:
        poller.close()
    return poller.batches


def test_what_is_over_is_handled_in_one_turn_and_nothing_is_lost() -> None:
    sizes = [random.randint(1, 200) for _ in range(20)]
    assert batches_of(PollerCompletionQueue(), sizes) == [list(range(size)) for size in sizes]


def test_what_comes_while_others_are_handled_has_the_next_turn() -> None:
    size = random.randint(1, 200)
    assert batches_of(LatePoller(), [size]) == [list(range(size)), [-1]]


class CountingSelector(selectors.DefaultSelector):
    """Asked once a turn."""

    num_turns = 0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self.num_turns += 1
        return super().select(timeout)


async def count(_: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> AsyncIterator[bytes]:
    for number in range(NUM_MESSAGES):
        yield b"%d" % number


async def stream_side_by_side() -> None:
    server = GrpcServer("127.0.0.1:0", ["a.Service"])
    count_method: Any = grpc.unary_stream_rpc_method_handler(count)
    handler = grpc.method_handlers_generic_handler("a.Service", {"Count": count_method})
    server.grpc.add_generic_rpc_handlers((handler,))
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:

        async def read() -> list[bytes]:
            call: Any = channel.unary_stream("/a.Service/Count")
            return [message async for message in call(b"", timeout=60)]

        heard = await asyncio.gather(*(read() for _ in range(NUM_STREAMS)))
    await server.grpc.stop(0)
    assert heard == [[b"%d" % number for number in range(NUM_MESSAGES)]] * NUM_STREAMS


def num_turns(make: Callable[[selectors.BaseSelector], asyncio.AbstractEventLoop]) -> int:
    selector = CountingSelector()
    with asyncio.Runner(loop_factory=lambda: make(selector)) as runner:
        runner.run(stream_side_by_side())
    return selector.num_turns


def test_grpc_is_known_by_what_it_reads_its_socket_with() -> None:
    assert num_turns(GrpcEventLoop) < 0.7 * num_turns(asyncio.SelectorEventLoop)
