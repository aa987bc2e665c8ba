"""The mixed-batch baseline says what PEFT says for each request alone."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.peft_baseline import BaselineRequest, PeftBaseline, load_peft_model, run_peft_baseline

# transformers' and PEFT's own notes to each other.
pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.filterwarnings("ignore::UserWarning")]

ADAPTERS: dict[str, dict[str, Any]] = {
    "one": {"r": 1, "target_modules": ["q_proj"]},
    "two": {"r": 5, "target_modules": ["down_proj", "v_proj"], "use_rslora": True},
    # Layer 1 only: the other layer's modules know nothing of it.
    "three": {"r": 8, "target_modules": ["k_proj", "o_proj"], "layers_to_transform": [1]},
}


@pytest.fixture(scope="module")
def seed() -> int:
    return random.SystemRandom().randrange(2**31)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, seed: int) -> tuple[Path, dict[str, Path]]:
    directory = tmp_path_factory.mktemp("baseline")
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        # The end of sequence, 0, is often drawn from so small a vocabulary.
        bos_token_id=1,
        eos_token_id=0,
        pad_token_id=2,
    )
    base: Any = LlamaForCausalLM(config)
    for parameter in base.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    base.save_pretrained(directory / "base")
    model: Any = None
    for name, options in ADAPTERS.items():
        adapter = LoraConfig(lora_alpha=16, init_lora_weights=False, task_type="CAUSAL_LM", **options)
        if model is None:
            model = get_peft_model(base, adapter, adapter_name=name)
        else:
            model.add_adapter(name, adapter)
    model.save_pretrained(directory)
    return directory / "base", {name: directory / name for name in ADAPTERS}


def requests_from(seed: int) -> list[BaselineRequest]:
    draw = random.Random(seed)
    return [
        BaselineRequest(
            tuple(draw.randrange(3, 48) for _ in range(draw.randrange(1, 20))),
            draw.randrange(1, 25),
            draw.choice([None, *ADAPTERS]),
        )
        for _ in range(30)
    ]


def alone(model: Any, request: BaselineRequest, ignore_eos: bool) -> tuple[int, ...]:
    """Greedy, without cache, padding or neighbours."""
    tokens: list[int] = []
    if request.adapter is None:
        with model.disable_adapter():
            return alone_step(model, request, ignore_eos, tokens)
    model.set_adapter(request.adapter)
    return alone_step(model, request, ignore_eos, tokens)


@torch.inference_mode()
def alone_step(model: Any, request: BaselineRequest, ignore_eos: bool, tokens: list[int]) -> tuple[int, ...]:
    while len(tokens) < request.max_tokens and (ignore_eos or 0 not in tokens):
        logits = model(input_ids=torch.tensor([[*request.prompt_ids, *tokens]])).logits
        tokens.append(int(logits[0, -1].argmax()))
    return tuple(tokens)


@pytest.mark.parametrize(("ignore_eos", "max_loaded"), [(False, 3), (True, 3), (False, 2)])
def test_mixed_batches_give_what_each_request_gives_alone(
    places: tuple[Path, dict[str, Path]], seed: int, ignore_eos: bool, max_loaded: int
) -> None:
    model = load_peft_model(*places)
    requests = requests_from(seed)
    batches: list[int] = []
    # Room for two of the three adapters makes it load them for batches in turn.
    baseline = PeftBaseline(*places, max_loaded=max_loaded)
    run = baseline.run(requests, 7, ignore_eos, measure_margins=True, advance=batches.append)
    assert batches == [7, 7, 7, 7, 2]
    assert run.seconds > 0
    for i, request in enumerate(requests):
        expected = alone(model, request, ignore_eos)
        # Where the two best tokens are this close, rounding may pick either.
        assert run.token_ids[i] == expected or run.margins[i] < 1e-4, f"seed {seed}, request {i}: {request}"
        if ignore_eos:
            assert len(run.token_ids[i]) == request.max_tokens
    assert run.num_tokens == sum(len(ids) for ids in run.token_ids)


def test_adapters_change_the_answers_and_base_rows_keep_theirs(places: tuple[Path, dict[str, Path]], seed: int) -> None:
    draw = random.Random(seed)
    # Several: an adapter of rank 1 may well leave the answer to one prompt as it is.
    prompts = [tuple(draw.randrange(3, 48) for _ in range(5)) for _ in range(8)]
    models = (None, *ADAPTERS, None)
    requests = [BaselineRequest(prompt, 20, model) for model in models for prompt in prompts]
    answers = run_peft_baseline(*places, requests, ignore_eos=True).token_ids
    of_models = [answers[i : i + len(prompts)] for i in range(0, len(answers), len(prompts))]
    assert len(set(of_models)) == 4, f"seed {seed}"
    assert of_models[0] == of_models[-1]


def test_no_adapter_at_all_is_an_error(places: tuple[Path, dict[str, Path]]) -> None:
    with pytest.raises(ValueError, match="at least one adapter"):
        PeftBaseline(places[0], {})
