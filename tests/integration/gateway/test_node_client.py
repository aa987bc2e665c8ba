"""A client of another language: grpc-js, straight from the protos, before fake engines (`clients/node/`)."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from services.common.errors import Reason
from tests.fakes.fake_engine import FakeEngine, Received, answer_messages, expected_tokens, fail_after, refuse
from tests.integration.gateway.conftest import Fleet, FleetFactory, eventually

EXAMPLE = Path(__file__).resolve().parents[3] / "clients" / "node" / "generate.js"
NODE = shutil.which("node")

pytestmark = [
    pytest.mark.skipif(NODE is None, reason="NOT TESTED: the Node client, because there is no `node` here"),
    pytest.mark.skipif(
        not (EXAMPLE.parent / "node_modules" / "@grpc" / "grpc-js").is_dir(),
        reason="NOT TESTED: the Node client, because its packages are missing: npm ci --prefix clients/node",
    ),
]


async def node(fleet: Fleet, model: str, prompt: str) -> asyncio.subprocess.Process:
    assert fleet.gateway is not None
    address = f"127.0.0.1:{fleet.gateway.server.port}"
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(str(NODE), EXAMPLE, address, model, prompt, stdout=pipe, stderr=pipe)


async def run(fleet: Fleet, model: str, prompt: str) -> tuple[int | None, str, str]:
    """Exit code, output, errors."""
    process = await node(fleet, model, prompt)
    out, err = await asyncio.wait_for(process.communicate(), 60)
    return process.returncode, out.decode(), err.decode()


async def test_node_gets_every_token(fleet_of: FleetFactory) -> None:
    fleet = await fleet_of(1)
    prompt = "naïve 数 🙂"
    code, out, err = await run(fleet, "poet@1", prompt)
    digest = fleet.store.adapters["poet@1"].digest
    assert (code, out) == (0, "".join(f" {token}" for token in expected_tokens(prompt, digest, 40)))
    completion: dict[str, Any] = json.loads(err)
    assert completion["finishReason"] == "FINISH_REASON_LENGTH"
    assert completion["usage"] == {"numPromptTokens": 3, "numCompletionTokens": 40, "numCachedTokens": 2}


async def test_node_takes_messages_without_text(fleet_of: FleetFactory) -> None:
    async def halves(engine: FakeEngine, received: Received, context: Any) -> None:
        for number, message in enumerate(answer_messages(received.request)):
            message.text = "" if number % 2 else "x"
            await context.write(message)

    fleet = await fleet_of(1, script=halves)
    code, out, _ = await run(fleet, "base", "x")
    assert (code, out) == (0, "x" * 20)


async def test_node_gets_errors_by_their_status(fleet_of: FleetFactory) -> None:
    fleet = await fleet_of(1)
    code, out, err = await run(fleet, "nobody", "x")
    assert (code, out) == (1, "")
    assert err.startswith("NOT_FOUND: no model 'nobody'")
    fleet.engines[0].script = refuse(Reason.SAMPLING_INVALID, "too hot")
    assert await run(fleet, "base", "x") == (1, "", "INVALID_ARGUMENT: too hot\n")
    fleet.engines[0].script = fail_after(2, Reason.ENGINE_CORE_DEAD)
    code, out, err = await run(fleet, "base", "x")
    first, second = expected_tokens("x", "", 2)
    assert (code, out, err) == (1, f" {first} {second}", "UNAVAILABLE: failed by the test\n")


async def test_a_node_client_that_dies_ends_its_generation(fleet_of: FleetFactory) -> None:
    fleet = await fleet_of(1)
    fleet.engines[0].token_seconds = 0.2
    process = await node(fleet, "base", "x")
    assert process.stdout is not None
    assert await asyncio.wait_for(process.stdout.read(1), 60)
    process.kill()
    await process.communicate()
    (received,) = fleet.engines[0].received
    await eventually("the engine was told", received.cancelled.is_set)
