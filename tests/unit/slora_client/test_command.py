"""The `slora` command against a gateway to order."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from slora.engine.v1 import generation_pb2
from slora.gateway.v1 import inference_pb2
from slora_client.command import bench_progress, terminal
from slora_client.command.bench import Outcome
from slora_client.command.bench_report import Percentiles, percentiles, report_of
from slora_client.command.main import app
from typer.testing import CliRunner, Result

from services.common.errors import Reason, SloraError
from services.local.ports import free_port
from tests.fakes.fake_gateway import FakeGateway

ROOT = Path(__file__).resolve().parents[3]


def says(*texts: str, is_complete: bool = True) -> list[inference_pb2.GenerateResponse]:
    responses = [inference_pb2.GenerateResponse(text=text, token_ids=[7]) for text in texts]
    if is_complete:
        responses[-1].completion.finish_reason = generation_pb2.FINISH_REASON_STOP
        responses[-1].completion.usage.num_completion_tokens = len(texts)
    return responses


async def run(gateway: FakeGateway, *argv: object, text: str | None = None) -> Result:
    """Runs the command on a thread: the gateway answers on this one."""
    words = [str(word) for word in (argv[0], "--gateway", gateway.address, *argv[1:])]
    return await asyncio.to_thread(CliRunner().invoke, app, words, text)


async def test_generate_prints_the_text_as_it_is(gateway: FakeGateway) -> None:
    gateway.responses = says("Ros", "es \x1b[31m")
    result = await run(
        gateway, "generate", "poet", "Write:", "--temperature", 0, "--max-tokens", 9, "--stop", "a", "--priority", 2
    )
    assert (result.exit_code, result.output) == (0, "Roses \x1b[31m")  # into a pipe
    (request,) = gateway.requests
    assert (request.model, request.prompt.text) == ("poet", "Write:")
    assert request.sampling.HasField("temperature")
    assert not request.sampling.HasField("top_p")
    assert (request.stopping.max_tokens, list(request.stopping.stop_strings), request.priority) == (9, ["a"], 2)


async def test_a_prompt_from_standard_input_and_a_message(gateway: FakeGateway) -> None:
    gateway.responses = says("x")
    await run(gateway, "generate", "poet", "-", text="from a pipe\n")
    await run(gateway, "generate", "poet", "Hi", "--system", "Be brief.")
    await run(gateway, "generate", "poet", "Hi", "--chat")
    first, second, third = gateway.requests
    assert first.prompt.text == "from a pipe\n"
    assert [(m.role, m.content) for m in second.prompt.chat.messages] == [("system", "Be brief."), ("user", "Hi")]
    assert [m.role for m in third.prompt.chat.messages] == ["user"]


def test_a_terminal_gets_no_control_characters() -> None:
    assert terminal.shown("a\tb\nc\x1b[2J\x07\x9b31m\r数🙂") == "a\tb\nc[2J31m数🙂"


async def test_models(gateway: FakeGateway) -> None:
    model = inference_pb2.Model(name="poet", adapter_id="poet@3", base_model="base", rank=8, num_resident_engines=2)
    model.create_time.FromSeconds(1_700_000_000)
    base = inference_pb2.Model(name="base", base_model="base", num_resident_engines=1)
    gateway.models = [base, model, inference_pb2.Model(name="z", adapter_id="z@1", base_model="base")]
    result = await run(gateway, "models")
    lines = [line.split() for line in result.output.splitlines()]
    assert lines[1] == ["base", "base", "1"]
    assert lines[2] == ["poet", "3", "8", "2023-11-14", "22:13", "2"]
    assert len(lines) == 4
    listed = json.loads((await run(gateway, "models", "--json")).output)
    assert [entry["name"] for entry in listed] == ["base", "poet", "z"]
    assert listed[1]["create_time"].startswith("2023-11-14")


async def test_a_chat_keeps_what_was_said(gateway: FakeGateway) -> None:
    gateway.responses = says("Hello", " there")
    result = await run(gateway, "chat", "poet", "--system", "S", text="Hi\n\nAgain\n/clear\nAnew\n")
    assert result.exit_code == 0
    assert result.output.count("Hello there\n") == 3
    said = [[(m.role, m.content) for m in request.prompt.chat.messages] for request in gateway.requests]
    assert said == [
        [("system", "S"), ("user", "Hi")],
        [("system", "S"), ("user", "Hi"), ("assistant", "Hello there"), ("user", "Again")],
        [("system", "S"), ("user", "Anew")],
    ]


async def test_a_chat_goes_on_after_an_error(gateway: FakeGateway) -> None:
    gateway.error = SloraError(Reason.CHAT_TEMPLATE_MISSING, "no template")
    result = await run(gateway, "chat", "poet", text="Hi\nAgain\n")
    assert result.exit_code == 1
    assert result.output.count("slora: CHAT_TEMPLATE_MISSING: no template") == 2
    assert [len(request.prompt.chat.messages) for request in gateway.requests] == [1, 1]


# A signal that this process was started to ignore would be ignored by the command too. Not by preexec_fn: that runs
# Python in a fork, beside grpc's threads.
COMMAND = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from slora_client.command.entry import main
main()
"""


async def start(gateway: FakeGateway, *argv: str, stderr: int = asyncio.subprocess.PIPE) -> asyncio.subprocess.Process:
    return await start_command(argv[0], "--gateway", gateway.address, *argv[1:], stderr=stderr)


async def start_command(*words: str, stderr: int = asyncio.subprocess.PIPE) -> asyncio.subprocess.Process:
    path = os.pathsep.join(str(ROOT / place) for place in ("gen/python", "clients"))
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", COMMAND, *words),
        env={**os.environ, "PYTHONPATH": path},
        stdin=pipe,
        stdout=pipe,
        stderr=stderr,
    )


async def test_interrupting_stops_the_answer_not_the_chat(gateway: FakeGateway) -> None:
    gateway.responses, gateway.hangs = says("Once", is_complete=False), True
    chat = await start(gateway, "chat", "poet")
    assert chat.stdin is not None
    assert chat.stdout is not None
    chat.stdin.write(b"Hi\n")
    assert await asyncio.wait_for(chat.stdout.readuntil(b"Once"), 20)
    chat.send_signal(signal.SIGINT)
    await asyncio.wait_for(gateway.cancelled.wait(), 10)
    gateway.responses, gateway.hangs = says("More"), False
    chat.stdin.write(b"Go on\n")
    assert b"More" in await asyncio.wait_for(chat.stdout.readuntil(b"More"), 20)
    said = [(m.role, m.content) for m in gateway.requests[1].prompt.chat.messages]
    assert said == [("user", "Hi"), ("assistant", "Once"), ("user", "Go on")]
    chat.stdin.close()
    assert await asyncio.wait_for(chat.wait(), 20) == 0


async def test_interrupting_generate_ends_it(gateway: FakeGateway) -> None:
    gateway.responses, gateway.hangs = says("Once", is_complete=False), True
    generate = await start(gateway, "generate", "poet", "Hi")
    assert generate.stdout is not None
    assert await asyncio.wait_for(generate.stdout.readuntil(b"Once"), 20)
    generate.send_signal(signal.SIGINT)
    await asyncio.wait_for(gateway.cancelled.wait(), 10)
    assert await asyncio.wait_for(generate.wait(), 20) == 130


async def test_a_failure_is_one_line(gateway: FakeGateway) -> None:
    gateway.error = SloraError(Reason.MODEL_NOT_FOUND, "no model 'x'")
    ended = await start(gateway, "generate", "x", "Hi")
    out, err = await asyncio.wait_for(ended.communicate(), 20)
    assert (ended.returncode, out, err) == (1, b"", b"slora: MODEL_NOT_FOUND: no model 'x'\n")


async def test_an_option_that_cannot_be_sent_is_one_line(gateway: FakeGateway) -> None:
    ended = await start(gateway, "generate", "poet", "Hi", "--top-k", "-3")
    out, err = await asyncio.wait_for(ended.communicate(), 20)
    assert (ended.returncode, out) == (2, b"")
    assert re.fullmatch(rb"slora: top_k cannot be -3: [^\n]+\n", err)
    assert gateway.requests == []


async def test_models_in_a_pipe_are_whole(gateway: FakeGateway) -> None:
    name = "long-" * 24
    gateway.models = [inference_pb2.Model(name=name, adapter_id=f"{name}@1", base_model="base")]
    assert f"{name} " in (await run(gateway, "models")).output


async def test_a_wrong_address_says_how_it_is_given(gateway: FakeGateway) -> None:
    nobody = f"127.0.0.1:{free_port()}"
    for address, found in ((nobody, "no service answers there"), (gateway.address, "another service answers there")):
        result = await asyncio.to_thread(CliRunner().invoke, app, ["adapters", "ls", "--store", address])
        where = r"--gateway or SLORA_GATEWAY \(host:port\) .* --store or SLORA_ADAPTER_STORE"
        assert re.search(f"slora: [A-Z]+: {found}: {where}", result.output)
    gateway.error = SloraError(Reason.ENGINE_UNAVAILABLE, "no engine")
    chat = await run(gateway, "chat", "poet", text="Hi\n")
    assert "slora: ENGINE_UNAVAILABLE: no engine\n" in chat.output


@pytest.mark.parametrize("words", [("models",), ("generate", "poet", "Hi"), ("adapters", "ls")])
async def test_who_is_away_ends_the_command_with_3(words: tuple[str, ...]) -> None:
    option = "--store" if words[0] == "adapters" else "--gateway"
    ended = await start_command(*words, option, f"127.0.0.1:{free_port()}")
    _, said = await asyncio.wait_for(ended.communicate(), 60)
    assert (ended.returncode, said.decode().partition(":")[0]) == (3, "slora")


async def test_bench_measures(gateway: FakeGateway) -> None:
    gateway.responses = says("a", "b", "c")
    load = ("bench", "base", "poet", "--requests", 10, "--concurrency", 3, "--prompt-tokens", 5, "--output-tokens", 3)
    measured: dict[str, Any] = json.loads((await run(gateway, *load, "--json")).output)
    assert measured["num_requests"] == 10
    assert measured["output_tokens_per_second"] == pytest.approx(3 * measured["requests_per_second"])
    assert 0 < measured["ttft_seconds"]["p50"] <= measured["ttft_seconds"]["p99"]
    assert measured["errors"] == {}
    assert sorted(request.model for request in gateway.requests) == ["base"] * 5 + ["poet"] * 5
    for request in gateway.requests:
        assert len(request.prompt.token_ids.ids) == 5
        assert (request.stopping.max_tokens, request.stopping.ignore_eos) == (3, True)
    table = await run(gateway, *load)
    assert table.exit_code == 0
    assert "time to first token" in table.output


async def test_bench_counts_failures(gateway: FakeGateway) -> None:
    gateway.error = SloraError(Reason.QUEUE_FULL, "full")
    result = await run(gateway, "bench", "base", "--requests", 4, "--json")
    assert result.exit_code == 1
    measured = json.loads(result.output)
    assert measured["errors"] == {"QUEUE_FULL": 4}
    assert measured["messages"] == {"QUEUE_FULL": "QUEUE_FULL: full"}
    assert "slora: QUEUE_FULL: full\n" in (await run(gateway, "bench", "base", "--requests", 4)).output
    assert measured["ttft_seconds"] is None
    assert measured["requests_per_second"] == 0


async def test_bench_says_how_far_it_is_where_its_errors_go(
    gateway: FakeGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_progress, "LINE_EVERY_SECONDS", 0.01)
    gateway.error, gateway.seconds_before_answers = SloraError(Reason.QUEUE_FULL, "full"), 0.1
    result = await run(gateway, "bench", "base", "--requests", 4, "--concurrency", 1, "--json")
    assert json.loads(result.stdout)["num_requests"] == 4, "nothing but the report"
    said = re.findall(r"^(\d) of 4 requests(?:, (\d) failed)?, \d s$", result.stderr, re.MULTILINE)
    assert len(said) == len(result.stderr.splitlines())
    assert said[0] == ("0", ""), "by the clock, before anything has ended"
    assert any(done != "0" for done, _ in said)
    assert all(failed == done.strip("0") for done, failed in said)


async def test_bench_draws_a_bar_on_a_terminal(gateway: FakeGateway) -> None:
    gateway.responses, gateway.seconds_before_answers = says("a"), 0.2
    ours, theirs = os.openpty()
    try:
        bench = await start(gateway, "bench", "base", "--requests", "4", "--concurrency", "2", "--json", stderr=theirs)
        out, _ = await asyncio.wait_for(bench.communicate(), 20)
        drawn = os.read(ours, 1 << 16).decode()
    finally:
        os.close(ours)
        os.close(theirs)
    assert bench.returncode == 0
    assert json.loads(out)["num_requests"] == 4, "nothing but the report"
    assert "requests" in drawn
    assert "0/4" in drawn
    assert "4/4" in drawn


def test_percentiles_are_values_that_occurred() -> None:
    assert percentiles([]) is None
    assert percentiles([3.0]) == Percentiles(3.0, 3.0, 3.0)
    assert percentiles([float(n) for n in range(100, 0, -1)]) == Percentiles(50.0, 90.0, 99.0)
    outcomes = [Outcome(1, 0.5, None), Outcome(5, 0.1, 0.2), Outcome(error="X")]
    report = report_of(outcomes, 2.0)
    assert (report.num_requests, report.requests_per_second, report.output_tokens_per_second) == (3, 1.0, 3.0)
    assert report.tpot_seconds == Percentiles(0.2, 0.2, 0.2)
