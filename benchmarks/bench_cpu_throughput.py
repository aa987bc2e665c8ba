"""Claim: on a CPU, through all services, slora serves a mixed batch at least 3 times as fast as transformers + PEFT.

One random Llama of about 100 million parameters, 16 adapters of ranks 8 to 64 on all seven projections, 32 requests at
once, two for each adapter, prompts and outputs of 8 to 128 tokens, outputs forced to length, greedy, float32. PEFT runs
the same requests as one mixed batch (`adapter_names`). Both run in turn in one process tree, on the same cores, three
times; the ratio compares runs side by side. Tokens are compared too.

Run: python -m benchmarks.bench_cpu_throughput   (or make bench)
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from slora_client import AdapterClient, AsyncSloraClient
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.command_line import take_no_options
from benchmarks.peft_baseline import BaselineRequest, PeftBaseline
from benchmarks.record import record, say
from services.local.stack import LocalStack

NUM_ADAPTERS, NUM_REQUESTS, NUM_ROUNDS = 16, 32, 3
RANKS = (8, 16, 32, 64)
SHORTEST, LONGEST = 8, 128
SEED = 20231103
# Where the reference's two best logits are closer than this, float32 rounding may pick either.
TIE = 2e-4


@dataclass(frozen=True)
class Measured:
    """One run of all requests."""

    seconds: float
    token_ids: tuple[tuple[int, ...], ...]

    @property
    def requests_per_s(self) -> float:
        """Finished requests a second."""
        return len(self.token_ids) / self.seconds

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens a second."""
        return sum(map(len, self.token_ids)) / self.seconds


def make_model(directory: Path) -> LlamaConfig:
    """A random Llama of about 100 million parameters, with a tokenizer that only counts."""
    config = LlamaConfig(
        vocab_size=16384,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.05,
    )
    torch.manual_seed(SEED)
    LlamaForCausalLM(config).save_pretrained(directory)
    vocabulary = {f"t{i}": i for i in range(config.vocab_size)}
    Tokenizer(models.WordLevel(vocabulary, unk_token="t0")).save(str(directory / "tokenizer.json"))
    return config


def make_adapter(directory: Path, config: LlamaConfig, rank: int, seed: int) -> Path:
    """A random PEFT adapter on all seven projections."""
    hidden, inner = config.hidden_size, config.intermediate_size
    kv = hidden // config.num_attention_heads * (config.num_key_value_heads or config.num_attention_heads)
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden, kv),
        "self_attn.v_proj": (hidden, kv),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (hidden, inner),
        "mlp.up_proj": (hidden, inner),
        "mlp.down_proj": (inner, hidden),
    }
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(config.num_hidden_layers):
        for module, (inputs, outputs) in shapes.items():
            key = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(rank, inputs, generator=generator) * inputs**-0.5
            tensors[f"{key}.lora_B.weight"] = torch.randn(outputs, rank, generator=generator) * 0.2 * rank**-0.5
    directory.mkdir(parents=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": [module.split(".")[1] for module in shapes],
        "lora_dropout": 0.0,
        "bias": "none",
    }
    (directory / "adapter_config.json").write_text(json.dumps(described))
    return directory


def draw_requests(config: LlamaConfig) -> list[BaselineRequest]:
    """32 requests, two for each adapter, in random order."""
    draw = random.Random(SEED)
    names = [f"adapter-{i % NUM_ADAPTERS}" for i in range(NUM_REQUESTS)]
    draw.shuffle(names)
    return [
        BaselineRequest(
            tuple(draw.randrange(3, config.vocab_size) for _ in range(draw.randint(SHORTEST, LONGEST))),
            draw.randint(SHORTEST, LONGEST),
            name,
        )
        for name in names
    ]


async def run_slora(stack: LocalStack, requests: list[BaselineRequest]) -> Measured:
    """All requests at once through the gateway."""
    async with AsyncSloraClient(stack.gateway_address) as client:

        async def one(request: BaselineRequest) -> tuple[int, ...]:
            done = await client.generate(
                request.adapter or stack.base_model,
                request.prompt_ids,
                temperature=0,
                max_tokens=request.max_tokens,
                ignore_eos=True,
            )
            return done.token_ids

        began = time.perf_counter()
        token_ids = await asyncio.gather(*map(one, requests))
        return Measured(time.perf_counter() - began, tuple(token_ids))


def count_differences(ours: Measured, theirs: Measured, margins: tuple[float, ...]) -> int:
    """Requests that differ although the reference was never in doubt."""
    triples = zip(ours.token_ids, theirs.token_ids, margins, strict=True)
    return sum(a != b and margin > TIE for a, b, margin in triples)


def main() -> None:
    """Measures, prints, records."""
    take_no_options(__doc__)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        say("making a random 100M-parameter Llama and 16 adapters ...")
        config = make_model(root / "model")
        adapters = {
            f"adapter-{i}": make_adapter(root / f"adapter-{i}", config, RANKS[i % len(RANKS)], SEED + i)
            for i in range(NUM_ADAPTERS)
        }
        requests = draw_requests(config)
        # Rounds repeat their prompts: they are to be computed each time, as PEFT does.
        options = {"max_running": NUM_REQUESTS, "max_step_tokens": 512, "pool_bytes": 2 * 2**30, "prefix_cache": False}
        say("starting slora and loading PEFT ...")
        with LocalStack(root / "state", root / "model", engine_options=options) as stack:
            with AdapterClient(stack.store_address) as store:
                for name, directory in adapters.items():
                    store.upload(name, directory)
            measure(stack, PeftBaseline(root / "model", adapters), requests)


def measure(stack: LocalStack, peft: PeftBaseline, requests: list[BaselineRequest]) -> None:
    """Warms both up, runs them in turn, records the figures."""
    asyncio.run(run_slora(stack, requests))
    checked = peft.run(requests, max_batch=NUM_REQUESTS, ignore_eos=True, measure_margins=True)
    ours, theirs = [], []
    for number in range(NUM_ROUNDS):
        ours.append(asyncio.run(run_slora(stack, requests)))
        run = peft.run(requests, max_batch=NUM_REQUESTS, ignore_eos=True)
        theirs.append(Measured(run.seconds, run.token_ids))
        say(
            f"round {number + 1}: slora {ours[-1].requests_per_s:.2f} requests/s, "
            f"{ours[-1].tokens_per_s:.0f} tokens/s; PEFT {theirs[-1].requests_per_s:.2f} requests/s, "
            f"{theirs[-1].tokens_per_s:.0f} tokens/s"
        )
    ratio = statistics.median(a.requests_per_s / b.requests_per_s for a, b in zip(ours, theirs, strict=True))
    differences = count_differences(ours[-1], theirs[-1], checked.margins)
    shared = {"bench": "cpu_throughput", "model": "llama-100m", "adapters": NUM_ADAPTERS, "requests": NUM_REQUESTS}
    rows: list[dict[str, object]] = []
    for system, runs in (("slora", ours), ("peft", theirs)):
        for metric, values in (
            ("requests_per_s", [run.requests_per_s for run in runs]),
            ("tokens_per_s", [run.tokens_per_s for run in runs]),
        ):
            rows.append({**shared, "system": system, "metric": metric, "value": round(statistics.median(values), 3)})
    rows.append({**shared, "system": "slora/peft", "metric": "requests_per_s_ratio", "value": round(ratio, 3)})
    rows.append({**shared, "system": "slora", "metric": "requests_that_differ_from_peft", "value": differences})
    path = record("cpu", "python -m benchmarks.bench_cpu_throughput", rows)
    say(f"slora / PEFT, requests/s: {ratio:.2f} (median of {NUM_ROUNDS}); {differences} requests differ; in {path}")
    if differences:
        raise SystemExit("answers differ from PEFT's: the figure does not count")


if __name__ == "__main__":
    main()
