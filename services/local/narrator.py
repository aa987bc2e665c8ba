"""Tells a person what goes on: bars on a terminal, a few plain lines where the output goes to a file."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

_PLAIN_LINE_EVERY_SECONDS = 10.0
_PLAIN_WIDTH = 120


@dataclass
class Task:
    """Something that takes a while; `note` is shown beside the bar and kept in the closing line."""

    _on_change: Callable[[int, str], None]
    note: str = ""

    def advance(self, steps: int = 1, note: str | None = None) -> None:
        """`steps` more are done."""
        if note is not None:
            self.note = note
        self._on_change(steps, self.note)


class Narrator:
    """Where the demo and `up` speak. Without a terminal, a long task says a line every ten seconds and no more."""

    def __init__(self, console: Console | None = None) -> None:
        if console is None:
            # A file has no width of its own, and rich would assume 80 columns.
            console = Console(highlight=False, width=None if sys.stdout.isatty() else _PLAIN_WIDTH)
        self.console = console

    def heading(self, text: str) -> None:
        """Begins a part."""
        self.console.print(f"\n[bold]{text}[/bold]")

    def line(self, text: str) -> None:
        """The text as it is: rich reads nothing into it, and what is to be copied from it is not broken into lines."""
        self.console.print(text, markup=False, emoji=False, soft_wrap=True)

    @contextmanager
    def task(self, title: str, total: int) -> Iterator[Task]:
        """Shows that `title` goes on, in `total` steps; closes with a line that says how long it took."""
        began = time.perf_counter()
        show = self._bar if self.console.is_terminal else self._plain_lines
        with show(title, total) as task:
            yield task
        note = f" ({task.note})" if task.note else ""
        self.line(f"  {title}{note}: {time.perf_counter() - began:.1f} s")

    @contextmanager
    def _bar(self, title: str, total: int) -> Iterator[Task]:
        columns = (
            TextColumn("  {task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.fields[note]}"),
        )
        with Progress(*columns, console=self.console, transient=True) as progress:
            bar = progress.add_task(title, total=total, note="")
            yield Task(lambda steps, note: progress.update(bar, advance=steps, note=note))

    @contextmanager
    def _plain_lines(self, title: str, total: int) -> Iterator[Task]:
        done, last = 0, time.perf_counter()

        def change(steps: int, note: str) -> None:
            nonlocal done, last
            done += steps
            if time.perf_counter() - last > _PLAIN_LINE_EVERY_SECONDS:
                last = time.perf_counter()
                self.line(f"  {title}: {done} of {total}{' ' + note if note else ''} ...")

        yield Task(change)
