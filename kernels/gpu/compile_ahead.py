"""Kernels compiled side by side at an engine's start, instead of one after the other as they are first launched.

A model needs some 150 kernels, each of which takes the compiler a third of a second and more. The compiler runs outside
the interpreter's lock, so threads are enough. What is compiled is found by launching nothing: Triton asks a hook before
it compiles, and a hook that says yes has the launch left out.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from triton import knobs


def compile_ahead(launch: Callable[[], None], num_threads: int, begin_thread: Callable[[], None]) -> int:
    """Compiles what `launch` would, if it is not compiled yet; returns how many kernels that were.

    None of those is launched, others are: `launch` must do with memory that some kernels have not written. No other
    thread may launch a kernel meanwhile. begin_thread: called at the start of each thread, to choose the device. Raises
    what Triton's compiler raises.
    """
    wanted: dict[tuple[str, str], tuple[Any, str]] = {}

    def note(*, key: str, fn: Any, compile: dict[str, Any], **_: object) -> bool:
        wanted[fn.module + fn.name, key] = fn.jit_function, compile["specialization_data"]
        return True

    hook, knobs.runtime.jit_cache_hook = knobs.runtime.jit_cache_hook, note
    try:
        launch()
    finally:
        knobs.runtime.jit_cache_hook = hook
    with ThreadPoolExecutor(num_threads, "compile", begin_thread) as threads:
        list(threads.map(lambda one: one[0].preload(one[1]), wanted.values()))  # raises what a thread did
    return len(wanted)
