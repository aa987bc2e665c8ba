"""The same tokens with and without the prefix cache: the whole core, a real model, real adapters, random traffic."""

from __future__ import annotations

import dataclasses
import hashlib
import random
import threading
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.synthetic import SyntheticAdapters, make_adapters
from services.common.packed_digest import packed_digest
from services.engine.adapters.source import AdapterManifest
from services.engine.config import EngineSettings
from services.engine.core.engine_core import EngineCore
from services.engine.execution.model_runner import ModelRunner
from services.engine.memory.prefix_cache import PrefixCache
from services.engine.messages import Adapter, Generate, SamplingParams, StepReport, StopParams, TokenEvent
from services.engine.scheduling.sequence import Sequence
from tests.fixtures.tiny_models import make_checkpoint

GREEDY = SamplingParams(temperature=0.0, num_logprobs=2)
TIE = 1e-3
"""Where the two best tokens are closer, rounding may pick either: KV of other steps differs in its last bits."""

TINY_POOL = 80
"""Pages of four tokens: an adapter or two and a few sequences."""


def make_source(runner: ModelRunner, seed: int) -> SyntheticAdapters:
    """Three adapters that say different things. The third is the first one's name with other content."""
    shaped = make_adapters(runner.config, "S1", "all", 3, runner.adapter_device)
    manifests, weights, adapters = {}, {}, []
    generator = torch.Generator().manual_seed(seed)
    for number, (adapter, name) in enumerate(zip(shaped.adapters, ("poet@1", "cook@1", "poet@1"), strict=True)):
        digest = f"sha256:{hashlib.sha256(bytes([number])).hexdigest()}"
        layout = dataclasses.replace(shaped.manifests[adapter.digest].layout, digest=digest)
        packed = torch.randn(layout.num_layers, layout.layer_elems, generator=generator) * 0.25
        content = memoryview(packed.numpy().tobytes())
        manifests[digest] = AdapterManifest(layout, content.nbytes, packed_digest(content))
        weights[digest] = content
        adapters.append(Adapter(name, digest))
    return SyntheticAdapters(manifests, weights, tuple(adapters))


def traffic(draw: random.Random, adapters: tuple[Adapter, ...], vocab_size: int) -> list[Generate]:
    """Conversations under three system prompts; in the middle `poet` is uploaded again."""
    systems = [[draw.randrange(3, vocab_size) for _ in range(draw.randint(20, 70))] for _ in range(3)]
    requests = []
    for number in range(28):
        own = [draw.randrange(3, vocab_size) for _ in range(draw.randint(1, 20))]
        poet = adapters[0] if number < 14 else adapters[2]
        adapter = draw.choice([None, poet, adapters[1]])
        stop = StopParams(draw.randint(1, 10), ignore_eos=True)
        requests.append(Generate(number, [*draw.choice(systems), *own], GREEDY, stop, adapter))
    return requests


@dataclass
class Answers:
    """What a core gave."""

    events: dict[int, list[TokenEvent]] = field(default_factory=dict)
    num_found: int = 0
    num_preemptions: int = 0

    def note(self, report: StepReport) -> None:
        assert not report.failures
        self.num_found = report.load.num_prefix_found_tokens_total
        self.num_preemptions = report.load.num_preemptions_total
        for event in report.tokens:
            self.events.setdefault(event.request_id, []).append(event)


def serve(
    runner: ModelRunner, settings: EngineSettings, source: SyntheticAdapters, requests: list[Generate], seed: int
) -> Answers:
    """All requests, which come a few at a time."""
    draw, news, answers = random.Random(seed), threading.Event(), Answers()
    core = EngineCore(settings, runner, source, news.set)
    coming, num_ended = list(requests), 0
    while num_ended < len(requests):
        for _ in range(draw.randint(0, 3)):
            if coming:
                core.handle(coming.pop(0))
        news.clear()
        report = core.step()
        if report is not None:
            answers.note(report)
            num_ended += sum(event.finish is not None for event in report.tokens)
        elif core.needs_event and not coming:
            assert news.wait(60)
    assert core.close()
    return answers


def assert_same(one: list[TokenEvent], other: list[TokenEvent], what: str) -> None:
    """Equal up to a position, if any, where the model itself was in doubt."""
    assert len(one) == len(other)
    for place, (a, b) in enumerate(zip(one, other, strict=True)):
        if a.token_id != b.token_id:
            gap = a.top[0][1] - a.top[1][1]
            assert gap < TIE, f"{what}, token {place}: {a.token_id} and {b.token_id}, {gap} apart"
            return
        assert a.logprob == pytest.approx(b.logprob, abs=1e-3), f"{what}, token {place}"


@dataclass
class Pressure:
    """Counts, in a core, prompts' pages that are evicted from the prefix cache, and what resumed sequences found."""

    num_evicted: int = 0
    num_resumed: int = 0
    num_found_again: int = 0

    @property
    def is_high(self) -> bool:
        return self.num_resumed >= 5 and self.num_found_again >= 2 and self.num_evicted >= 100

    def watch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        evict, run = PrefixCache.evict, Sequence.run

        def counting_evict(cache: PrefixCache, num_pages: int) -> None:
            before = cache.num_idle
            evict(cache, num_pages)
            self.num_evicted += before - cache.num_idle

        def counting_run(sequence: Sequence, adapter_slot: int) -> None:
            self.num_resumed += sequence.has_run
            self.num_found_again += sequence.has_run and sequence.num_computed > 0
            run(sequence, adapter_slot)

        monkeypatch.setattr(PrefixCache, "evict", counting_evict)
        monkeypatch.setattr(Sequence, "run", counting_run)


def crowd(draw: random.Random, adapters: tuple[Adapter, ...], vocab_size: int) -> list[Generate]:
    """Conversations that go on, several with each adapter, under few system prompts: short prompts, long answers, so
    that all grow at once. A third in `poet` is uploaded again, and requests for the old one still come after it."""
    systems = [[draw.randrange(3, vocab_size) for _ in range(draw.randint(9, 21))] for _ in range(3)]
    requests: list[Generate] = []
    for number in range(36):
        poet = adapters[0] if number < 12 or draw.random() < 0.2 else adapters[2]
        adapter = draw.choice([None, poet, poet, adapters[1]])
        origin = draw.choice(requests).prompt_ids if requests and draw.random() < 0.4 else draw.choice(systems)
        own = [draw.randrange(3, vocab_size) for _ in range(draw.randint(1, 6))]
        stop = StopParams(draw.randint(14, 40), ignore_eos=True)
        requests.append(Generate(number, [*origin[:60], *own], GREEDY, stop, adapter))
    return requests


@dataclass
class Crowd:
    """What a large pool without the prefix cache and a tiny one with it gave for the same requests."""

    requests: list[Generate]
    calm: Answers
    crowded: Answers


def serve_twice(directory: Path, seed: int) -> Crowd:
    draw = random.Random(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 160}
    checkpoint = make_checkpoint(directory, draw.choice(["llama", "qwen3"]), seed=seed % 1000, **sizes)
    given = {}
    for prefix_cache, num_pages in ((False, 2000), (True, TINY_POOL)):
        limits = {"num_pages": num_pages, "tokens_per_page": 4}
        limits |= {"max_step_tokens": 48, "max_running": 12, "max_adapters": 4}
        settings = EngineSettings(str(checkpoint), "", prefix_cache=prefix_cache, **limits).for_device()
        runner = ModelRunner(settings)
        source = make_source(runner, seed)
        requests = crowd(random.Random(seed), source.adapters, runner.vocab_size)
        given[prefix_cache] = serve(runner, settings, source, requests, seed)
    return Crowd(requests, given[False], given[True])


def test_a_crowd_in_a_tiny_pool_has_the_answers_of_a_large_one_without_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pressure, num_preemptions = Pressure(), 0
    pressure.watch(monkeypatch)  # without the cache, and with room for all, there is none
    # One crowd is enough nearly always; how much its sequences are in each other's way depends on when adapters come.
    for number in range(4):
        seed = random.SystemRandom().randrange(1 << 32)
        print("seed", seed)
        seen = serve_twice(tmp_path / str(number), seed)
        assert seen.calm.num_preemptions == seen.calm.num_found == 0
        assert seen.crowded.num_found > 0
        for request in seen.requests:
            what = f"seed {seed}: request {request.request_id}, {request.adapter}"
            assert_same(seen.calm.events[request.request_id], seen.crowded.events[request.request_id], what)
        num_preemptions += seen.crowded.num_preemptions
        print(pressure, "preempted", num_preemptions, "found", seen.crowded.num_found)
        if num_preemptions >= 5 and pressure.is_high:
            return
    pytest.fail("there was no crowd")


def test_random_traffic_gives_the_same_tokens_on_and_off(tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    print("seed", seed)
    draw = random.Random(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 160}
    checkpoint = make_checkpoint(tmp_path, draw.choice(["llama", "qwen3"]), seed=seed % 1000, **sizes)
    given = {}
    for prefix_cache in (False, True):
        limits = {"num_pages": 52, "max_step_tokens": 48, "max_running": 8, "max_adapters": 4}
        settings = EngineSettings(str(checkpoint), "", prefix_cache=prefix_cache, **limits).for_device()
        runner = ModelRunner(settings)
        source = make_source(runner, seed)
        requests = traffic(random.Random(seed), source.adapters, runner.vocab_size)
        given[prefix_cache] = serve(runner, settings, source, requests, seed)
    assert given[False].num_found == 0
    assert given[True].num_found > 0
    for request in requests:
        what = f"seed {seed}: request {request.request_id}, {request.adapter}"
        assert_same(given[False].events[request.request_id], given[True].events[request.request_id], what)
    print("found", given[True].num_found, "preempted", given[True].num_preemptions)
