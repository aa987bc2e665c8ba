"""Every reason has an HTTP status and an error object; what nobody meant for a caller stays inside."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import pytest
from slora.engine.v1 import engine_pb2

from services.common.errors import FieldError, Reason, SloraError, Status
from services.common.grpc_errors import from_rpc_error, to_grpc_status
from services.engine.codec import decode_generate
from services.engine.frontend.request import ModelLimits, core_request
from services.gateway.http.errors import CODES, ApiError, http_status, to_api_error
from services.gateway.http.parameters import CHAT_NAMES, COMPLETION_NAMES
from tests.fixtures.ended_call import EndedCall

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("reason", Reason)
def test_every_reason_has_its_status_and_object(reason: Reason) -> None:
    error = to_api_error(SloraError(reason, "what is right", field="sampling.top_p"))
    assert error.status == http_status(reason)
    shown = error.body()["error"]
    assert shown["message"] == "what is right"
    assert shown["code"] == CODES.get(reason, reason.name.lower())
    assert (shown["type"] == "server_error") == (error.status >= 500)
    assert ("retry-after" in error.headers) == (error.status in (429, 503))


def test_callers_faults_are_4xx_and_ours_5xx() -> None:
    ours = {Status.UNAVAILABLE, Status.DEADLINE_EXCEEDED, Status.INTERNAL}
    capacity = {Reason.PINS_FULL, Reason.POOL_EXHAUSTED, Reason.HOST_CACHE_FULL}
    for reason in Reason:
        assert (http_status(reason) >= 500) == (reason.status in ours or reason in capacity), reason


@pytest.mark.parametrize(
    ("reason", "status", "code", "kind"),
    [
        (Reason.MODEL_NOT_FOUND, 404, "model_not_found", "invalid_request_error"),
        (Reason.PROMPT_TOO_LONG, 400, "context_length_exceeded", "invalid_request_error"),
        (Reason.CHAT_TEMPLATE_MISSING, 400, "chat_template_missing", "invalid_request_error"),
        (Reason.QUEUE_FULL, 429, "queue_full", "rate_limit_error"),
        (Reason.API_KEY_MISSING, 401, "invalid_api_key", "authentication_error"),
        (Reason.TOKEN_RATE_EXCEEDED, 429, "rate_limit_exceeded", "rate_limit_error"),
        (Reason.TENANCY_UNAVAILABLE, 503, "tenancy_unavailable", "server_error"),
        (Reason.REQUEST_TOO_LARGE, 413, "request_too_large", "invalid_request_error"),
        (Reason.ADAPTER_CHANGED, 409, "adapter_changed", "invalid_request_error"),
        (Reason.ADAPTER_INCOMPATIBLE, 422, "adapter_incompatible", "invalid_request_error"),
        (Reason.DRAINING, 503, "draining", "server_error"),
        (Reason.DEADLINE_EXCEEDED, 504, "deadline_exceeded", "server_error"),
    ],
)
def test_what_clients_rely_on(reason: Reason, status: int, code: str, kind: str) -> None:
    error = to_api_error(SloraError(reason, "x"))
    assert (error.status, error.code, error.body()["error"]["type"]) == (status, code, kind)


@pytest.mark.parametrize(
    ("field", "names", "param"),
    [
        ("sampling.top_p", COMPLETION_NAMES, "top_p"),
        ("stopping.stop_strings", COMPLETION_NAMES, "stop"),
        ("num_logprobs", COMPLETION_NAMES, "logprobs"),
        ("num_logprobs", CHAT_NAMES, "top_logprobs"),
        ("prompt.token_ids", COMPLETION_NAMES, "prompt"),
        ("", COMPLETION_NAMES, None),
    ],
)
def test_the_parameter_has_the_callers_name(field: str, names: Mapping[str, str], param: str | None) -> None:
    error = SloraError(Reason.SAMPLING_INVALID, "x", **({"field": field} if field else {}))
    assert to_api_error(error, names).param == param


@pytest.mark.parametrize(("names", "param"), [(COMPLETION_NAMES, "prompt"), (CHAT_NAMES, "messages")])
@pytest.mark.parametrize("reason", [Reason.PROMPT_TOO_LONG, Reason.PROMPT_EMPTY])
def test_what_is_wrong_with_the_prompt_is_put_down_to_it(reason: Reason, names: Mapping[str, str], param: str) -> None:
    error = to_api_error(SloraError(reason, "the prompt has 600 tokens", field="prompt"), names)
    assert (error.param, error.message) == (param, "the prompt has 600 tokens")


def refused_by_the_engine(**fields: object) -> SloraError:
    """What a real engine says to a request with these fields, as it arrives at a gateway."""
    request = engine_pb2.GenerateRequest(request_id="r", **fields)  # type: ignore[arg-type]
    if "prompt" not in fields:
        request.prompt.token_ids.ids.append(1)
    with pytest.raises(SloraError) as refused:
        core_request(decode_generate(request), 1, list(request.prompt.token_ids.ids), ModelLimits(600, 256))
    return from_rpc_error(EndedCall(to_grpc_status(refused.value)), unavailable=Reason.ENGINE_UNAVAILABLE)


CHAT_NAMES_NEW = {**CHAT_NAMES, "max_tokens": "max_completion_tokens"}


@pytest.mark.parametrize(
    ("fields", "names", "param", "message"),
    [
        ({"sampling": {"top_p": 1.0000001}}, CHAT_NAMES, "top_p", "top_p is 1.0000001; it is a finite number above 0"),
        ({"stopping": {"max_tokens": 0}}, COMPLETION_NAMES, "max_tokens", "max_tokens is 0; it is at least 1"),
        (
            {"stopping": {"max_tokens": 3, "min_tokens": 4}},
            CHAT_NAMES_NEW,
            "min_tokens",
            "min_tokens is 4, but at most 3 tokens are to be made",
        ),
        ({"stopping": {"max_tokens": 0}}, CHAT_NAMES_NEW, "max_completion_tokens", "max_completion_tokens is 0"),
        ({"num_logprobs": 21}, COMPLETION_NAMES, "logprobs", "logprobs is 21; it is at most 20"),
        ({"num_logprobs": 21}, CHAT_NAMES, "top_logprobs", "top_logprobs is 21; it is at most 20"),
        ({"stopping": {"stop_strings": [""]}}, CHAT_NAMES, "stop", "stop has an empty string"),
        ({"stopping": {"stop_strings": "s" * 17}}, COMPLETION_NAMES, "stop", "stop has 17 strings; at most 16"),
        ({"stopping": {"stop_strings": ["x" * 257]}}, CHAT_NAMES, "stop", "stop has a string of 257 characters"),
        ({"prompt": {"chat": {}}}, CHAT_NAMES, "messages", "messages is empty; give at least one message"),
        ({"prompt": {"text": ""}}, COMPLETION_NAMES, "prompt", "prompt is empty; give at least one token"),
        (
            {"prompt": {"token_ids": {"ids": [600]}}},
            COMPLETION_NAMES,
            "prompt",
            "prompt has token 600 at position 0, which is not in the vocabulary",
        ),
        (
            {"stopping": {"stop_token_ids": [700]}},
            COMPLETION_NAMES,
            "stop_token_ids",
            "stop_token_ids has token 700 at position 0",
        ),
    ],
    ids=str,
)
def test_messages_use_the_callers_names(
    fields: dict[str, object], names: Mapping[str, str], param: str, message: str
) -> None:
    refused = refused_by_the_engine(**fields)
    error = to_api_error(refused, names)
    assert error.param == param
    assert error.message.startswith(message)
    path = refused.metadata["field"]
    assert refused.message == path + error.message.removeprefix(param), "over gRPC the same, behind the field's path"
    assert path.rpartition(".")[2] == param or path not in error.message


def test_words_that_others_wrote_are_left_alone() -> None:
    message = "the checkpoint's chat template refuses these messages: sampling.num_logprobs"
    error = to_api_error(SloraError(Reason.CHAT_INVALID, message, field="prompt.chat.messages"), CHAT_NAMES)
    assert (error.message, error.param) == (message, "messages")
    error = to_api_error(FieldError(Reason.REQUEST_INVALID, "stop_strings", "is not num_logprobs"), CHAT_NAMES)
    assert error.message == "stop is not num_logprobs"


def test_what_went_wrong_inside_is_not_told(caplog: pytest.LogCaptureFixture) -> None:
    error = to_api_error(KeyError("a secret"))
    assert error.status == 500
    assert "secret" not in error.message
    assert "KeyError" in error.message
    assert "a secret" in caplog.text


def test_an_api_error_stays_as_it_is() -> None:
    error = ApiError(418, "x", "teapot")
    assert to_api_error(error) is error


def test_the_table_of_statuses_is_the_documented_one() -> None:
    page = (ROOT / "docs" / "errors.md").read_text().partition("## Over HTTP")[2]
    rows = re.findall(r"^\| (\d+) \| ([^|]*) \|", page, re.MULTILINE)
    told = {name: int(status) for status, names in rows for name in re.findall(r"`([A-Z_]+)`", names)}
    for reason in Reason:
        assert told.get(reason.name, told.get(reason.status.value)) == http_status(reason), reason


def test_when_to_retry_is_what_the_engine_said() -> None:
    error = to_api_error(SloraError(Reason.OVERLOADED, "too many", retry_after_seconds="2.500"))
    assert (error.status, error.headers["retry-after"]) == (429, "3")
