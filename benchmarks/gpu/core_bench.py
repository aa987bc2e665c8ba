"""The engine's core as benchmarks measure it: a model on its device, random prompts, adapters of a setting."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from pathlib import Path

from triton import knobs

from benchmarks.adapter_ranks import RANKS
from benchmarks.gpu.bench_model import BenchModel
from benchmarks.gpu.core_driver import CoreDriver
from benchmarks.gpu.synthetic import WHOLE, SyntheticAdapters, make_adapters, make_runner, settings_of
from benchmarks.record import say
from services.engine.config import EngineSettings
from services.engine.execution.gpu.gpu_runner import GpuRunner
from services.engine.execution.model_runner import ModelRunner
from services.engine.messages import Adapter, Generate
from services.engine.model.partition import Partition

PROMPT, OUTPUT = 256, 128
"""Tokens of a request, where lengths are not drawn."""

SETTINGS = tuple(RANKS)


@dataclass(frozen=True)
class Bench:
    """A model on its device, and what is measured with it."""

    model: BenchModel
    settings: EngineSettings
    runner: ModelRunner | GpuRunner
    partition: Partition = WHOLE

    @classmethod
    def open(cls, model: BenchModel, scratch: Path) -> Bench:
        """Makes the model up on its device."""
        began = time.perf_counter()
        settings = settings_of(scratch, model.shape, model.max_len, model.dtype, device=model.device)
        runner = make_runner(settings)
        say(f"# {model.shape} in {time.perf_counter() - began:.1f} s: {runner.pool_config}")
        knobs.runtime.jit_post_compile_hook = _say_what_is_compiled_late
        return cls(model, settings, runner)

    def prompt(self, draw: random.Random, length: int) -> list[int]:
        """Random tokens."""
        return [draw.randrange(self.runner.vocab_size) for _ in range(length)]

    def source(self, setting: str, number: int) -> SyntheticAdapters:
        """Adapters of a setting; none for the base."""
        if setting == "base":
            return SyntheticAdapters({}, {}, ())
        config, device = self.runner.config, self.runner.adapter_device
        return make_adapters(config, setting, self.model.targets, number, device, self.partition)

    def batch(
        self, driver: CoreDriver, draw: random.Random, adapters: tuple[Adapter, ...], size: int
    ) -> list[Generate]:
        """Requests of PROMPT and OUTPUT tokens, each with another adapter as far as there are any."""
        return [
            driver.request(self.prompt(draw, PROMPT), OUTPUT, adapters[i % len(adapters)] if adapters else None)
            for i in range(size)
        ]


def _say_what_is_compiled_late(**what: object) -> None:
    """No kernel should be once a runner is up: figures that a compiler had a part in are to be known."""
    say(f"# compiled late: {what.get('repr')}")
