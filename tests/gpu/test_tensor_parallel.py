"""Two accelerators say what one says: NCCL, captured decode steps with collectives in them, shards of adapters.

In bfloat16, where sums in another order are rounded to other numbers: the measure is how far one accelerator alone is
from float32.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from services.engine.config import EngineSettings
from services.engine.execution.communicator import ProcessGroup, SoleProcess
from services.engine.execution.gpu.gpu_runner import GpuRunner
from services.engine.execution.model_runner import ModelRunner
from services.engine.model.partition import Partition
from tests.fixtures.adapter_kinds import ATTENTION, MLP, peft_model
from tests.fixtures.adapter_packer import pack_adapter
from tests.fixtures.shard_packer import pack_shard
from tests.fixtures.sharded_runs import Ask, Outcome, PackedAdapter, run_model
from tests.fixtures.tiny_models import make_checkpoint

TP_SIZE = 2
START_SECONDS = 300.0

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(torch.cuda.device_count() < TP_SIZE, reason="needs two accelerators"),
]

SIZES: dict[str, Any] = {
    "vocab_size": 4096, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 4,
}  # fmt: skip
KINDS: dict[str, dict[str, object]] = {
    "attention-8": {"r": 8, "target_modules": ATTENTION},
    "all-64": {"r": 64, "target_modules": ATTENTION + MLP},
    "all-17": {"r": 17, "target_modules": ATTENTION + MLP, "use_rslora": True},
    "q-1": {"r": 1, "target_modules": ["q_proj"]},
}


def run_process(end: Any, tp_rank: int, rendezvous: Path, settings: EngineSettings, arguments: tuple[Any, ...]) -> None:
    own = settings.for_process(tp_rank)
    torch.cuda.set_device(tp_rank)
    group = ProcessGroup(Partition(tp_rank, TP_SIZE), torch.device(own.device), rendezvous, START_SECONDS)
    end.send(run_model(group, own, *arguments, GpuRunner))
    end.recv()  # both are done
    # As an engine's processes end: NCCL would wait for graphs that hold its collectives.
    os._exit(0)


def run_on_two(rendezvous: Path, settings: EngineSettings, *arguments: Any) -> list[Outcome]:
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(TP_SIZE)]
    processes = [
        context.Process(target=run_process, args=(pipes[n][1], n, rendezvous, settings, arguments), daemon=True)
        for n in range(TP_SIZE)
    ]
    for process in processes:
        process.start()
    outcomes = []
    for ours, _ in pipes:
        assert ours.poll(START_SECONDS), "a process does not answer"
        outcomes.append(ours.recv())
    for ours, _ in pipes:
        ours.send(None)
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    return outcomes


def distance(outcome: Outcome, exact: Outcome) -> float:
    """Root mean square of the log-probabilities' differences, over the tokens up to the first that differs."""
    squares = []
    for ours, theirs in zip(outcome.results, exact.results, strict=True):
        for result, expected in zip(ours, theirs, strict=True):
            a, b = dict(result.top), dict(expected.top)
            squares += [(a[token] - b[token]) ** 2 for token in b]
            if result.token_id != expected.token_id:
                break
    return float(torch.tensor(squares).mean().sqrt())


def test_two_accelerators(tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(2**31)
    print("seed", seed)
    rng = random.Random(seed)
    checkpoint = make_checkpoint(tmp_path / "base", "llama", seed=seed, dtype=torch.bfloat16, **SIZES)
    model, names = peft_model(checkpoint, KINDS, seed), list(KINDS)
    adapters = [*range(len(names)), None, *rng.choices([*range(len(names)), None], k=15)]
    asks = [
        Ask(a, [rng.randrange(4096) for _ in range(rng.choice([1, 30, 200]))], 10, rng.choice([0, 4])) for a in adapters
    ]
    settings = EngineSettings(
        str(checkpoint), (), device="cuda", num_pages=3000, max_adapters=8, max_running=32, max_step_tokens=1024
    ).for_device()

    def packed(tp_size: int, dtype: torch.dtype = torch.bfloat16) -> Sequence[Sequence[PackedAdapter]]:
        def pack(name: str, tp_rank: int) -> PackedAdapter:
            if tp_size == 1:
                layout, weights = pack_adapter(model, name, 128, dtype, grouped=True)
            else:
                layout, weights = pack_shard(model, name, 128, tp_rank, tp_size, dtype)
            return layout, bytes(weights)

        return [[pack(name, tp_rank) for name in names] for tp_rank in range(tp_size)]

    two = run_on_two(
        tmp_path / "rendezvous", dataclasses.replace(settings, tp_size=TP_SIZE), packed(TP_SIZE), asks, seed
    )
    one = run_model(SoleProcess(), settings, packed(1), asks, seed, GpuRunner)
    on_cpu = dataclasses.replace(settings, device="cpu", dtype="float32")
    exact = run_model(SoleProcess(), on_cpu, packed(1, torch.float32), asks, seed, ModelRunner)
    assert [[r.token_id for r in results] for results in two[0].results] == [
        [r.token_id for r in results] for results in two[1].results
    ]
    ours, theirs = distance(two[0], exact), distance(one, exact)
    print(f"distance to float32: two accelerators {ours:.4f}, one {theirs:.4f}")
    assert ours <= 1.2 * theirs
