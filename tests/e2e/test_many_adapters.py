"""2,000 adapters served in turn by one engine whose pool holds about 20: every answer right, no growth in memory."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from slora_client import AdapterClient, AsyncSloraClient
from transformers import AutoModelForCausalLM

from services.local.stack import LocalStack
from tests.e2e.conftest import assert_no_page_lost, metric
from tests.fixtures.random_adapters import write_random_adapter
from tests.fixtures.tiny_models import make_checkpoint
from tests.fixtures.tiny_tokenizer import write_tokenizer

NUM_ADAPTERS = 2000
PAGES_FOR_ADAPTERS = 20
MAX_TOKENS = 3
TIE = 1e-4


class MergedReference:
    """The base model in transformers with one adapter's B·A·scaling added into its weights at a time, float32."""

    def __init__(self, checkpoint: Path) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()

    @torch.inference_mode()
    def lag(self, adapter: Path, prompt: list[int], answer: list[int]) -> float:
        """How far behind the best token one of the answer is at most, each judged by what stands before it."""
        tensors, deltas = load_file(adapter / "adapter_model.safetensors"), []
        for key in [key for key in tensors if key.endswith("lora_A.weight")]:
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            a, b = tensors[key], tensors[key.replace("lora_A", "lora_B")]
            deltas.append((self._model.get_submodule(name).weight, 2.0 * (b @ a)))  # lora_alpha is twice the rank
        for weight, delta in deltas:
            weight += delta
        logits = self._model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        for weight, delta in deltas:
            weight -= delta
        chosen = logits.gather(1, torch.tensor(answer)[:, None])
        return float((logits.max(dim=1, keepdim=True).values - chosen).max())


def resident_bytes(stack: LocalStack) -> dict[str, int]:
    """Private memory of each process that could grow."""
    pids = {name: stack.pid(name) for name in ("adapter-store", "engine-0", "gateway")} | {"core": stack.core_pid()}
    return {name: psutil.Process(pid).memory_full_info().uss for name, pid in pids.items()}


async def serve_in_turn(stack: LocalStack, names: list[str], prompts: dict[str, list[int]]) -> dict[str, list[int]]:
    """Each adapter's greedy answer; 16 requests are under way at a time."""
    answers, gate = {}, asyncio.Semaphore(16)
    async with AsyncSloraClient(stack.gateway_address) as client:

        async def one(name: str) -> None:
            async with gate:
                done = await client.generate(
                    name, prompts[name], temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True, timeout=60
                )
                answers[name] = list(done.token_ids)

        await asyncio.gather(*(one(name) for name in names))
    return answers


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_two_thousand_adapters_through_a_pool_for_twenty(tmp_path: Path) -> None:
    seed = random.randrange(2**31)
    print("seed", seed)
    draw = random.Random(seed)
    checkpoint = make_checkpoint(tmp_path / "base", "llama", num_hidden_layers=2, vocab_size=320, seed=seed)
    write_tokenizer(checkpoint, 320)
    vocab_size = AutoModelForCausalLM.from_pretrained(checkpoint).config.vocab_size
    directories = {
        f"a{i}": write_random_adapter(
            tmp_path / "adapters" / f"a{i}",
            checkpoint,
            rank=draw.choice([1, 2, 3, 4]),
            seed=seed + i,
            target_modules=draw.choice([("q_proj", "v_proj"), ("q_proj", "k_proj", "v_proj", "o_proj")]),
            scale=1.0,
        )
        for i in range(NUM_ADAPTERS)
    }
    prompts = {name: [draw.randrange(3, vocab_size) for _ in range(draw.randint(1, 12))] for name in directories}
    reference = MergedReference(checkpoint)

    engine_options = {"num_pages": 60, "max_model_len": 64, "max_running": 8, "num_threads": 1}
    with LocalStack(tmp_path / "state", checkpoint, engine_options=engine_options) as stack:
        with AdapterClient(stack.store_address) as store:
            for name, directory in directories.items():
                store.upload(name, directory)
        names = list(directories)
        engine = stack.metrics_urls["engine-0"]
        answers, memory, most_resident = {}, [], 0.0
        for first in range(0, NUM_ADAPTERS, 500):
            answers |= asyncio.run(serve_in_turn(stack, names[first : first + 500], prompts))
            most_resident = max(most_resident, metric(engine, "slora_engine_resident_adapters"))
            memory.append(resident_bytes(stack))
        loads = metric(engine, "slora_engine_adapter_load_seconds_count")
        lent, streamed = (
            metric(engine, "slora_engine_adapter_loaded_bytes_total", path=p) for p in ("lent", "streamed")
        )
        assert_no_page_lost(stack)

    assert loads >= NUM_ADAPTERS
    assert lent > 100 * streamed, "store and engine are on one host"
    assert most_resident < 60, "the pool was meant to be too small for many"
    for process in memory[0]:
        growth = memory[-1][process] - memory[1][process]
        assert growth < 24 * 2**20, f"{process} grew by {growth >> 20} MiB over the last 1000 adapters: {memory}"
    wrong = 0
    for name, tokens in answers.items():
        assert len(tokens) == MAX_TOKENS
        lag = reference.lag(directories[name], prompts[name], tokens)
        if lag >= TIE:
            wrong += 1
            print(name, tokens, lag)
    assert not wrong, f"{wrong} of {NUM_ADAPTERS} adapters answered wrongly"
    base_like = sum(answers[name] == answers[names[0]] for name in names)
    assert base_like < NUM_ADAPTERS // 2, "adapters must differ visibly for this test to mean anything"
