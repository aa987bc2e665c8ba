"""What the C library's limits are for: blocks of the size of a chunk are used again, and arenas stay few."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from services.adapter_store.allocator import tune_allocator

# Chunks come and go as in a stream; then threads, each of which would have an arena of its own.
_PROBE = """
import ctypes, json, resource, sys, threading
from services.adapter_store.allocator import tune_allocator

tuned = sys.argv[1] == "tuned" and tune_allocator()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
source = bytearray(2**20)
def send():
    message = b"".join((b"tag", source))
    return message, b"".join((message, b""))
for _ in range(20):
    send()
before = faults()
for _ in range(200):
    send()
streaming = faults() - before
barrier = threading.Barrier(16)
def work():
    kept = [bytearray(3000) for _ in range(100)]
    barrier.wait()
threads = [threading.Thread(target=work) for _ in range(16)]
for thread in threads: thread.start()
for thread in threads: thread.join()
libc = ctypes.CDLL(None)
libc.open_memstream.restype = ctypes.c_void_p
text, size = ctypes.c_char_p(), ctypes.c_size_t()
stream = ctypes.c_void_p(libc.open_memstream(ctypes.byref(text), ctypes.byref(size)))
libc.malloc_info(0, stream)
libc.fclose(stream)
print(json.dumps({"tuned": tuned, "faults": streaming, "arenas": text.value.count(b"<heap ")}))
"""


def probe(how: str) -> Any:
    done = subprocess.run([sys.executable, "-c", _PROBE, how], capture_output=True, text=True, check=True, timeout=60)
    return json.loads(done.stdout)


def test_chunks_are_made_in_memory_that_was_used_before_and_arenas_are_few() -> None:
    found = probe("tuned")
    if not found["tuned"]:
        pytest.skip("the C library has no such limits")
    assert found["faults"] < 2000, "200 chunks of 256 pages each, twice"
    assert found["arenas"] <= 2


def test_a_c_library_without_limits_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.adapter_store.allocator.ctypes.CDLL", lambda name: object())
    assert not tune_allocator()
