"""The HTTP API byte by byte: framing, limits, ids, health, adapters, the drain."""

from __future__ import annotations

import asyncio
import http.client
import json
import logging
import socket
from typing import Any

import pytest
from slora.engine.v1 import engine_pb2

from services.common.errors import Reason
from services.common.settings import AddressError
from services.common.tls import ServerTls
from services.gateway.http.server import HttpServer
from services.local.ports import free_port
from tests.fakes.fake_engine import (
    Context,
    FakeEngine,
    Received,
    answer_messages,
    expected_tokens,
    fail_after,
    hang,
)
from tests.integration.gateway.conftest import Fleet, FleetFactory, eventually

JSON = {"Content-Type": "application/json"}
ASK = {"model": "base", "prompt": "tell me", "max_tokens": 2}


async def send(
    fleet: Fleet, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
) -> tuple[int, dict[str, str], Any]:
    """A request's status, headers (by lower-case name) and body, parsed if it is JSON."""

    def run() -> tuple[int, dict[str, str], Any]:
        connection = http.client.HTTPConnection("127.0.0.1", fleet.http_port, timeout=60)
        content = body if body is None or isinstance(body, bytes) else json.dumps(body)
        connection.request(method, path, content, JSON if headers is None else headers)
        response = connection.getresponse()
        answered = response.read()
        connection.close()
        found = {key.lower(): value for key, value in response.getheaders()}
        is_json = found.get("content-type") == "application/json"
        return response.status, found, json.loads(answered) if is_json else answered

    return await asyncio.to_thread(run)


async def open_stream(fleet: Fleet, body: dict[str, Any]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection on which a completion was asked for."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # little is sent ahead of what is read
    connection.setblocking(False)
    await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", fleet.http_port))
    reader, writer = await asyncio.open_connection(sock=connection)
    content = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
    )
    writer.write(head.encode() + b"\r\n\r\n" + content)
    return reader, writer


@pytest.fixture
async def fleet(fleet_of: FleetFactory) -> Fleet:
    return await fleet_of(1)


async def test_events_are_framed_as_the_standard_says(fleet: Fleet) -> None:
    async def speak(engine: FakeEngine, received: Received, context: Any) -> None:
        messages = answer_messages(received.request)
        for message, text in zip(messages, ["a\n\nb", "", "数\r\n🙂\u2028"], strict=True):
            message.text = text
            await context.write(message)

    fleet.engines[0].script = speak
    status, headers, body = await send(fleet, "POST", "/v1/completions", {**ASK, "max_tokens": 3, "stream": True})
    assert status == 200
    assert headers["content-type"] == "text/event-stream; charset=utf-8"
    assert headers["cache-control"] == "no-cache"
    *events, rest = body.decode().split("\n\n")
    assert rest == ""
    assert all(event.startswith("data: ") and "\n" not in event for event in events)
    assert events[-1] == "data: [DONE]"
    choices = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events[:-1]]
    assert [choice["text"] for choice in choices] == ["a\n\nb", "数\r\n🙂\u2028"]  # nothing is sent for no text


async def test_an_error_in_mid_stream_is_the_last_event(fleet: Fleet) -> None:
    fleet.engines[0].script = fail_after(1, Reason.ENGINE_CORE_DEAD)
    status, _, body = await send(fleet, "POST", "/v1/completions", {**ASK, "max_tokens": 3, "stream": True})
    assert status == 200
    events = body.decode().split("\n\n")
    assert json.loads(events[0].removeprefix("data: "))["choices"][0]["text"]
    assert json.loads(events[1].removeprefix("data: "))["error"]["code"] == "engine_core_dead"
    assert events[2:] == [""]


async def test_what_fails_inside_is_told_without_detail(fleet: Fleet, caplog: pytest.LogCaptureFixture) -> None:
    async def nonsense(engine: FakeEngine, received: Received, context: Any) -> None:
        response = engine_pb2.GenerateResponse(text="x", token_ids=[1])
        response.completion.finish_reason = 77  # type: ignore[assignment]
        await context.write(response)

    fleet.engines[0].script = nonsense
    for stream in (False, True):
        status, _, body = await send(fleet, "POST", "/v1/completions", {**ASK, "stream": stream})
        assert (status, body["error"]["code"], body["error"]["type"]) == (500, "internal", "server_error")
    assert "KeyError: 77" in caplog.text


BAD_BODIES: dict[str, tuple[bytes, dict[str, str], int, str]] = {
    "no body": (b"", JSON, 400, "invalid_json"),
    "not JSON": (b"{", JSON, 400, "invalid_json"),
    "not UTF-8": (b'{"model": "\xff"}', JSON, 400, "invalid_json"),
    "half a character": (b'{"model": "\\ud800"}', JSON, 400, "invalid_json"),
    "not a number": (b'{"model": "base", "prompt": "x", "temperature": NaN}', JSON, 400, "invalid_json"),
    "too large a number": (b'{"model": "base", "prompt": "x", "temperature": 1e999}', JSON, 400, "invalid_type"),
    "no object": (b"[]", JSON, 400, "invalid_type"),
    "deep": (b'{"model": "base", "prompt": ' + b"[" * 100_000, JSON, 400, "invalid_type"),
    "deep where anything goes": (b'{"model": "base", "echo": ' + b"[" * 100_000, JSON, 400, "invalid_json"),
    "a form": (b"model=base", {"Content-Type": "application/x-www-form-urlencoded"}, 415, "not_json"),
    "no type": (b"{}", {}, 415, "not_json"),
    "a long name": (b'{"' + b"x" * 5000 + b'": 1}', JSON, 400, "unknown_parameter"),
    "too large": (b'{"model": "' + b"x" * 5000 + b'"}', JSON, 413, "body_too_large"),
}


async def test_bad_bodies(fleet_of: FleetFactory) -> None:
    fleet = await fleet_of(1, http_max_body_bytes=250_000)
    for name, (body, headers, status, code) in BAD_BODIES.items():
        content = body * 100 if name == "too large" else body
        got, _, answer = await send(fleet, "POST", "/v1/completions", content, headers)
        assert (got, answer["error"]["code"]) == (status, code), name
        assert len(json.dumps(answer)) < 2000
    assert fleet.engines[0].received == []


async def test_numbers_out_of_range_are_named_by_the_engine(fleet: Fleet) -> None:
    # The engine's own check is its own test; here: nothing overflows on the way.
    for field, value in (("temperature", 1e300), ("seed", 2**70), ("seed", -(2**70)), ("top_k", 2**32 - 1)):
        status, _, _ = await send(fleet, "POST", "/v1/completions", {**ASK, field: value})
        assert status == 200
    sampling = [received.request.sampling for received in fleet.engines[0].received]
    assert sampling[0].temperature == float("inf")
    assert sampling[3].top_k == 2**32 - 1


async def test_priority_is_that_of_grpc(fleet: Fleet) -> None:
    chat = {"model": "base", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
    for path, body in (("/v1/completions", ASK), ("/v1/chat/completions", chat)):
        fleet.engines[0].received.clear()
        for extra in ({"priority": 7}, {"priority": -10}, {}, {"priority": None}):
            status, _, _ = await send(fleet, "POST", path, {**body, **extra})
            assert status == 200
        assert [received.request.priority for received in fleet.engines[0].received] == [7, -10, 0, 0]
        status, _, answer = await send(fleet, "POST", path, {**body, "priority": 11})
        assert (status, answer["error"]["param"], answer["error"]["type"]) == (400, "priority", "invalid_request_error")
        assert answer["error"]["message"] == "priority: expected `int` <= 10"
        assert len(fleet.engines[0].received) == 4, "no engine was asked"


async def test_ids_come_in_and_go_out(fleet: Fleet, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    headers = {**JSON, "X-Request-Id": "mine-1"}
    _, answered, body = await send(fleet, "POST", "/v1/completions", ASK, headers)
    assert answered["x-request-id"] == "mine-1"
    assert body["id"] == "cmpl-mine-1"
    _, answered, body = await send(fleet, "POST", "/v1/completions", {**ASK, "n": 2}, headers)
    assert (answered["x-request-id"], body["id"]) == ("mine-1", "cmpl-mine-1")
    ids = [received.request.request_id for received in fleet.engines[0].received]
    assert sorted(ids) == ["mine-1", "mine-1-0", "mine-1-1"]
    assert any(getattr(record, "request_id", "") == "mine-1-1" for record in caplog.records)
    await send(fleet, "POST", "/v1/completions", {**ASK, "top_q": 1}, {**JSON, "X-Request-Id": "mine-2"})
    (line,) = (vars(record) for record in caplog.records if getattr(record, "request_id", "") == "mine-2")
    assert (line["message"], line["path"], line["status"]) == ("HTTP request failed", "/v1/completions", 400)
    for path in ("/health", "/nowhere", "/v1/models/nobody"):
        assert len((await send(fleet, "GET", path))[1]["x-request-id"]) == 32
    for bad in ("x" * 121, "a b", "é"):
        status, answered, body = await send(fleet, "GET", "/v1/models", None, {"X-Request-Id": bad})
        assert (status, body["error"]["param"]) == (400, "X-Request-Id")
        assert answered["x-request-id"] != bad


async def test_paths_and_methods(fleet: Fleet) -> None:
    for method, path, status in (
        ("GET", "/nowhere", 404),
        ("GET", "/v1/completions", 405),
        ("POST", "/v1/models", 405),
        ("POST", "/v1/embeddings", 404),
    ):
        got, headers, body = await send(fleet, method, path, b"{}")
        assert (got, body["error"]["type"]) == (status, "invalid_request_error")
        assert ("allow" in headers) == (status == 405)
        what_is_right = "; it takes " if status == 405 else "; there are /health, /v1/models, "
        assert what_is_right in body["error"]["message"]
    assert fleet.value("http_responses_total", route="other", status="404") == 2
    assert fleet.value("http_responses_total", route="/v1/models", status="405") == 1
    await send(fleet, "GET", "/v1/models/made-up")
    assert fleet.value("http_responses_total", route="/v1/models/{model}", status="404") == 1


async def test_leaving_before_there_is_an_answer_ends_it_in_the_engine(fleet: Fleet) -> None:
    fleet.engines[0].script = hang
    received = fleet.engines[0].received
    for stream in (False, True):
        _, writer = await open_stream(fleet, {**ASK, "n": 2, "stream": stream})
        await arrived(fleet, 2)
        writer.close()
        await writer.wait_closed()
        await eventually("they end", lambda: all(r.cancelled.is_set() for r in received))
        received.clear()
    await eventually("it is noted", lambda: fleet.value("in_flight_requests") == 0)


async def test_a_slow_reader_holds_up_nobody(fleet: Fleet) -> None:
    reader, writer = await open_stream(fleet, {**ASK, "max_tokens": 10_000, "stream": True, "return_token_ids": True})
    (received,) = await arrived(fleet, 1)
    await eventually("the engine is done", received.ended.is_set)
    status, _, _ = await send(fleet, "POST", "/v1/completions", ASK)
    assert status == 200
    tokens: list[int] = []
    while line := await reader.readline():
        if line.startswith(b"data: {"):
            tokens += json.loads(line[6:])["choices"][0]["token_ids"]
    assert tokens == expected_tokens(ASK["prompt"], "", 10_000)
    writer.close()
    await writer.wait_closed()


async def test_a_slow_reader_that_leaves_is_noted(fleet: Fleet) -> None:
    fleet.engines[0].token_seconds = 0.0001
    _, writer = await open_stream(fleet, {**ASK, "max_tokens": 50_000, "stream": True})
    (received,) = await arrived(fleet, 1)
    writer.close()
    await writer.wait_closed()
    await eventually("the engine was told", received.cancelled.is_set)
    await eventually("it is noted", lambda: fleet.value("in_flight_requests") == 0)


async def arrived(fleet: Fleet, count: int) -> list[Received]:
    received = fleet.engines[0].received
    await eventually("it arrived", lambda: len(received) == count)
    return received


async def test_health_says_whether_requests_are_taken(fleet: Fleet) -> None:
    assert (await send(fleet, "GET", "/health"))[0] == 200
    fleet.engines[0].set_load(draining=True)
    await eventually("the gateway heard", lambda: fleet.in_state(0).load.draining)
    assert (await send(fleet, "GET", "/health"))[0] == 503


async def test_adapters_are_changed_only_where_that_is_allowed(fleet: Fleet) -> None:
    for path in ("load", "unload"):
        status, _, body = await send(fleet, "POST", f"/v1/{path}_lora_adapter", {"lora_name": "poet"})
        assert (status, body["error"]["code"]) == (403, "adapter_updates_off")
        assert "--http-allow-adapter-updates" in body["error"]["message"]
    assert "poet@2" in fleet.store.adapters


async def test_adapters_come_and_go_as_in_vllm(fleet_of: FleetFactory) -> None:
    fleet = await fleet_of(1, http_allow_adapter_updates=True)

    async def change(kind: str, **body: str) -> tuple[int, Any]:
        status, _, answer = await send(fleet, "POST", f"/v1/{kind}_lora_adapter", body)
        return status, answer

    status, answer = await change("load", lora_name="bard", lora_path="s3://bucket/bard/")
    assert (status, answer) == (200, b"Success: LoRA adapter 'bard' added successfully as bard@1.")
    assert fleet.store.adapters["bard@1"].source_uri == "s3://bucket/bard/"
    status, _, body = await send(fleet, "POST", "/v1/completions", {**ASK, "model": "bard"})
    assert (status, body["model"]) == (200, "bard@1")
    assert await change("unload", lora_name="bard") == (200, b"Success: LoRA adapter 'bard' removed successfully.")
    await eventually("the gateway heard", lambda: fleet.gateway and fleet.gateway.catalogue.find("bard") is None)
    assert (await send(fleet, "POST", "/v1/completions", {**ASK, "model": "bard"}))[0] == 404

    status, answer = await change("unload", lora_name="bard")
    assert (status, answer["error"]["code"], answer["error"]["param"]) == (404, "adapter_not_found", "lora_name")
    status, answer = await change("load", lora_name="bard", lora_path="/models/bard")
    assert (status, answer["error"]["param"]) == (400, "lora_path")
    status, answer = await change("load", lora_name="bard")
    assert (status, answer["error"]["param"]) == (400, "lora_path")
    await fleet.store.stop()
    status, answer = await change("load", lora_name="bard", lora_path="s3://bucket/bard/")
    assert (status, answer["error"]["code"]) == (503, "adapter_store_unavailable")


async def test_models_cannot_be_listed_before_all_are_known(fleet_of: FleetFactory) -> None:
    fleet = await fleet_of(1)
    assert fleet.gateway is not None
    fleet.gateway.catalogue.is_complete = False
    status, headers, body = await send(fleet, "GET", "/v1/models")
    assert (status, body["error"]["code"], headers["retry-after"]) == (503, "adapter_store_unavailable", "1")


async def test_the_drain_lets_streams_end_and_refuses_new_ones(
    fleet_of: FleetFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.gateway.http.server._CUT_SECONDS", 30)
    fleet = await fleet_of(1)
    go_on = asyncio.Event()

    async def when_told(engine: FakeEngine, received: Received, context: Context) -> None:
        await go_on.wait()
        for message in answer_messages(received.request):
            await context.write(message)

    fleet.engines[0].script = when_told
    assert fleet.gateway is not None
    reader, writer = await open_stream(fleet, {**ASK, "max_tokens": 10, "stream": True})
    await arrived(fleet, 1)
    draining = asyncio.create_task(fleet.gateway.drain())
    await asyncio.sleep(0)
    status, headers, body = await send(fleet, "POST", "/v1/completions", ASK)
    assert (status, body["error"]["code"], headers["retry-after"]) == (503, "draining", "1")
    assert (await send(fleet, "GET", "/health"))[0] == 503
    go_on.set()
    await draining
    assert fleet.gateway.http is not None
    await fleet.gateway.http.stop()
    answer = await reader.read()
    assert answer.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n") or b"data: [DONE]\n\n" in answer
    writer.close()


async def test_what_outlasts_the_drain_is_cut(fleet: Fleet) -> None:
    fleet.engines[0].script = hang
    assert fleet.gateway is not None
    assert fleet.gateway.http is not None
    reader, writer = await open_stream(fleet, {**ASK, "stream": True})
    (received,) = await arrived(fleet, 1)
    await fleet.gateway.http.stop()
    await eventually("the engine was told", received.cancelled.is_set)
    assert b"[DONE]" not in await reader.read()
    writer.close()


async def test_without_an_address_there_is_no_http(fleet_of: FleetFactory) -> None:
    fleet = await fleet_of(1, http="")
    assert fleet.gateway is not None
    assert fleet.gateway.http is None


def test_an_address_that_cannot_be_served_on_is_named() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None: ...

    port = free_port()
    first = HttpServer(f"127.0.0.1:{port}", app, ServerTls())
    for address in (f"127.0.0.1:{port}", "127.0.0.1:x", "127.0.0.1:99999", "nowhere.invalid:80"):
        with pytest.raises(AddressError, match=f"--http {address}"):
            HttpServer(address, app, ServerTls())
    asyncio.run(first.stop())


async def test_a_client_that_has_gone_without_a_word_is_noticed_within_a_minute() -> None:
    """By the kernel: what it is told for the socket that listens holds for the connections accepted from it."""

    async def app(scope: Any, receive: Any, send: Any) -> None: ...

    server = HttpServer("127.0.0.1:0", app, ServerTls())
    with socket.create_connection(("127.0.0.1", server.port)):
        connection, _ = server._socket.accept()
        with connection:
            assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            options = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_USER_TIMEOUT)
            idle, interval, gone = (connection.getsockopt(socket.IPPROTO_TCP, option) for option in options)
            assert idle + interval < gone / 1000 <= 60
    await server.stop()
