"""Token equality with transformers + PEFT through all services: four families, many adapters mixed in one batch.

The pool is so small that sequences are preempted and adapters evicted while they run; requests join and leave at
different steps. Nothing may change a token, and log-probabilities stay within 1e-4.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from pathlib import Path

import pytest
from slora_client import AsyncSloraClient
from transformers import AutoConfig

from services.local.stack import LocalStack
from tests.e2e.conftest import assert_no_page_lost, metric, upload
from tests.fixtures.adapter_kinds import KINDS
from tests.fixtures.peft_reference import PeftReference, assert_same_tokens
from tests.fixtures.tiny_models import make_adapter, make_checkpoint
from tests.fixtures.tiny_tokenizer import write_tokenizer

LARGEST = "all-200"


@dataclass(frozen=True)
class Ask:
    """One request of the workload."""

    adapter: str | None
    prompt: list[int]
    max_tokens: int
    delay_seconds: float


def draw_workload(draw: random.Random, vocab_size: int) -> list[Ask]:
    """Every adapter and twelve base-only requests, prompts of 1 to 300 tokens, in random order, over half a second.

    The largest adapter comes first and stays long; the others begin after its first token and share what is left of
    the pool, which is too little for all of them to grow.
    """

    def prompt(length: int) -> list[int]:
        return [draw.randrange(3, vocab_size) for _ in range(length)]

    lengths = [1, 2, 15, 16, 17, 300, *(draw.randint(1, 80) for _ in range(len(KINDS) - 7))]
    small = [name for name in KINDS if name != LARGEST]
    draw.shuffle(small)
    asks = [
        Ask(name, prompt(length), draw.choice([1, 20, 50, 80]), 0.1 + draw.random() * 0.4)
        for name, length in zip(small, lengths, strict=True)
    ]
    base_only = [Ask(None, prompt(draw.randint(10, 30)), draw.randint(60, 90), 0.1) for _ in range(12)]
    return [Ask(LARGEST, prompt(20), 300, 0.0), *base_only, *asks]


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_every_stream_equals_transformers_and_peft(family: str, tmp_path: Path) -> None:
    seed = random.randrange(2**31)
    print("seed", seed)
    draw = random.Random(seed)
    checkpoint = make_checkpoint(tmp_path / "base", family, num_hidden_layers=3, vocab_size=320, seed=seed)
    write_tokenizer(checkpoint, 320)
    config = AutoConfig.from_pretrained(checkpoint)
    adapters = {
        name: make_adapter(tmp_path / "adapters" / name, checkpoint, seed=seed + i, **kind)
        for i, (name, kind) in enumerate(KINDS.items())
    }
    asks = draw_workload(draw, config.vocab_size)

    async def run(stack: LocalStack) -> list[tuple[list[int], list[float]]]:
        async with AsyncSloraClient(stack.gateway_address) as client:
            largest_runs = asyncio.Event()

            async def one(ask: Ask) -> tuple[list[int], list[float]]:
                if ask.adapter != LARGEST:
                    await largest_runs.wait()
                    await asyncio.sleep(ask.delay_seconds)
                tokens, logprobs = [], []
                async for chunk in client.stream(
                    ask.adapter or stack.base_model,
                    ask.prompt,
                    temperature=0,
                    max_tokens=ask.max_tokens,
                    ignore_eos=True,
                    num_logprobs=2,
                    timeout=150,
                ):
                    largest_runs.set()
                    tokens += chunk.token_ids
                    logprobs += [entry.logprob for entry in chunk.logprobs]
                return tokens, logprobs

            return list(await asyncio.gather(*(one(ask) for ask in asks)))

    pages = _tight_pool(checkpoint, adapters)
    engine_options = {"num_pages": pages, "max_model_len": 400, "max_step_tokens": 64, "num_threads": 1}
    with LocalStack(tmp_path / "state", checkpoint, engine_options=engine_options) as stack:
        upload(stack, adapters)
        answers = asyncio.run(run(stack))
        engine = stack.metrics_urls["engine-0"]
        preemptions = metric(engine, "slora_engine_preemptions_total")
        loads = metric(engine, "slora_engine_adapter_load_seconds_count")
        resident = metric(engine, "slora_engine_resident_adapters")
        assert_no_page_lost(stack)

    assert loads > resident, "the pool was meant to be too small for all adapters"
    assert preemptions > 0, "the pool was meant to be too small for all sequences"
    reference = PeftReference(checkpoint, adapters)
    for ask, (tokens, logprobs) in zip(asks, answers, strict=True):
        what = f"{family} {ask.adapter or 'base'}, prompt of {len(ask.prompt)}"
        assert len(tokens) == ask.max_tokens, what
        expected = reference.judge(ask.prompt, tokens, ask.adapter)
        assert_same_tokens(tokens, logprobs, expected, what)


def _tight_pool(checkpoint: Path, adapters: dict[str, Path]) -> int:
    """Pages for the largest adapter, the longest sequence and a few more: far fewer than all would take."""
    config = AutoConfig.from_pretrained(checkpoint)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    page_bytes = 2 * config.num_key_value_heads * head_dim * 16 * 4
    largest = max((path / "adapter_model.safetensors").stat().st_size for path in adapters.values())
    return -(-largest // (config.num_hidden_layers * page_bytes)) + 400 // 16 + 8
