"""N processes say what one says, send what the formula says, and hold a part each. Over gloo, on tiny models."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from services.engine.adapters.layout import AdapterLayout
from services.engine.config import EngineSettings
from services.engine.execution.communicator import SoleProcess
from services.engine.execution.gpu.gpu_runner import GpuRunner
from services.engine.model.config import CheckpointError, load_model_config
from services.engine.model.partition import Partition
from tests.fixtures.adapter_kinds import ATTENTION, KINDS, MLP, peft_model
from tests.fixtures.adapter_packer import pack_adapter
from tests.fixtures.process_group import ProcessGroups
from tests.fixtures.runner_driver import SMALL_SIZES
from tests.fixtures.shard_packer import pack_shard
from tests.fixtures.sharded_runs import Ask, Outcome, PackedAdapter, refuse, run_model
from tests.fixtures.tiny_models import FAMILIES, make_checkpoint

TOLERANCE = 1e-4
"""On log-probabilities in float32; tokens may differ where the two best are closer."""

VOCABULARY = 211
TILE = 16


@pytest.fixture
def rng() -> random.Random:
    seed = random.SystemRandom().randrange(2**31)
    print("seed", seed)
    return random.Random(seed)


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, ProcessGroups]]:
    directory = tmp_path_factory.mktemp("rendezvous")
    with ProcessGroups(2, directory) as two, ProcessGroups(4, directory) as four:
        yield {2: two, 4: four}


def settings_for(checkpoint: Path, num_pages: int = 4000, **fields: Any) -> EngineSettings:
    return EngineSettings(str(checkpoint), (), num_pages=num_pages, max_adapters=32, **fields).for_device()


def shards(model: Any, names: list[str], tp_size: int, dtype: torch.dtype = torch.float32) -> list[list[PackedAdapter]]:
    """By process: each adapter's shard, or the whole of it."""

    def pack(name: str, tp_rank: int) -> PackedAdapter:
        if tp_size == 1:
            layout, weights = pack_adapter(model, name, TILE, dtype, grouped=True)
        else:
            layout, weights = pack_shard(model, name, TILE, tp_rank, tp_size, dtype)
        return layout, bytes(weights)

    return [[pack(name, tp_rank) for name in names] for tp_rank in range(tp_size)]


def assert_same(got: Outcome, wanted: Outcome, asks: list[Ask]) -> None:
    """Tokens equal, up to the first where one process itself has a tie; log-probabilities close."""
    for ask, ours, theirs in zip(asks, got.results, wanted.results, strict=True):
        for place, (result, expected) in enumerate(zip(ours, theirs, strict=True)):
            assert result.error is None
            assert expected.error is None
            logprobs, expected_logprobs = dict(result.top), dict(expected.top)
            assert max(abs(logprobs[t] - expected_logprobs[t]) for t in expected_logprobs) < TOLERANCE, (ask, place)
            if result.token_id != expected.token_id:
                best, second = (value for _, value in expected.top[:2])
                assert best - second < TOLERANCE, f"{ask}: token {place} is {result.token_id}, not {expected.token_id}"
                break


def said(outcome: Outcome) -> list[list[tuple[int, object]]]:
    return [[(result.token_id, result.top) for result in results] for results in outcome.results]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_adapter_kind_in_one_batch(
    tmp_path: Path, rng: random.Random, groups: dict[int, ProcessGroups], family: str
) -> None:
    """With 2 KV heads and 4 query heads: at N = 4 there are fewer KV heads than processes."""
    seed = rng.randrange(2**31)
    checkpoint = make_checkpoint(tmp_path / "base", family, seed=seed, num_hidden_layers=2)
    model, names = peft_model(checkpoint, KINDS, seed), list(KINDS)
    # One layer of two is changed, and patterns name layer 1.
    adapters = [*range(len(names)), *([3] * 9), None, None]
    rng.shuffle(adapters)
    asks = [
        Ask(adapter, [rng.randrange(VOCABULARY) for _ in range(rng.choice([1, 2, 7, 40]))], 3, rng.choice([0, 2]))
        for adapter in adapters
    ]
    settings = settings_for(checkpoint)
    wanted = run_model(SoleProcess(), settings, shards(model, names, 1), asks, seed)
    for tp_size, group in groups.items():
        outcomes = group.call(run_model, settings, shards(model, names, tp_size), asks, seed)
        for outcome in outcomes:
            assert_same(outcome, wanted, asks)
            assert said(outcome) == said(outcomes[0]), "processes differ in their bits"
            assert outcome.adapter_pages == outcomes[0].adapter_pages


@pytest.mark.slow
def test_the_accelerators_path(tmp_path: Path, rng: random.Random, groups: dict[int, ProcessGroups]) -> None:
    """Its kernels in triton's interpreter, over gloo: decode in rows, prefill in segments, both in one step."""
    seed = rng.randrange(2**31)
    # Rows of 16, 32, 48 and 64 features in a shard: whole tiles of 16.
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    checkpoint = make_checkpoint(tmp_path / "base", "qwen3", seed=seed, **sizes)
    kinds: dict[str, dict[str, object]] = {
        "all": {"r": 9, "target_modules": ATTENTION + MLP, "rank_pattern": {"k_proj": 2}},
        "odd": {"r": 3, "target_modules": ["v_proj", "o_proj"]},
    }
    model, names = peft_model(checkpoint, kinds, seed), list(kinds)
    # One step of rows alone, then one with both.
    asks = [
        Ask(adapter, [rng.randrange(VOCABULARY) for _ in range(length)], num_tokens, begins_at)
        for adapter, length, num_tokens, begins_at in ((0, 1, 2, 0), (1, 4, 1, 1), (None, 1, 1, 0))
    ]
    settings = settings_for(checkpoint, num_pages=300, max_running=8, max_step_tokens=64)
    wanted = run_model(SoleProcess(), settings, shards(model, names, 1), asks, seed)
    padded = functools.partial(GpuRunner, sizes=SMALL_SIZES)
    outcomes = groups[2].call(run_model, settings, shards(model, names, 2), asks, seed, padded)
    for outcome in outcomes:
        assert_same(outcome, wanted, asks)
        assert said(outcome) == said(outcomes[0]), "processes differ in their bits"


@pytest.mark.parametrize("tp_size", [2, 4])
def test_bytes_on_the_wire_are_the_formula(
    tmp_path: Path, rng: random.Random, groups: dict[int, ProcessGroups], tp_size: int
) -> None:
    """S-LoRA section 6: of B tokens a layer's attention sends 2 (N-1) B h / N numbers, LoRA 5 (N-1) B r / N more.

    The feed-forward half sends as much, with two modules that share a gathering instead of three: 4 (N-1) B r / N.
    """
    rank, hidden, num_layers = 8, 48, 2
    checkpoint = make_checkpoint(tmp_path / "base", "llama", seed=rng.randrange(2**31), num_hidden_layers=num_layers)
    kinds: dict[str, dict[str, object]] = {
        "attention": {"r": rank, "target_modules": ATTENTION},
        "all": {"r": rank, "target_modules": ATTENTION + MLP},
        "odd": {"r": 3, "target_modules": ["q_proj", "v_proj"]},
    }
    model, names = peft_model(checkpoint, kinds, rng.randrange(2**31)), list(kinds)
    settings, packed = settings_for(checkpoint), shards(model, names, tp_size)

    def sent(adapter: int | None, num_tokens: int) -> dict[str, int]:
        asks = [Ask(adapter, [rng.randrange(VOCABULARY) for _ in range(num_tokens)], 1)]
        outcomes: list[Outcome] = groups[tp_size].call(run_model, settings, packed, asks, 1)
        assert all(outcome.sent_bytes == outcomes[0].sent_bytes for outcome in outcomes)
        return outcomes[0].sent_bytes

    num_tokens, others = rng.randint(5, 30), tp_size - 1
    # The driver draws chunks, so tokens are what is certain, not steps: every token goes through every layer once.
    base = 2 * num_layers * 4 * (2 * others * num_tokens * hidden) // tp_size
    attention = num_layers * 4 * (5 * others * num_tokens * rank) // tp_size
    feed_forward = num_layers * 4 * (4 * others * num_tokens * rank) // tp_size
    without, with_attention, with_all = (sent(adapter, num_tokens) for adapter in (None, 0, 1))
    assert without["base"] == with_attention["base"] == with_all["base"] == base
    assert without.get("lora", 0) == 0
    assert with_attention["lora"] == attention
    assert with_all["lora"] == attention + feed_forward
    # Ranks that N does not divide: a process sends whole rows.
    assert sent(2, num_tokens)["lora"] == num_layers * 4 * others * num_tokens * -(-2 * 3 // tp_size)


@pytest.mark.parametrize("tp_size", [2, 4, 8])
def test_a_process_holds_its_part_of_an_adapter(tmp_path: Path, tp_size: int) -> None:
    """Where every size can be divided, exactly 1/N; and the parts are the whole: nothing is held twice."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 8}
    checkpoint = make_checkpoint(tmp_path / "base", "llama", num_hidden_layers=1, **sizes)
    model = peft_model(checkpoint, {"all": {"r": 8, "target_modules": ATTENTION + MLP}}, 1)
    whole, _ = pack_adapter(model, "all", TILE, grouped=True)
    parts: list[AdapterLayout] = [pack_shard(model, "all", TILE, n, tp_size)[0] for n in range(tp_size)]
    assert {part.layer_elems * tp_size for part in parts} == {whole.layer_elems}


def test_models_that_cannot_be_cut_are_refused(tmp_path: Path, groups: dict[int, ProcessGroups]) -> None:
    for fields, what in (
        ({"num_attention_heads": 6, "num_key_value_heads": 6, "hidden_size": 48}, "6 attention heads"),
        ({"intermediate_size": 82}, "82 intermediate features"),
        ({"num_attention_heads": 12, "num_key_value_heads": 6, "hidden_size": 48}, "6 key-value heads and tp_size 4"),
    ):
        checkpoint = make_checkpoint(tmp_path / what, "llama", num_hidden_layers=1, **fields)
        with pytest.raises(CheckpointError, match=what):
            Partition(0, 4).part_of(load_model_config(checkpoint))
    assert all("key-value" in error for error in groups[4].call(refuse, checkpoint))
