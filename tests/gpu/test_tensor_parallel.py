"""Two accelerators say what one says: NCCL, captured decode steps with collectives in them, shards of adapters.

In bfloat16, where sums in another order are rounded to other numbers: the measure is how far one accelerator alone is
from float32. Where there is one accelerator, it computes its half of the model, with NCCL's collectives of one process
in captured steps, and is held to the same half in torch.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from services.engine.config import EngineSettings
from services.engine.execution.communicator import Communicator, ProcessGroup, SoleProcess
from services.engine.execution.gpu.gpu_runner import GpuRunner
from services.engine.execution.model_runner import ModelRunner
from services.engine.model.partition import Partition
from tests.fixtures.adapter_kinds import ATTENTION, MLP, peft_model
from tests.fixtures.adapter_packer import pack_adapter
from tests.fixtures.lone_half import LoneHalf
from tests.fixtures.shard_packer import pack_shard
from tests.fixtures.sharded_runs import Ask, Outcome, PackedAdapter, run_model
from tests.fixtures.tiny_models import make_checkpoint

TP_SIZE = 2
START_SECONDS = 300.0

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

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


def run_half(end: Any, tp_rank: int, rendezvous: Path, settings: EngineSettings, arguments: tuple[Any, ...]) -> None:
    group_of_one = ProcessGroup(Partition(), torch.device(settings.device), rendezvous, START_SECONDS)
    end.send(run_model(LoneHalf(tp_rank, group_of_one), settings, *arguments, GpuRunner))
    end.recv()
    os._exit(0)


def run_processes(run: Callable[..., None], tp_ranks: Sequence[int], *arguments: Any) -> list[Outcome]:
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in tp_ranks]
    processes = [
        context.Process(target=run, args=(end, tp_rank, *arguments), daemon=True)
        for (_, end), tp_rank in zip(pipes, tp_ranks, strict=True)
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


@dataclass(frozen=True)
class Work:
    """A model, adapters of several kinds, and sequences that ask for them."""

    settings: EngineSettings
    adapters: Any
    names: Sequence[str]
    asks: Sequence[Ask]
    seed: int

    @classmethod
    def draw(cls, directory: Path, **settings: Any) -> Work:
        seed = random.SystemRandom().randrange(2**31)
        print("seed", seed)
        rng = random.Random(seed)
        checkpoint = make_checkpoint(directory / "base", "llama", seed=seed, dtype=torch.bfloat16, **SIZES)
        names = list(KINDS)
        chosen = [*range(len(names)), None, *rng.choices([*range(len(names)), None], k=15)]
        prompts = [rng.choices(range(SIZES["vocab_size"]), k=rng.choice([1, 30, 200])) for _ in chosen]
        asks = [Ask(a, prompt, 10, rng.choice([0, 4])) for a, prompt in zip(chosen, prompts, strict=True)]
        fields = {"num_pages": 3000, "max_adapters": 8, "max_running": 32, "max_step_tokens": 1024} | settings
        own = EngineSettings(str(checkpoint), (), **fields).for_device()
        return cls(own, peft_model(checkpoint, KINDS, seed), names, asks, seed)

    def packed(self, tp_size: int, dtype: torch.dtype = torch.bfloat16) -> Sequence[Sequence[PackedAdapter]]:
        """The adapters' weights, by process."""

        def pack(name: str, tp_rank: int) -> PackedAdapter:
            if tp_size == 1:
                layout, weights = pack_adapter(self.adapters, name, 128, dtype, grouped=True)
            else:
                layout, weights = pack_shard(self.adapters, name, 128, tp_rank, tp_size, dtype)
            return layout, bytes(weights)

        return [[pack(name, tp_rank) for name in self.names] for tp_rank in range(tp_size)]

    def on_cpu(self, communicator: Communicator, dtype: str) -> Outcome:
        """What torch's own ops say."""
        settings = dataclasses.replace(self.settings, device="cpu", dtype=dtype)
        packed = self.packed(communicator.partition.tp_size, getattr(torch, dtype))
        return run_model(communicator, settings, packed, self.asks, self.seed, ModelRunner)


@pytest.mark.skipif(torch.cuda.device_count() < TP_SIZE, reason="needs two accelerators")
def test_two_accelerators(tmp_path: Path) -> None:
    work = Work.draw(tmp_path, device="cuda")
    shared = dataclasses.replace(work.settings, tp_size=TP_SIZE)
    rendezvous = tmp_path / "rendezvous"
    two = run_processes(run_process, range(TP_SIZE), rendezvous, shared, (work.packed(TP_SIZE), work.asks, work.seed))
    one = run_model(SoleProcess(), work.settings, work.packed(1), work.asks, work.seed, GpuRunner)
    exact = work.on_cpu(SoleProcess(), "float32")
    assert [[r.token_id for r in results] for results in two[0].results] == [
        [r.token_id for r in results] for results in two[1].results
    ]
    ours, theirs = distance(two[0], exact), distance(one, exact)
    print(f"distance to float32: two accelerators {ours:.4f}, one {theirs:.4f}")
    assert ours <= 1.2 * theirs


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
def test_one_accelerator_computes_its_half(tmp_path: Path) -> None:
    work = Work.draw(tmp_path, device="cuda:0", tp_size=TP_SIZE)
    tp_rank = work.seed % TP_SIZE
    arguments = (work.packed(TP_SIZE), work.asks, work.seed)
    (half,) = run_processes(run_half, [tp_rank], tmp_path / "rendezvous", work.settings, arguments)
    exact, rounded = (work.on_cpu(LoneHalf(tp_rank, SoleProcess()), dtype) for dtype in ("float32", "bfloat16"))
    ours, theirs = distance(half, exact), distance(rounded, exact)
    print(f"distance to float32: half {tp_rank} on an accelerator {ours:.4f}, in torch {theirs:.4f}")
    assert ours <= 1.2 * theirs
