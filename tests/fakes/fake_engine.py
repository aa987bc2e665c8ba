"""An engine to order: a real gRPC server on loopback that speaks EngineService and does what the test's script says.

What it answers is a function of adapter and prompt only, so that an answer from another engine must be the same.
"""

from __future__ import annotations

import asyncio
import itertools
import traceback
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

import grpc
from slora.engine.v1 import engine_pb2, engine_pb2_grpc, generation_pb2

from services.common.errors import Reason, SloraError
from services.common.grpc_errors import abort, to_status
from services.common.grpc_server import SERVER_OPTIONS

WatchContext = grpc.aio.ServicerContext[engine_pb2.WatchStateRequest, engine_pb2.WatchStateResponse]
ManyContext = grpc.aio.ServicerContext[engine_pb2.GenerateManyRequest, engine_pb2.GenerateManyResponse]

HEARTBEAT_SECONDS = 0.2

_engine_ids = itertools.count(1)


def expected_tokens(prompt_text: str, digest: str, num_tokens: int) -> list[int]:
    """What a fake engine answers."""
    state = zlib.crc32(f"{prompt_text}|{digest}".encode())
    return [(state + 7919 * i) % 32000 for i in range(num_tokens)]


def prompt_key(prompt: generation_pb2.Prompt) -> str:
    """A prompt of any kind as a text."""
    if prompt.WhichOneof("content") == "chat":
        return "".join(f"<{m.role}>{m.content}" for m in prompt.chat.messages)
    return prompt.text or ",".join(map(str, prompt.token_ids.ids))


@dataclass(eq=False)
class Received:
    """A generation that reached a fake engine."""

    request: engine_pb2.GenerateRequest
    time_remaining: float | None
    num_written: int = 0
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)


class Context:
    """What a script writes to: one generation's part of the call that it shares with others."""

    def __init__(self, start: engine_pb2.GenerationStart, write: Callable[..., Awaitable[None]]) -> None:
        self.start = start
        self.is_over = False
        self.say = write

    async def write(self, response: engine_pb2.GenerateResponse) -> None:
        """Sends a message."""
        self.is_over = response.HasField("completion")
        await self.say(engine_pb2.GenerationUpdate(number=self.start.number, response=response))

    async def fail(self, error: SloraError) -> None:
        """Ends the generation."""
        self.is_over = True
        failure = to_status(error).SerializeToString()
        await self.say(engine_pb2.GenerationUpdate(number=self.start.number, failure=failure))

    async def break_off(self) -> None:
        """Ends the generation as no engine should, unless it is over."""
        if not self.is_over:
            await self.say(engine_pb2.GenerationUpdate(number=self.start.number))

    @property
    def time_remaining(self) -> float | None:
        """Seconds; None without a deadline."""
        start = self.start
        return start.timeout.ToTimedelta().total_seconds() if start.HasField("timeout") else None


Script = Callable[["FakeEngine", Received, Context], Awaitable[None]]


async def answer(engine: FakeEngine, received: Received, context: Context) -> None:
    """Streams the expected tokens, one a message, then the completion."""
    for response in answer_messages(received.request):
        await context.write(response)
        received.num_written += 1
        if engine.token_seconds:
            await asyncio.sleep(engine.token_seconds)


def answer_messages(request: engine_pb2.GenerateRequest) -> list[engine_pb2.GenerateResponse]:
    """The messages of a whole answer; the completion comes with the last token."""
    num_tokens = request.stopping.max_tokens or 4
    tokens = expected_tokens(prompt_key(request.prompt), request.adapter.digest, num_tokens)
    messages = [engine_pb2.GenerateResponse(text=f" {token}", token_ids=[token]) for token in tokens]
    if request.HasField("num_logprobs"):
        for message in messages:
            entry = message.logprobs.add(token_id=message.token_ids[0], logprob=-0.5, text=message.text)
            for rank in range(request.num_logprobs):
                # The last one has no text of its own, and is as good as impossible.
                is_last = rank == request.num_logprobs - 1
                logprob = float("-inf") if is_last else -0.5 - rank
                entry.top.add(token_id=rank, logprob=logprob, text="" if is_last else f" {rank}")
    usage = generation_pb2.Usage(num_prompt_tokens=3, num_completion_tokens=num_tokens, num_cached_tokens=2)
    messages[-1].completion.CopyFrom(
        generation_pb2.Completion(finish_reason=generation_pb2.FINISH_REASON_LENGTH, usage=usage)
    )
    return messages


def refuse(reason: Reason, message: str = "refused by the test", **metadata: object) -> Script:
    """Ends every generation at once with an error."""
    return refuse_with(SloraError(reason, message, **metadata))


def refuse_with(error: SloraError) -> Script:
    """Ends every generation at once with `error`."""

    async def script(engine: FakeEngine, received: Received, context: Context) -> None:
        await context.fail(error)

    return script


def fail_after(num_messages: int, reason: Reason) -> Script:
    """Streams some messages, then ends with an error."""

    async def script(engine: FakeEngine, received: Received, context: Context) -> None:
        for response in answer_messages(received.request)[:num_messages]:
            await context.write(response)
        await context.fail(SloraError(reason, "failed by the test"))

    return script


async def hang(engine: FakeEngine, received: Received, context: Context) -> None:
    """Never says anything."""
    await asyncio.Event().wait()


class FakeEngine(engine_pb2_grpc.EngineServiceServicer):
    """An engine whose answers, state and life the test decides."""

    def __init__(self, base_model: str = "base", max_running: int = 64, script: Script = answer) -> None:
        self.base_model = base_model
        self.script = script
        self.received: list[Received] = []
        self.load = engine_pb2.EngineLoad(num_free_pages=100)
        self.max_running = max_running
        self.engine_id = ""
        self._audible = asyncio.Event()
        self._audible.set()
        self.token_seconds = 0.0
        self.port = 0
        self.num_watches = 0
        self._ending: SloraError | None = None
        self._server: grpc.aio.Server | None = None
        self._resident: dict[str, str] = {}
        self._watchers: set[asyncio.Queue[engine_pb2.WatchStateResponse]] = set()

    @property
    def address(self) -> str:
        """host:port; the port stays when it is started again."""
        return f"127.0.0.1:{self.port}"

    async def start(self) -> None:
        """Starts, or starts again on the same port, as a new engine with empty memory."""
        self.engine_id = f"engine-{next(_engine_ids)}"
        self._resident.clear()
        self._server = grpc.aio.server(options=SERVER_OPTIONS)
        engine_pb2_grpc.add_EngineServiceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        await self._server.start()

    async def stop(self) -> None:
        """Dies: every connection is closed. Idempotent."""
        if self._server is not None:
            server, self._server = self._server, None
            await server.stop(None)

    def set_load(self, **fields: int | bool) -> None:
        """Changes the load and tells the watchers."""
        for name, value in fields.items():
            setattr(self.load, name, value)
        self._tell(engine_pb2.WatchStateResponse(load=self.load))

    def load_adapter(self, digest: str, adapter_id: str = "") -> None:
        """An adapter becomes resident."""
        self._resident[digest] = adapter_id
        loaded = [engine_pb2.AdapterRef(adapter_id=adapter_id, digest=digest)]
        self._tell(engine_pb2.WatchStateResponse(load=self.load, loaded_adapters=loaded))

    def set_loading(self, *digests: str) -> None:
        """These adapters, and no others, are being loaded."""
        self._tell(engine_pb2.WatchStateResponse(load=self.load, loading_digests=digests))

    def evict_adapter(self, digest: str) -> None:
        """An adapter is evicted."""
        del self._resident[digest]
        self._tell(engine_pb2.WatchStateResponse(load=self.load, evicted_digests=[digest]))

    def end_watches(self, reason: Reason) -> None:
        """Ends every state stream with an error, as an engine whose core died does."""
        self._ending = SloraError(reason, "ended by the test")
        self._tell(engine_pb2.WatchStateResponse())

    async def GenerateMany(self, requests: AsyncIterator[engine_pb2.GenerateManyRequest], context: ManyContext) -> None:
        writing = asyncio.Lock()

        async def write_in_turn(update: engine_pb2.GenerationUpdate) -> None:
            async with writing:
                await context.write(engine_pb2.GenerateManyResponse(updates=[update]))

        async def write(update: engine_pb2.GenerationUpdate) -> None:
            # A script that is cancelled has its message under way still: another one's would be one too many for gRPC.
            await asyncio.shield(write_in_turn(update))

        running: dict[int, asyncio.Task[None]] = {}
        try:
            async for request in requests:
                if request.HasField("start"):
                    one = Context(request.start, write)
                    running[request.start.number] = asyncio.create_task(self._generate(one))
                else:
                    running[request.cancelled_number].cancel()
            await asyncio.gather(*running.values(), return_exceptions=True)
        finally:
            for task in running.values():
                task.cancel()

    async def _generate(self, context: Context) -> None:
        received = Received(context.start.request, context.time_remaining)
        self.received.append(received)
        try:
            async with asyncio.timeout(context.time_remaining):
                await self.script(self, received, context)
            await context.break_off()
        except asyncio.CancelledError:
            received.cancelled.set()
            raise
        except TimeoutError:
            received.cancelled.set()
            await context.fail(SloraError(Reason.DEADLINE_EXCEEDED, "too late"))
        except Exception:
            await context.fail(SloraError(Reason.INTERNAL, traceback.format_exc()))
        finally:
            received.ended.set()

    async def WatchState(
        self, request: engine_pb2.WatchStateRequest, context: WatchContext
    ) -> AsyncIterator[engine_pb2.WatchStateResponse]:
        self.num_watches += 1
        if self._ending is not None:
            await abort(context, self._ending)
        queue: asyncio.Queue[engine_pb2.WatchStateResponse] = asyncio.Queue()
        self._watchers.add(queue)
        try:
            await self._audible.wait()
            yield self._everything()
            while True:
                try:
                    update = await asyncio.wait_for(queue.get(), HEARTBEAT_SECONDS)
                except TimeoutError:
                    update = engine_pb2.WatchStateResponse(load=self.load)
                await self._audible.wait()
                if self._ending is not None:
                    await abort(context, self._ending)
                yield update
        finally:
            self._watchers.discard(queue)

    def revive(self) -> None:
        """Takes back `end_watches`."""
        self._ending = None

    def set_silent(self, silent: bool) -> None:
        """State streams stay open but say nothing."""
        if silent:
            self._audible.clear()
        else:
            self._audible.set()

    def _everything(self) -> engine_pb2.WatchStateResponse:
        profile = engine_pb2.EngineProfile(
            engine_id=self.engine_id,
            base_model=self.base_model,
            max_model_len=4096,
            max_running=self.max_running,
            num_pages=100,
        )
        loaded = [engine_pb2.AdapterRef(adapter_id=name, digest=digest) for digest, name in self._resident.items()]
        return engine_pb2.WatchStateResponse(profile=profile, load=self.load, loaded_adapters=loaded)

    def _tell(self, update: engine_pb2.WatchStateResponse) -> None:
        for watcher in self._watchers:
            watcher.put_nowait(update)
