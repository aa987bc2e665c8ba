"""Every way in which a request can be wrong, with the reason that its caller sees."""

from __future__ import annotations

import math
import re
from typing import Any

import grpc
import pytest
from slora.engine.v1 import engine_pb2
from tokenizers import normalizers

from services.common.errors import Reason, SloraError, Status
from services.common.grpc_errors import from_rpc_error
from services.engine.messages import Generate

DIGEST = "sha256:" + "0123456789abcdef" * 4
IDS = {"token_ids": {"ids": [1, 2, 3]}}


async def refusal(engine: Any, fields: dict[str, Any]) -> SloraError:
    request = engine_pb2.GenerateRequest(**{"request_id": "test", "prompt": IDS, **fields})
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await engine.stub.Generate(request, timeout=20).read()
    error = from_rpc_error(caught.value, Reason.ENGINE_UNAVAILABLE)
    assert caught.value.code().name == error.reason.status.value
    assert engine.core.sent == [], "the core heard of it"
    return error


BAD: dict[str, tuple[dict[str, Any], Reason, str]] = {
    "no request id": ({"request_id": ""}, Reason.REQUEST_INVALID, "1 to 128"),
    "long request id": ({"request_id": "é" * 129}, Reason.REQUEST_INVALID, "129 characters"),
    "priority too high": ({"priority": 11}, Reason.REQUEST_INVALID, r"priority is 11; it is in \[-10, 10\]"),
    "priority too low": ({"priority": -11}, Reason.REQUEST_INVALID, "priority is -11"),
    "long tenant": ({"tenant": "é" * 129}, Reason.REQUEST_INVALID, "129 characters"),
    "no prompt": ({"prompt": None}, Reason.PROMPT_MISSING, "prompt is required: set its text"),
    "unset prompt": ({"prompt": {}}, Reason.PROMPT_MISSING, "prompt is required: set its text"),
    "empty text": ({"prompt": {"text": ""}}, Reason.PROMPT_EMPTY, "prompt.text"),
    "empty ids": ({"prompt": {"token_ids": {}}}, Reason.PROMPT_EMPTY, "prompt.token_ids"),
    "long ids": ({"prompt": {"token_ids": {"ids": [1] * 256}}}, Reason.PROMPT_TOO_LONG, "256 tokens.*at most 255"),
    "long text": ({"prompt": {"text": "日" * 300}}, Reason.PROMPT_TOO_LONG, "room for 256"),
    "id out of vocabulary": (
        {"prompt": {"token_ids": {"ids": [1, 600, 601]}}},
        Reason.TOKEN_OUT_OF_VOCABULARY,
        "prompt has token 600 at position 1.*below 600",
    ),
    "huge id": (
        {"prompt": {"token_ids": {"ids": [2**32 - 1]}}},
        Reason.TOKEN_OUT_OF_VOCABULARY,
        "token 4294967295 at position 0",
    ),
    "negative temperature": ({"sampling": {"temperature": -0.5}}, Reason.SAMPLING_INVALID, "temperature is -0.5"),
    "temperature NaN": ({"sampling": {"temperature": math.nan}}, Reason.SAMPLING_INVALID, "temperature is nan"),
    "temperature inf": ({"sampling": {"temperature": math.inf}}, Reason.SAMPLING_INVALID, "temperature is inf"),
    "top_p 0": ({"sampling": {"top_p": 0}}, Reason.SAMPLING_INVALID, "top_p is 0.*above 0 and at most 1"),
    "top_p above 1": ({"sampling": {"top_p": 1.25}}, Reason.SAMPLING_INVALID, "top_p is 1.25"),
    "top_p NaN": ({"sampling": {"top_p": math.nan}}, Reason.SAMPLING_INVALID, "top_p is nan"),
    "top_p hardly above 1": ({"sampling": {"top_p": 1.0000001}}, Reason.SAMPLING_INVALID, "top_p is 1.0000001;"),
    "temperature hardly below 0": (
        {"sampling": {"temperature": -1e-7}},
        Reason.SAMPLING_INVALID,
        "temperature is -1e-07; .* at least 0",
    ),
    "negative min_p": (
        {"sampling": {"min_p": -0.5}},
        Reason.SAMPLING_INVALID,
        "min_p is -0.5.*at least 0 and at most 1",
    ),
    "min_p above 1": ({"sampling": {"min_p": 1.5}}, Reason.SAMPLING_INVALID, "min_p"),
    "repetition 0": ({"sampling": {"repetition_penalty": 0}}, Reason.SAMPLING_INVALID, "repetition_penalty is 0"),
    "repetition negative": ({"sampling": {"repetition_penalty": -1}}, Reason.SAMPLING_INVALID, "above 0"),
    "repetition inf": ({"sampling": {"repetition_penalty": math.inf}}, Reason.SAMPLING_INVALID, "finite"),
    "presence": ({"sampling": {"presence_penalty": 2.5}}, Reason.SAMPLING_INVALID, "at least -2 and at most 2"),
    "frequency": ({"sampling": {"frequency_penalty": -2.5}}, Reason.SAMPLING_INVALID, "frequency_penalty is -2.5"),
    "frequency NaN": ({"sampling": {"frequency_penalty": math.nan}}, Reason.SAMPLING_INVALID, "frequency_penalty"),
    "max_tokens 0": ({"stopping": {"max_tokens": 0}}, Reason.STOPPING_INVALID, "max_tokens is 0"),
    "min above max": (
        {"stopping": {"max_tokens": 3, "min_tokens": 4}},
        Reason.STOPPING_INVALID,
        "stopping.min_tokens is 4, but at most 3 tokens",
    ),
    "17 stop strings": (
        {"stopping": {"stop_strings": ["x"] * 17}},
        Reason.STOPPING_INVALID,
        "stop_strings has 17 strings",
    ),
    "empty stop string": ({"stopping": {"stop_strings": ["x", ""]}}, Reason.STOPPING_INVALID, "an empty string"),
    "long stop string": ({"stopping": {"stop_strings": ["x" * 257]}}, Reason.STOPPING_INVALID, "257 characters"),
    "stop id out of vocabulary": (
        {"stopping": {"stop_token_ids": [3, 600]}},
        Reason.TOKEN_OUT_OF_VOCABULARY,
        "stopping.stop_token_ids has token 600 at position 1",
    ),
    "21 logprobs": ({"num_logprobs": 21}, Reason.LOGPROBS_INVALID, "num_logprobs is 21.*at most 20"),
    "adapter without name": ({"adapter": {"digest": DIGEST}}, Reason.ADAPTER_NAME_INVALID, "adapter_id is required"),
    "adapter without digest": ({"adapter": {"adapter_id": "a@1"}}, Reason.ADAPTER_DIGEST_INVALID, "is required"),
    "short digest": (
        {"adapter": {"adapter_id": "a@1", "digest": DIGEST[:-1]}},
        Reason.ADAPTER_DIGEST_INVALID,
        "adapter.digest is .*64 lower-case",
    ),
    "upper-case digest": (
        {"adapter": {"adapter_id": "a@1", "digest": DIGEST.upper()}},
        Reason.ADAPTER_DIGEST_INVALID,
        "adapter.digest is '",
    ),
    "digest with a line end": (
        {"adapter": {"adapter_id": "a@1", "digest": DIGEST + "\n"}},
        Reason.ADAPTER_DIGEST_INVALID,
        "adapter.digest is '",
    ),
}


@pytest.mark.parametrize("name", BAD)
async def test_bad_requests_are_refused_with_their_reason(engine: Any, name: str) -> None:
    fields, reason, message = BAD[name]
    error = await refusal(engine, fields)
    assert error.reason is reason
    assert error.reason.status is Status.INVALID_ARGUMENT
    assert re.search(message, error.message), error.message


EDGES: dict[str, dict[str, Any]] = {
    "longest request id": {"request_id": "é" * 128},
    "longest prompt": {"prompt": {"token_ids": {"ids": [1] * 255}}},
    "last id": {"prompt": {"token_ids": {"ids": [599]}}},
    "special tokens only": {"prompt": {"text": "<|begin|>"}},
    "temperature 0": {"sampling": {"temperature": 0}},
    "top_p 1": {"sampling": {"top_p": 1}},
    "min_p 1": {"sampling": {"min_p": 1}},
    "penalties": {"sampling": {"presence_penalty": 2, "frequency_penalty": -2, "repetition_penalty": 1e-6}},
    "top_k beyond the vocabulary": {"sampling": {"top_k": 2**32 - 1}},
    "16 stop strings": {"stopping": {"stop_strings": ["x" * 256] * 16}},
    "min equals max": {"stopping": {"max_tokens": 3, "min_tokens": 3}},
    "no logprobs of others": {"num_logprobs": 0},
    "20 logprobs": {"num_logprobs": 20},
}


@pytest.mark.parametrize("name", EDGES)
async def test_what_is_just_allowed_is_served(engine: Any, name: str) -> None:
    fields = {"request_id": "test", "prompt": IDS, **EDGES[name]}
    call = engine.stub.Generate(engine_pb2.GenerateRequest(**fields))
    await engine.core.take(Generate)
    call.cancel()


async def test_text_with_a_token_that_the_model_lacks(engine: Any) -> None:
    """A tokenizer may know more tokens than the checkpoint has embeddings."""
    *_, added = engine.tokenizer.encode("a é日")
    assert engine.tokenizer.tokens[added] == "é日"
    engine.core.become_ready(vocab_size=added)
    error = await refusal(engine, {"prompt": {"text": "a é日"}})
    assert error.reason is Reason.TOKEN_OUT_OF_VOCABULARY
    assert error.metadata["token_id"] == str(added)


async def test_text_that_tokenizes_to_nothing_is_empty(engine: Any) -> None:
    engine.tokenizer._tokenizer.post_processor = None
    engine.tokenizer._tokenizer.normalizer = normalizers.Strip()
    error = await refusal(engine, {"prompt": {"text": "   "}})
    assert error.reason is Reason.PROMPT_EMPTY


def test_what_python_callers_cannot_even_say() -> None:
    """Negative counts and strings that are no UTF-8 are refused by protobuf, before anything is sent."""
    with pytest.raises(ValueError, match="out of range"):
        engine_pb2.GenerateRequest(stopping={"max_tokens": -1})
    with pytest.raises(ValueError, match="out of range"):
        engine_pb2.GenerateRequest(num_logprobs=-1)
    with pytest.raises(ValueError, match="out of range"):
        engine_pb2.GenerateRequest(prompt={"token_ids": {"ids": [-1]}})
    with pytest.raises(UnicodeEncodeError):
        engine_pb2.GenerateRequest(prompt={"text": "\ud800"})


@pytest.mark.parametrize("method", ["Generate", "PrefetchAdapter"])
async def test_bytes_that_are_no_utf8_are_the_callers_fault(engine: Any, method: str) -> None:
    data = b"\x0a\x02\xff\xfe" if method == "Generate" else b"\x0a\x04\x0a\x02\xff\xfe"
    open_call = engine.channel.unary_stream if method == "Generate" else engine.channel.unary_unary
    call = open_call(f"/slora.engine.v1.EngineService/{method}")(data, timeout=5)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await (call.read() if method == "Generate" else call)
    error = from_rpc_error(caught.value, Reason.ENGINE_UNAVAILABLE)
    assert error.reason is Reason.REQUEST_INVALID
    assert "UTF-8" in error.message


async def test_an_oversized_message_is_refused(engine: Any) -> None:
    text = "x" * (17 * 2**20)
    options = [("grpc.max_send_message_length", -1)]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{engine.server.port}", options=options) as channel:
        call = channel.unary_stream("/slora.engine.v1.EngineService/Generate")(
            engine_pb2.GenerateRequest(request_id="big", prompt={"text": text}).SerializeToString(), timeout=10
        )
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_prefetch_needs_an_adapter(engine: Any) -> None:
    for adapter, reason in (
        (None, Reason.REQUEST_INVALID),
        ({"adapter_id": "a@1", "digest": "sha256:x"}, Reason.ADAPTER_DIGEST_INVALID),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await engine.stub.PrefetchAdapter(engine_pb2.PrefetchAdapterRequest(adapter=adapter))
        assert from_rpc_error(caught.value, Reason.ENGINE_UNAVAILABLE).reason is reason
    assert engine.core.sent == []
