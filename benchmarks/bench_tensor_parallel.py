"""Claim: N processes send what S-LoRA's formula says; LoRA's part of it is small, and hides behind products.

Decode steps of a small random Llama on this host's CPUs, N processes over gloo on the loopback interface, with and
without adapters on all seven modules. Bytes are the kernel's own count of what the processes' sockets sent
(TCP_INFO), against what the formula says of the tokens that were computed; gloo's headers are in the first, not in the
second. Steps are timed with the small collectives under way during the base's products, and with each of them waited
for at once; the two take turns. A time on a shared machine says little; bytes do not depend on it.

Run: python -m benchmarks.bench_tensor_parallel [--rounds 8]
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import socket
import stat
import struct
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.command_line import parser_of
from benchmarks.gpu.synthetic import packed_layout
from benchmarks.record import record, say
from services.adapter_store.base_model import load_base_model
from services.engine.adapters.layout import TargetModule
from services.engine.config import EngineSettings
from services.engine.execution.communicator import Pending, ProcessGroup, SoleProcess, Traffic
from services.engine.execution.model_runner import ModelRunner
from services.engine.messages import SamplingParams
from services.engine.model.partition import Partition
from services.engine.model.random_weights import RandomWeights
from services.engine.step import BASE_SLOT, SampleRequest, ScheduledChunk, StepPlan

LAYERS, HIDDEN, INNER, HEADS, VOCABULARY = 4, 512, 1376, 8, 1024
RANK, NUM_ADAPTERS, BATCH = 16, 8, 32
SIZES = (1, 2, 4)
STEPS = 10
CONTEXT = 64

_TCP_INFO = 11
_BYTES_ACKED = struct.Struct("Q")
_BYTES_ACKED_AT = 120
"""Where tcpi_bytes_acked lies in Linux's struct tcp_info."""


class WaitingGroup(ProcessGroup):
    """A ProcessGroup whose operations are over when they have begun, when `waits`."""

    waits = False

    def begin_all_reduce(self, x: torch.Tensor, traffic: Traffic) -> Pending:
        """Waited for, if so."""
        return self._maybe_wait(super().begin_all_reduce(x, traffic))

    def begin_all_gather(self, x: torch.Tensor, traffic: Traffic) -> Pending:
        """Waited for, if so."""
        return self._maybe_wait(super().begin_all_gather(x, traffic))

    def _maybe_wait(self, pending: Pending) -> Pending:
        if self.waits:
            pending.wait()
        return pending


def main() -> None:
    """Measures every N and writes the results."""
    parser = parser_of(__doc__)
    parser.add_argument("--rounds", type=int, default=8, help="how often each way of a step is timed; 0: bytes only")
    rounds = parser.parse_args().rounds
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = write_config(Path(directory))
        for tp_size in SIZES:
            for row in measure(checkpoint, Path(directory) / f"group-{tp_size}", tp_size, rounds):
                rows.append({"tp_size": tp_size, **row})
                say(json.dumps(rows[-1]))
    if rounds:
        command = f"python -m benchmarks.bench_tensor_parallel --rounds {rounds}"
        say(f"written to {record('tensor_parallel', command, rows)}")


def write_config(directory: Path) -> Path:
    """A checkpoint directory without weights."""
    config = {
        "model_type": "llama", "num_hidden_layers": LAYERS, "hidden_size": HIDDEN, "intermediate_size": INNER,
        "num_attention_heads": HEADS, "vocab_size": VOCABULARY, "max_position_embeddings": 1024, "dtype": "float32",
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def measure(checkpoint: Path, rendezvous: Path, tp_size: int, rounds: int) -> Iterator[dict[str, object]]:
    """Rows of one N."""
    context = multiprocessing.get_context("spawn")
    ends: list[Connection] = []
    for tp_rank in range(tp_size):
        ours, theirs = context.Pipe()
        context.Process(target=work, args=(theirs, checkpoint, rendezvous, tp_rank, tp_size), daemon=True).start()
        theirs.close()
        ends.append(ours)

    def ask(**what: Any) -> list[dict[str, Any]]:
        for end in ends:
            end.send(what)
        return [end.recv() for end in ends]

    tokens = BATCH * STEPS
    ask(adapters=True, steps=1)
    sent = {adapters: ask(adapters=adapters, steps=STEPS) for adapters in (False, True)}
    if tp_size > 1:
        others = tp_size - 1
        base = 2 * LAYERS * 4 * 2 * others * tokens * HIDDEN / tp_size
        logits = 4 * others * tokens * -(-VOCABULARY // tp_size)
        lora = LAYERS * 4 * (5 + 4) * others * tokens * RANK / tp_size
        without, with_lora = ([process["wire_bytes"] for process in sent[adapters]] for adapters in (False, True))
        yield {"metric": "base_and_logits_bytes_a_process", "formula": base + logits, "on_the_wire": mean(without)}
        extra = mean(with_lora) - mean(without)
        yield {"metric": "lora_bytes_a_process", "formula": lora, "on_the_wire": extra}
        yield {"metric": "lora_share_of_layer_bytes", "value": round(lora / base, 4)}
    yield {"metric": "adapter_bytes_a_process", "value": sent[True][0]["adapter_bytes"]}
    ways = {"base": (False, False), "lora": (True, False), "lora_waited_for": (True, True)}
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(rounds):
        for name, (adapters, waits) in ways.items():
            seconds = max(process["seconds"] for process in ask(adapters=adapters, steps=STEPS, waits=waits))
            best[name] = min(best[name], seconds / STEPS)
    for name, seconds in best.items() if rounds else ():
        yield {"metric": "step_ms", "way": name, "value": round(1000 * seconds, 3)}
    for end in ends:
        end.close()


def work(end: Connection, checkpoint: Path, rendezvous: Path, tp_rank: int, tp_size: int) -> None:
    """One process: runs steps as it is asked, until the other end closes."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    device, partition = torch.device("cpu"), Partition(tp_rank, tp_size)
    group = SoleProcess() if tp_size == 1 else WaitingGroup(partition, device, rendezvous, 600.0)
    settings = EngineSettings(str(checkpoint), (), num_pages=2048, max_adapters=NUM_ADAPTERS, max_step_tokens=256)
    runner = ModelRunner(settings, RandomWeights(device, torch.float32), group)
    adapter_bytes, first_page = install_adapters(runner, checkpoint, partition)
    while True:
        try:
            asked = end.recv()
        except EOFError:
            return
        if isinstance(group, WaitingGroup):
            group.waits = asked.get("waits", False)
        before, began = wire_bytes(), time.perf_counter()
        for step in range(asked["steps"]):
            runner.execute(decode_plan(first_page, asked["adapters"], step))
        seconds = time.perf_counter() - began
        time.sleep(0.2)  # what was sent is acknowledged
        end.send({"seconds": seconds, "wire_bytes": wire_bytes() - before, "adapter_bytes": adapter_bytes})


def install_adapters(runner: ModelRunner, checkpoint: Path, partition: Partition) -> tuple[int, int]:
    """Random adapters on all modules; bytes of one, and the first page behind them."""
    layout = packed_layout(load_base_model(str(checkpoint)), RANK, tuple(TargetModule), partition)
    num_pages = layout.num_pages(runner.pool_config.page_elems)
    weights = np.random.default_rng(0).standard_normal(LAYERS * layout.layer_elems, np.float32) * np.float32(0.01)
    for slot in range(NUM_ADAPTERS):
        pages = range(slot * num_pages, (slot + 1) * num_pages)
        runner.adapter_device.check(layout)
        runner.adapter_device.write(layout, pages, memoryview(weights.tobytes()))
        runner.adapter_device.enter(slot, layout, pages)
    return weights.nbytes, NUM_ADAPTERS * num_pages


def decode_plan(first_page: int, adapters: bool, step: int) -> StepPlan:
    """A decode step of BATCH sequences, the adapters in turn; its KV is whatever the pages hold."""
    pages_each = -(-(CONTEXT + STEPS) // 16)
    sample = SampleRequest(SamplingParams(temperature=0.0), (1,), (), 0)
    chunks = []
    for number in range(BATCH):
        first = first_page + number * pages_each
        slot = number % NUM_ADAPTERS if adapters else BASE_SLOT
        table, token = list(range(first, first + pages_each)), random.Random(number).randrange(VOCABULARY)
        chunks.append(ScheduledChunk(number, [token], CONTEXT + step, table, slot, sample))
    return StepPlan(tuple(chunks))


def wire_bytes() -> int:
    """Bytes that this process's TCP connections have sent and heard acknowledged, as the kernel counts them."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            is_socket = stat.S_ISSOCK(os.fstat(int(name)).st_mode)
        except OSError:
            continue  # the directory that is being listed
        if is_socket:
            with socket.socket(fileno=os.dup(int(name))) as sock:
                if sock.type == socket.SOCK_STREAM and sock.family in (socket.AF_INET, socket.AF_INET6):
                    info = sock.getsockopt(socket.IPPROTO_TCP, _TCP_INFO, 256)
                    total += _BYTES_ACKED.unpack_from(info, _BYTES_ACKED_AT)[0]
    return total


def mean(values: list[float]) -> float:
    """Their mean."""
    return sum(values) / len(values)


if __name__ == "__main__":
    main()
