"""Bad input through the real services: each gets its own reason from docs/errors.md, and nothing else is disturbed."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from safetensors.torch import load_file, save_file
from slora.gateway.v1 import inference_pb2
from slora_client import AdapterClient, SloraClient, SloraRequestError

from services.local.stack import LocalStack
from tests.e2e.conftest import assert_no_page_lost
from tests.fixtures.random_adapters import write_random_adapter
from tests.fixtures.tiny_models import make_checkpoint
from tests.fixtures.tiny_tokenizer import write_tokenizer

VOCAB_SIZE = 320
MAX_MODEL_LEN = 96


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = make_checkpoint(tmp_path_factory.mktemp("base"), "llama", vocab_size=VOCAB_SIZE)
    return write_tokenizer(directory, VOCAB_SIZE)


@pytest.fixture(scope="module")
def stack(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStack]:
    options = {"num_threads": 1, "num_pages": 64, "max_model_len": MAX_MODEL_LEN}
    with LocalStack(tmp_path_factory.mktemp("state"), checkpoint, engine_options=options) as running:
        yield running


@pytest.fixture(scope="module")
def client(stack: LocalStack) -> Iterator[SloraClient]:
    with SloraClient(stack.gateway_address) as opened:
        yield opened


@pytest.fixture
def still_right(stack: LocalStack, client: SloraClient) -> Iterator[None]:
    """After the bad request a good one answers as before it, and no page is lost."""

    def good() -> tuple[int, ...]:
        return client.generate(stack.base_model, [5, 6, 7], temperature=0, max_tokens=8, timeout=30).token_ids

    before = good()
    yield
    assert good() == before
    assert_no_page_lost(stack)


REQUESTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "unknown model": ("NOT_FOUND", "MODEL_NOT_FOUND", {"model": "nobody"}),
    "unknown version": ("NOT_FOUND", "MODEL_NOT_FOUND", {"model": "nobody@7"}),
    "prompt too long": ("INVALID_ARGUMENT", "PROMPT_TOO_LONG", {"prompt": [5] * MAX_MODEL_LEN}),
    "empty text": ("INVALID_ARGUMENT", "PROMPT_EMPTY", {"prompt": ""}),
    "no ids": ("INVALID_ARGUMENT", "PROMPT_EMPTY", {"prompt": []}),
    "id out of vocabulary": ("INVALID_ARGUMENT", "TOKEN_OUT_OF_VOCABULARY", {"prompt": [5, VOCAB_SIZE]}),
    "max_tokens 0": ("INVALID_ARGUMENT", "STOPPING_INVALID", {"max_tokens": 0}),
    "min_tokens over max_tokens": ("INVALID_ARGUMENT", "STOPPING_INVALID", {"max_tokens": 2, "min_tokens": 3}),
    "empty stop string": ("INVALID_ARGUMENT", "STOPPING_INVALID", {"stop": [""]}),
    "too many stop strings": ("INVALID_ARGUMENT", "STOPPING_INVALID", {"stop": [str(i) for i in range(17)]}),
    "temperature below zero": ("INVALID_ARGUMENT", "SAMPLING_INVALID", {"temperature": -0.1}),
    "temperature not a number": ("INVALID_ARGUMENT", "SAMPLING_INVALID", {"temperature": float("nan")}),
    "top_p 0": ("INVALID_ARGUMENT", "SAMPLING_INVALID", {"top_p": 0.0}),
    "min_p over 1": ("INVALID_ARGUMENT", "SAMPLING_INVALID", {"min_p": 1.5}),
    "repetition_penalty 0": ("INVALID_ARGUMENT", "SAMPLING_INVALID", {"repetition_penalty": 0.0}),
    "too many logprobs": ("INVALID_ARGUMENT", "LOGPROBS_INVALID", {"num_logprobs": 21}),
    "request id too long": ("INVALID_ARGUMENT", "REQUEST_INVALID", {"request_id": "x" * 129}),
}


@pytest.mark.usefixtures("still_right")
@pytest.mark.parametrize("name", REQUESTS)
def test_bad_request(name: str, stack: LocalStack, client: SloraClient) -> None:
    code, reason, fields = REQUESTS[name]
    options = {"model": stack.base_model, "prompt": [5, 6], "timeout": 30, **fields}
    with pytest.raises(SloraRequestError) as caught:
        client.generate(**options)
    assert (caught.value.code, caught.value.reason) == (code, reason), caught.value
    assert len(caught.value.message) > 15


@pytest.mark.usefixtures("still_right")
def test_negative_max_tokens_does_not_leave_the_client(stack: LocalStack, client: SloraClient) -> None:
    with pytest.raises(ValueError, match="-1"):
        client.generate(stack.base_model, [5], max_tokens=-1)


def raw_generate(stack: LocalStack, body: bytes) -> grpc.RpcError:
    """Sends bytes as a GenerateRequest and gives back the error."""
    with grpc.insecure_channel(stack.gateway_address) as channel:
        call = channel.unary_stream("/slora.gateway.v1.InferenceService/Generate")
        with pytest.raises(grpc.RpcError) as caught:
            list(call(body, timeout=30))
    return caught.value


@pytest.mark.usefixtures("still_right")
def test_text_that_is_not_utf8(stack: LocalStack) -> None:
    request = inference_pb2.GenerateRequest(model=stack.base_model)
    request.prompt.text = "AAAA"
    error = raw_generate(stack, request.SerializeToString().replace(b"AAAA", b"\xff\xfe\xff\xff"))
    assert error.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.INTERNAL)


@pytest.mark.usefixtures("still_right")
def test_oversized_message(stack: LocalStack) -> None:
    request = inference_pb2.GenerateRequest(model=stack.base_model)
    request.prompt.text = "a" * (17 * 2**20)
    assert raw_generate(stack, request.SerializeToString()).code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def _tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        path = directory / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file({k: v.contiguous() for k, v in tensors.items()}, path)

    return apply


def _config(**fields: object) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        path = directory / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return apply


def _weights(make: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        path = directory / "adapter_model.safetensors"
        path.write_bytes(make(path.read_bytes()))

    return apply


def _first(tensors: dict[str, torch.Tensor], part: str = "lora_A") -> str:
    return next(key for key in sorted(tensors) if part in key)


EXTRA = "base_model.model.model.layers.0.self_attn.z_proj.lora_A.weight"
LM_HEAD = "base_model.model.lm_head.lora_A.weight"

ADAPTERS: dict[str, tuple[set[str], Callable[[Path], None]]] = {
    "missing tensor": ({"ADAPTER_TENSORS_INVALID"}, _tensors(lambda t: t.pop(_first(t)) is None)),
    "extra tensor": ({"ADAPTER_TENSORS_INVALID"}, _tensors(lambda t: t.update({EXTRA: torch.ones(2, 48)}))),
    "lm_head": (
        {"ADAPTER_UNSUPPORTED"},
        _tensors(lambda t: t.update({LM_HEAD: torch.ones(2, 48), LM_HEAD.replace("A", "B"): torch.ones(320, 2)})),
    ),
    "wrong shape": (
        {"ADAPTER_TENSORS_INVALID", "ADAPTER_BASE_MISMATCH"},
        _tensors(lambda t: t.update({_first(t): t[_first(t)][:, :-1]})),
    ),
    "rank that lies": ({"ADAPTER_TENSORS_INVALID", "ADAPTER_RANK_INVALID"}, _config(r=5)),
    "NaN": ({"ADAPTER_NOT_FINITE"}, _tensors(lambda t: t[_first(t)].view(-1)[3:4].fill_(float("nan")) is None)),
    "infinity": ({"ADAPTER_NOT_FINITE"}, _tensors(lambda t: t[_first(t, "lora_B")].fill_(float("inf")) is None)),
    "integers": (
        {"ADAPTER_UNSUPPORTED"},
        _tensors(lambda t: t.update({_first(t): torch.ones(t[_first(t)].shape, dtype=torch.int32)})),
    ),
    "pickle": ({"ADAPTER_FILE_INVALID"}, _weights(lambda b: pickle.dumps({"weights": b[:100]}))),
    "truncated": ({"ADAPTER_FILE_INVALID"}, _weights(lambda b: b[:-100])),
    "nothing": ({"ADAPTER_FILE_INVALID", "UPLOAD_INVALID"}, _weights(lambda b: b"")),
    "header of 100 GB": ({"ADAPTER_FILE_INVALID"}, _weights(lambda b: struct.pack("<Q", 10**11) + b[8:])),
    "header that is not JSON": ({"ADAPTER_FILE_INVALID"}, _weights(lambda b: struct.pack("<Q", 9) + b"not JSON!" + b)),
    "configuration that is not JSON": (
        {"ADAPTER_CONFIG_INVALID"},
        lambda directory: (directory / "adapter_config.json").write_text("{") and None,
    ),
    "DoRA": ({"ADAPTER_UNSUPPORTED"}, _config(use_dora=True)),
    "modules_to_save": ({"ADAPTER_UNSUPPORTED"}, _config(modules_to_save=["lm_head"])),
    "bias": ({"ADAPTER_UNSUPPORTED"}, _config(bias="all")),
    "not LoRA": ({"ADAPTER_UNSUPPORTED", "ADAPTER_CONFIG_INVALID"}, _config(peft_type="IA3")),
    "matches no module": (
        {"ADAPTER_UNSUPPORTED", "ADAPTER_TENSORS_INVALID", "ADAPTER_CONFIG_INVALID"},
        _config(target_modules=["z_proj"]),
    ),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_bad_adapter(name: str, stack: LocalStack, client: SloraClient, checkpoint: Path, tmp_path: Path) -> None:
    reasons, damage = ADAPTERS[name]
    directory = write_random_adapter(tmp_path / "adapter", checkpoint, rank=4, seed=1)
    damage(directory)
    refused_as = "refused-" + "".join(c for c in name if c.isalnum())
    with AdapterClient(stack.store_address) as store:
        with pytest.raises(SloraRequestError) as caught:
            store.upload(refused_as, directory, timeout=30)
        assert caught.value.reason in reasons, caught.value
        expected_code = "INVALID_ARGUMENT" if caught.value.reason == "UPLOAD_INVALID" else "FAILED_PRECONDITION"
        assert caught.value.code == expected_code
        assert refused_as not in {adapter.name for adapter in store.list()}
    with pytest.raises(SloraRequestError) as never_served:
        client.generate(refused_as, [5, 6], timeout=30)
    assert never_served.value.reason == "MODEL_NOT_FOUND"


@pytest.mark.usefixtures("still_right")
def test_an_adapter_that_overflows_is_put_down_to_whoever_trained_it(
    stack: LocalStack, client: SloraClient, checkpoint: Path, tmp_path: Path
) -> None:
    """Each weight is finite; what is computed with them is not. Nobody who runs the engines is to be called for it."""
    directory = write_random_adapter(tmp_path / "adapter", checkpoint, rank=2, seed=1)
    _tensors(lambda tensors: tensors.update({key: torch.full_like(t, 1e38) for key, t in tensors.items()}))(directory)
    with AdapterClient(stack.store_address) as store:
        adapter = store.upload("overflowing", directory, timeout=30)
        with pytest.raises(SloraRequestError) as caught:
            client.generate("overflowing", [5, 6], timeout=30)
        store.delete("overflowing")
    assert (caught.value.code, caught.value.reason) == ("FAILED_PRECONDITION", "ADAPTER_NOT_FINITE")
    assert caught.value.metadata["adapter_id"] == adapter.adapter_id


def test_rank_over_the_limit(stack: LocalStack, checkpoint: Path, tmp_path: Path) -> None:
    directory = write_random_adapter(tmp_path / "adapter", checkpoint, rank=257, seed=1)
    with AdapterClient(stack.store_address) as store, pytest.raises(SloraRequestError) as caught:
        store.upload("large-rank", directory, timeout=30)
    assert caught.value.reason == "ADAPTER_RANK_INVALID"
    assert "256" in caught.value.message


def test_adapter_for_another_base_model(stack: LocalStack, tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path / "other", "llama", hidden_size=64, intermediate_size=96)
    directory = write_random_adapter(tmp_path / "adapter", other, rank=4, seed=1)
    with AdapterClient(stack.store_address) as store, pytest.raises(SloraRequestError) as caught:
        store.upload("other-base", directory, timeout=30)
    assert caught.value.reason == "ADAPTER_BASE_MISMATCH"


def test_a_request_that_can_never_fit_in_the_pool(
    stack: LocalStack, client: SloraClient, checkpoint: Path, tmp_path: Path
) -> None:
    directory = write_random_adapter(tmp_path / "adapter", checkpoint, rank=256, seed=1)
    with AdapterClient(stack.store_address) as store:
        store.upload("huge", directory, timeout=30)
        with pytest.raises(SloraRequestError) as caught:
            client.generate("huge", [5, 6], timeout=30)
        assert (caught.value.code, caught.value.reason) == ("RESOURCE_EXHAUSTED", "REQUEST_TOO_LARGE")
        store.delete("huge")
    shutil.rmtree(directory)
    assert_no_page_lost(stack)
