"""Sends streams through a gateway at given times and notes when their tokens come.

The client is the public one, in processes of its own, so that it is not what limits the rate: each takes every n-th
call and says how much CPU time it spent.

Times are in seconds after the start of a run, which is the same for all processes. A message may carry several tokens;
what counts is when a reader has them.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType

from slora_client import AsyncSloraClient, SloraRequestError

from benchmarks.command_line import take_no_options

LEAD_SECONDS = 1.0
"""From handing calls to the processes until the start of a run: enough to read them."""


@dataclass(frozen=True, slots=True)
class Call:
    """A request: when it is due, for which model, and exactly how many tokens it asks for."""

    due_seconds: float
    model: str
    prompt_ids: tuple[int, ...]
    num_outputs: int


@dataclass(frozen=True, slots=True)
class StreamTimes:
    """What became of a call: when each message with tokens came, how many tokens came, and what went wrong."""

    due_seconds: float
    message_seconds: tuple[float, ...]
    num_tokens: int
    error: str = ""


@dataclass(frozen=True)
class LoadRun:
    """All calls of a run, in their order; `cpu_share` is the CPU time of the busiest client process over the time."""

    streams: tuple[StreamTimes, ...]
    cpu_share: float


class LoadGenerator:
    """Client processes, ready for any number of runs; a context manager."""

    def __init__(self, address: str, num_processes: int) -> None:
        """`address` is the gateway's, `host:port`."""
        self._address = address
        self._processes = [
            subprocess.Popen([sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for _ in range(num_processes)
        ]

    def run(self, calls: Sequence[Call], timeout_seconds: float) -> LoadRun:
        """Sends every call when it is due and returns when all have ended; one that takes too long fails."""
        start_at = time.monotonic() + LEAD_SECONDS
        number = len(self._processes)
        for i, process in enumerate(self._processes):
            share = [dataclasses.astuple(call) for call in calls[i::number]]
            assert process.stdin is not None
            process.stdin.write(json.dumps([self._address, start_at, timeout_seconds, share]) + "\n")
            process.stdin.flush()
        streams: list[StreamTimes | None] = [None] * len(calls)
        cpu_shares = []
        for i, process in enumerate(self._processes):
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise RuntimeError("a client process ended before its run did; what it wrote to stderr says why")
            answer = json.loads(line)
            streams[i::number] = [
                StreamTimes(due, tuple(times), n, error) for due, times, n, error in answer["streams"]
            ]
            cpu_shares.append(answer["cpu_share"])
        return LoadRun(tuple(stream for stream in streams if stream is not None), max(cpu_shares))

    def close(self) -> None:
        """Ends the processes."""
        for process in self._processes:
            process.kill()
            process.communicate()

    def __enter__(self) -> LoadGenerator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


async def send_all(address: str, start_at: float, timeout_seconds: float, calls: Sequence[Call]) -> list[StreamTimes]:
    """Sends every call when it is due, `start_at` on the monotonic clock being the start."""
    async with AsyncSloraClient(address) as client:
        # The connection is there when the first call is due.
        await client.list_models(timeout=timeout_seconds)
        return await asyncio.gather(*(_send(client, start_at, timeout_seconds, call) for call in calls))


async def _send(client: AsyncSloraClient, start_at: float, timeout_seconds: float, call: Call) -> StreamTimes:
    await asyncio.sleep(start_at + call.due_seconds - time.monotonic())
    times, num_tokens, error = [], 0, ""
    stream = client.stream(
        call.model,
        call.prompt_ids,
        temperature=0,
        max_tokens=call.num_outputs,
        ignore_eos=True,
        timeout=timeout_seconds,
    )
    try:
        async for chunk in stream:
            if chunk.token_ids:
                times.append(time.monotonic() - start_at)
                num_tokens += len(chunk.token_ids)
    except SloraRequestError as failure:
        error = str(failure)
    return StreamTimes(call.due_seconds, tuple(times), num_tokens, error)


def serve_runs() -> None:
    """A client process: a line of calls in, a line of what became of them out, until the end of the input."""
    for line in sys.stdin:
        address, start_at, timeout_seconds, share = json.loads(line)
        calls = [Call(due, model, tuple(prompt_ids), n) for due, model, prompt_ids, n in share]
        cpu_before = time.process_time()
        streams = asyncio.run(send_all(address, start_at, timeout_seconds, calls))
        cpu_share = (time.process_time() - cpu_before) / (time.monotonic() - start_at)
        answer = {"streams": [dataclasses.astuple(stream) for stream in streams], "cpu_share": cpu_share}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    take_no_options(__doc__)
    serve_runs()
