"""The official `openai` client through all services: the same tokens as gRPC gives and as transformers + PEFT says."""

from __future__ import annotations

import asyncio
import random
import re
import urllib.request
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from slora_client import AsyncSloraClient, ChatMessage
from transformers import AutoTokenizer

from services.local.s3_client import S3Client, S3Place
from services.local.stack import LocalStack
from tests.e2e.conftest import assert_no_page_lost, metric, upload, wait_until
from tests.fixtures.peft_reference import PeftReference, assert_same_tokens
from tests.fixtures.random_adapters import write_random_adapter
from tests.fixtures.tiny_models import make_checkpoint
from tests.fixtures.tiny_tokenizer import write_tokenizer

NUM_ADAPTERS = 6
TEMPLATE = """{% for m in messages %}{{ '<s>' + m['role'] + ':' + m['content'] + '\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<s>assistant:' }}{% endif %}"""
MESSAGES: Any = [{"role": "system", "content": "jump"}, {"role": "user", "content": "how many adapters? 数"}]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = make_checkpoint(tmp_path_factory.mktemp("base") / "tiny", vocab_size=320, seed=random.randrange(99))
    write_tokenizer(directory, 320)
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return directory


@pytest.fixture(scope="module")
def adapters(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {
        f"a{i}": write_random_adapter(root / f"a{i}", checkpoint, rank=1 + 3 * i, seed=i, scale=1.0)
        for i in range(NUM_ADAPTERS)
    }


@pytest.fixture(scope="module")
def stack(
    checkpoint: Path, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LocalStack]:
    options = {"num_threads": 1, "num_pages": 120, "max_model_len": 200, "max_step_tokens": 48}
    gateway_options = {"http_allow_adapter_updates": True}
    state = tmp_path_factory.mktemp("openai")
    with LocalStack(state, checkpoint, engine_options=options, gateway_options=gateway_options) as running:
        upload(running, adapters)
        yield running


@pytest.fixture
async def client(stack: LocalStack) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=stack.http_url, api_key="none", max_retries=0, timeout=60) as client:
        yield client


GREEDY: Any = {"temperature": 0, "extra_body": {"ignore_eos": True, "return_token_ids": True}}


async def test_tokens_are_those_of_transformers_and_peft(
    stack: LocalStack, client: AsyncOpenAI, checkpoint: Path, adapters: dict[str, Path]
) -> None:
    reference = PeftReference(checkpoint, adapters)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    for adapter in (None, "a1", "a5"):
        done = await client.chat.completions.create(
            model=adapter or stack.base_model, messages=MESSAGES, max_tokens=12, logprobs=True, **GREEDY
        )
        prompt = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
        (choice,) = done.choices
        assert choice.logprobs is not None
        tokens, logprobs = choice.model_extra["token_ids"], [entry.logprob for entry in choice.logprobs.content or []]  # type: ignore[index]
        assert len(tokens) == 12
        expected = reference.judge(prompt, tokens, adapter)
        assert_same_tokens(tokens, logprobs, expected, f"chat with {adapter}")
        assert choice.message.content == tokenizer.decode(tokens, skip_special_tokens=True)
        assert done.usage is not None
        assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (len(prompt), 12)


async def test_both_apis_give_the_same(stack: LocalStack, client: AsyncOpenAI) -> None:
    prompt = [ChatMessage(m["role"], m["content"]) for m in MESSAGES]
    async with AsyncSloraClient(stack.gateway_address) as grpc_client:
        for seed, model in ((3, stack.base_model), (4, "a2"), (5, "a4@1")):
            said = await grpc_client.generate(model, prompt, seed=seed, max_tokens=20, ignore_eos=True, top_k=40)
            extra = {"ignore_eos": True, "top_k": 40, "return_token_ids": True}
            done = await client.chat.completions.create(
                model=model, messages=MESSAGES, seed=seed, max_completion_tokens=20, extra_body=extra
            )
            assert done.model == said.model
            assert done.choices[0].model_extra == {"token_ids": list(said.token_ids)}
            assert done.choices[0].message.content == said.text
            text = ""
            stream = await client.chat.completions.create(
                model=model, messages=MESSAGES, seed=seed, max_tokens=20, stream=True, extra_body=extra
            )
            async for chunk in stream:
                text += chunk.choices[0].delta.content or ""
            assert text == said.text


async def test_choices_are_those_of_their_seeds(stack: LocalStack, client: AsyncOpenAI) -> None:
    async def texts(**more: Any) -> list[str]:
        done = await client.completions.create(model="a3", prompt="the quick", max_tokens=12, **more)
        return [choice.text for choice in done.choices]

    together = await texts(n=3, seed=70)
    assert len(set(together)) == 3
    assert together == [(await texts(seed=seed))[0] for seed in (70, 71, 72)]


async def test_different_adapters_at_once_are_never_mixed(stack: LocalStack, client: AsyncOpenAI) -> None:
    models = [stack.base_model, *(f"a{i}" for i in range(NUM_ADAPTERS))]
    asks = [(model, f"lazy dog {number}") for model in models for number in range(4)]
    random.shuffle(asks)

    async def streamed(model: str, prompt: str) -> str:
        stream = await client.completions.create(
            model=model, prompt=prompt, max_tokens=15, temperature=0, stream=True, extra_body={"ignore_eos": True}
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    together = await asyncio.gather(*(streamed(*ask) for ask in asks))
    alone = [await streamed(*ask) for ask in asks]
    assert together == alone
    assert len({text for (_, prompt), text in zip(asks, alone, strict=True) if prompt == "lazy dog 0"}) == len(models)


async def test_stop_strings_and_the_models_length(stack: LocalStack, client: AsyncOpenAI) -> None:
    asked: Any = {"model": stack.base_model, "prompt": "the quick brown", **GREEDY}
    whole = (await client.completions.create(**asked, max_tokens=20)).choices[0].text
    stop = whole[4:7]
    (choice,) = (await client.completions.create(**asked, max_tokens=20, stop=[stop])).choices
    assert (choice.text, choice.finish_reason) == (whole[: whole.index(stop)], "stop")
    done = await client.chat.completions.create(model=stack.base_model, messages=MESSAGES, **GREEDY)
    assert done.choices[0].finish_reason == "length"
    assert done.usage is not None
    assert done.usage.total_tokens == 200
    with pytest.raises(openai.BadRequestError) as caught:
        await client.completions.create(model=stack.base_model, prompt=[5] * 200)
    assert caught.value.code == "context_length_exceeded"


async def test_bad_parameters_come_back_by_their_names(stack: LocalStack, client: AsyncOpenAI) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop": [""]}, "stop"),
        ({"logprobs": 21}, "logprobs"),
        ({"prompt": [320]}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"presence_penalty": 3}, "presence_penalty"),
    ]
    for fields, param in cases:
        with pytest.raises(openai.BadRequestError) as caught:
            await client.completions.create(**{"model": stack.base_model, "prompt": "x", **fields})
        assert caught.value.param == param, fields


async def test_a_client_that_leaves_frees_its_pages(stack: LocalStack, client: AsyncOpenAI) -> None:
    for number in range(3):
        stream = await client.completions.create(
            model=f"a{number}", prompt="x", max_tokens=190, n=2, stream=True, extra_body={"ignore_eos": True}
        )
        await anext(aiter(stream))
        await stream.close()
    assert_no_page_lost(stack)
    gateway = stack.metrics_urls["gateway"]
    wait_until("the gateway knows", lambda: metric(gateway, "slora_gateway_in_flight_requests") == 0)
    assert metric(gateway, "slora_gateway_requests_total", outcome="cancelled") >= 3


async def test_adapters_come_from_s3_and_go(stack: LocalStack, client: AsyncOpenAI, adapters: dict[str, Path]) -> None:
    place = S3Place("adapters", "team/copy/")
    S3Client(stack.client_s3_environment).put_adapter(adapters["a3"], place)
    asked: Any = {"prompt": "the quick", "max_tokens": 8, "temperature": 0}

    async def change(kind: str, **body: str) -> str:
        return await client.post(f"/{kind}_lora_adapter", body=body, cast_to=str)

    await change("load", lora_name="copy", lora_path=place.uri)
    text = (await client.completions.create(model="copy", **asked)).choices[0].text
    assert text == (await client.completions.create(model="a3", **asked)).choices[0].text
    with pytest.raises(openai.NotFoundError) as missing:
        await change("load", lora_name="copy2", lora_path="s3://adapters/nowhere/")
    assert missing.value.code == "source_not_found"
    await change("unload", lora_name="copy")
    wait_until("the gateway has heard", lambda: "copy" not in listed(stack))
    with pytest.raises(openai.NotFoundError):
        await client.completions.create(model="copy", **asked)


def listed(stack: LocalStack) -> set[str]:
    with OpenAI(base_url=stack.http_url, api_key="none", max_retries=0, timeout=60) as client:
        return {model.id for model in client.models.list()}


def test_the_engine_tells_vllms_names_what_is_resident(stack: LocalStack) -> None:
    url = stack.metrics_urls["engine-0"]
    with OpenAI(base_url=stack.http_url, api_key="none", max_retries=0, timeout=60) as client:
        client.completions.create(model="a2", prompt="x", max_tokens=2)
    with urllib.request.urlopen(url, timeout=30) as answer:
        (info,) = re.findall(r"^vllm:lora_requests_info\{(.*)\} ", answer.read().decode(), re.MULTILINE)
    resident = re.search(r'running_lora_adapters="([^"]*)"', info)
    assert resident is not None
    assert "a2" in resident[1].split(",")
    assert len(resident[1].split(",")) == metric(url, "slora_engine_resident_adapters")
    running = "vllm:num_requests_running"
    wait_until("nothing runs", lambda: metric(url, running, model_name=stack.base_model) == 0)
    wait_until("KV has no page", lambda: metric(url, "vllm:kv_cache_usage_perc") == 0)


def test_models_of_the_synchronous_client(stack: LocalStack) -> None:
    with OpenAI(base_url=stack.http_url, api_key="none", max_retries=0, timeout=60) as client:
        assert [m.id for m in client.models.list()] == [stack.base_model, *(f"a{i}" for i in range(NUM_ADAPTERS))]
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="nobody", prompt="x")
        with client.completions.create(model="a0", prompt=[5, 6], max_tokens=4, stream=True) as stream:
            assert next(chunk.model for chunk in stream) == "a0@1"
