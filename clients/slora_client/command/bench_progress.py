"""How far a load is, on stderr: a bar on a terminal, elsewhere a line every few seconds."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator, Callable

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from slora_client.command.bench import Outcome
from slora_client.command.outcome import console

LINE_EVERY_SECONDS = 5.0
_COLUMNS = (
    TextColumn("requests"),
    BarColumn(),
    MofNCompleteColumn(),
    TimeElapsedColumn(),
    TimeRemainingColumn(),
    TextColumn("{task.fields[failures]}"),
)


@contextlib.asynccontextmanager
async def shown_progress(num_requests: int) -> AsyncIterator[Callable[[Outcome], None]]:
    """Shows, for the length of a block, how many requests are done; what it gives is to be told of each."""
    if not sys.stderr.isatty():
        async with _lines(num_requests) as note:
            yield note
        return
    with Progress(*_COLUMNS, console=console(stderr=True), transient=True) as progress:
        bar, counts = progress.add_task("", total=num_requests, failures=""), _Counts()

        def show(outcome: Outcome) -> None:
            counts.note(outcome)
            progress.update(bar, completed=counts.num_done, failures=counts.failures)

        yield show


class _Counts:
    num_done = 0
    num_failed = 0

    def note(self, outcome: Outcome) -> None:
        self.num_done += 1
        self.num_failed += bool(outcome.error)

    @property
    def failures(self) -> str:
        return f"{self.num_failed} failed" if self.num_failed else ""


@contextlib.asynccontextmanager
async def _lines(num_requests: int) -> AsyncIterator[Callable[[Outcome], None]]:
    counts, began = _Counts(), time.perf_counter()

    async def say() -> None:
        # By the clock and not as requests end: those that take long are what somebody waits for.
        while True:
            await asyncio.sleep(LINE_EVERY_SECONDS)
            failures = f", {counts.failures}" if counts.failures else ""
            seconds = time.perf_counter() - began
            typer.echo(f"{counts.num_done} of {num_requests} requests{failures}, {seconds:.0f} s", err=True)

    saying = asyncio.create_task(say())
    try:
        yield counts.note
    finally:
        saying.cancel()
