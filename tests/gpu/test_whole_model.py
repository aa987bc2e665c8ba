"""The whole model in bfloat16 on an accelerator, against transformers + PEFT in float32.

The measure is transformers' own bfloat16: our distance to float32 is at most 1.2 times its distance, and greedy tokens
are float32's wherever its two best are further apart than that noise.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from services.engine.step import BASE_SLOT
from tests.fixtures.adapter_packer import pack_adapter
from tests.fixtures.runner_driver import ALL_LOGPROBS, DrivenSequence, RunnerDriver, make_gpu_runner
from tests.fixtures.tiny_models import make_adapter, make_checkpoint, quiet

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator"),
]

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SIZES: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
}
ADAPTERS: dict[str, dict[str, Any]] = {
    "attention-8": {"target_modules": ALL[:4], "r": 8},
    "all-64": {"target_modules": ALL, "r": 64},
    "all-17": {"target_modules": ALL, "r": 17, "use_rslora": True},
    "q-1": {"target_modules": ["q_proj"], "r": 1},
}


class Oracle:
    """transformers + PEFT in one type on the accelerator."""

    def __init__(self, checkpoint: Path, adapters: dict[str, Path], dtype: torch.dtype) -> None:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        with quiet():
            self.model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype).cuda().eval()
            for number, (name, path) in enumerate(adapters.items()):
                if number == 0:
                    self.model = PeftModel.from_pretrained(
                        self.model, path, adapter_name=name, autocast_adapter_dtype=False
                    ).eval()
                else:
                    self.model.load_adapter(path, adapter_name=name, autocast_adapter_dtype=False)
            self.model.to(dtype)

    @torch.inference_mode()
    def logprobs(self, tokens: list[int], adapter: str | None) -> torch.Tensor:
        ids = torch.tensor([tokens], device="cuda")
        with quiet():
            if adapter is None:
                with self.model.disable_adapter():
                    logits = self.model(input_ids=ids).logits
            else:
                self.model.set_adapter(adapter)
                logits = self.model(input_ids=ids).logits
        return torch.log_softmax(logits[0].float(), dim=-1).cpu()


@pytest.mark.parametrize("kv_heads", [8, 2])
def test_distance_to_float32(tmp_path: Path, kv_heads: int) -> None:
    seed = random.SystemRandom().randrange(2**31)
    print("seed", seed)
    rng = random.Random(seed)
    sizes = SIZES | {"num_key_value_heads": kv_heads}
    checkpoint = make_checkpoint(tmp_path / "base", "llama", seed=seed, dtype=torch.bfloat16, **sizes)
    paths = {
        name: make_adapter(tmp_path / name, checkpoint, seed=seed + i, **fields)
        for i, (name, fields) in enumerate(ADAPTERS.items())
    }
    exact, rounded = (Oracle(checkpoint, paths, dtype) for dtype in (torch.float32, torch.bfloat16))
    driver = RunnerDriver(make_gpu_runner(checkpoint, num_pages=1000), rng, max_chunk=100)
    slots: dict[str | None, int] = {None: BASE_SLOT}
    for i, name in enumerate(ADAPTERS):
        layout, weights = pack_adapter(rounded.model, name, 128, torch.bfloat16, grouped=True)
        driver.install(i, layout, weights)
        slots[name] = i
    names = [*ADAPTERS, None, *rng.choices([*ADAPTERS, None], k=11)]
    sequences = [
        DrivenSequence(
            [rng.randrange(4096) for _ in range(rng.randint(1, 200))], 12, slots[name], ALL_LOGPROBS, rng.randint(0, 6)
        )
        for name in names
    ]
    driver.run(sequences)
    ours_off, theirs_off, num_decided = [], [], 0
    for name, sequence in zip(names, sequences, strict=True):
        begin = len(sequence.prompt) - 1
        wanted = exact.logprobs(sequence.tokens, name)[begin:-1]
        theirs = rounded.logprobs(sequence.tokens, name)[begin:-1]
        ours = torch.empty_like(wanted)
        for place, result in enumerate(sequence.results):
            ids, values = zip(*result.top, strict=True)
            ours[place, list(ids)] = torch.tensor(values)
        ours_off.append((ours - wanted).square().mean())
        theirs_off.append((theirs - wanted).square().mean())
        noise = 2 * float((theirs - wanted).abs().max())
        best = wanted.topk(2, dim=-1)
        for place, token in enumerate(sequence.output):
            if best.values[place, 0] - best.values[place, 1] > noise:
                num_decided += 1
                assert token == int(best.indices[place, 0])
    ours_rms, theirs_rms = (float(torch.stack(off).mean().sqrt()) for off in (ours_off, theirs_off))
    print(f"distance to float32: ours {ours_rms:.4f}, transformers' bfloat16 {theirs_rms:.4f}; {num_decided} decided")
    assert ours_rms <= 1.2 * theirs_rms
    assert num_decided > 0
