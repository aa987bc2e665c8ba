"""What `up` tells the user, and how it tells states apart."""

from __future__ import annotations

import ast
import io
import json
import re
import shlex
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from google.protobuf import json_format
from rich.console import Console
from slora.gateway.v1 import inference_pb2
from slora_client.command.adapters import DEFAULT_STORE

from services.local import up
from services.local.checkpoint import BadInput
from services.local.narrator import Narrator
from services.local.ports import LOOPBACK, claiming, free_port
from services.local.s3_client import S3Place
from services.local.stack import LocalStack
from services.local.up import UpRequest, how_to_call, run_up
from tests.fixtures.hollow_checkpoint import write_hollow_checkpoint

PROMPT = "It's \"late\", :moon: [bold]isn't it?[/bold]"


@pytest.fixture
def stack(tmp_path: Path) -> LocalStack:
    """Two engines, never started."""
    return LocalStack(tmp_path / "state", write_hollow_checkpoint(tmp_path / "tiny"), num_engines=2)


class SlowStack(LocalStack):
    """Tells how long it would have waited for a service."""

    def start(self, on_ready: Callable[[str], None] = lambda name: None) -> None:
        raise TimeoutError(self.start_timeout_seconds)


def test_up_waits_for_weights_that_take_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(up, "LocalStack", SlowStack)
    checkpoint = write_hollow_checkpoint(tmp_path / "random-weights-tiny")
    request = UpRequest(
        tmp_path / "state", checkpoint, gateway_port=free_port(), http_port=0, engine_options={"random_weights": True}
    )
    with pytest.raises(TimeoutError) as waited:
        run_up(request, Narrator(Console(file=io.StringIO())))
    assert waited.value.args[0] >= 1800


def test_it_says_where_everything_is(stack: LocalStack) -> None:
    told = how_to_call(stack, "a0", PROMPT)
    assert told.startswith("\nslora serves tiny:\n")
    listed = re.findall(r"^  (\S.*?) {2,}(\S+)$", told, re.MULTILINE)
    metrics = [(f"metrics of {name}", url) for name, url in stack.metrics_urls.items()]
    assert listed == [
        ("gateway", stack.gateway_address),
        ("gateway over HTTP", stack.http_url),
        ("adapter store", stack.store_address),
        ("engine-0", stack.engine_addresses[0]),
        ("engine-1", stack.engine_addresses[1]),
        ("redis", stack.redis.url),
        *metrics,
        ("logs", str(stack.log_dir)),
        ("what is kept", str(stack.state_dir)),
    ]
    assert len(metrics) == 4


def test_the_python_lines_are_python(stack: LocalStack) -> None:
    told = how_to_call(stack, "a0", PROMPT)
    code = textwrap.dedent(told.partition("From Python:\n")[2].partition("From a shell:")[0])
    written = {node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)}
    assert {stack.gateway_address, stack.store_address, "a0", PROMPT, 40} <= written


def test_the_shell_line_asks_the_gateway(stack: LocalStack) -> None:
    told = how_to_call(stack, "a0", PROMPT)
    command = told.partition("From a shell:\n")[2].partition("\n\nAs OpenAI's")[0].replace("\\\n", " ")
    words = shlex.split(command)
    assert words[:2] == ["buf", "curl"]
    assert words[-1] == f"http://{stack.gateway_address}/slora.gateway.v1.InferenceService/Generate"
    request = json_format.Parse(words[words.index("-d") + 1], inference_pb2.GenerateRequest())
    assert (request.model, request.prompt.text, request.stopping.max_tokens) == ("a0", PROMPT, 40)
    assert request.sampling.HasField("temperature")
    assert request.sampling.temperature == 0


def test_the_line_for_http_asks_for_a_completion(stack: LocalStack) -> None:
    told = how_to_call(stack, "a0", PROMPT)
    words = shlex.split(told.partition("any key):\n")[2].partition("\n\nCtrl-C")[0].replace("\\\n", " "))
    assert words[:2] == ["curl", f"{stack.http_url}/completions"]
    body = json.loads(words[words.index("-d") + 1])
    assert body == {"model": "a0", "prompt": PROMPT, "temperature": 0, "max_tokens": 40}


@pytest.mark.parametrize("is_terminal", [False, True])
def test_what_is_to_be_copied_is_printed_as_it_is(stack: LocalStack, is_terminal: bool) -> None:
    told = how_to_call(stack, "a0", PROMPT)
    printed = io.StringIO()
    Narrator(Console(file=printed, width=40, force_terminal=is_terminal, highlight=False)).line(told)
    assert printed.getvalue() == told + "\n"


def test_states_differ_by_checkpoint_and_by_where_adapters_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(variable, raising=False)
    here, there = (write_hollow_checkpoint(tmp_path / place / "tiny") for place in ("here", "there"))
    place = S3Place("adapters", "loras/")
    names = [up._state_name(here, None), up._state_name(there, None), up._state_name(here, place)]
    names.append(up._state_name(here, S3Place("others", "loras/")))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9000")
    names.append(up._state_name(here, place))
    # What an endpoint is has nothing to say where S3 is embedded.
    assert up._state_name(here, None) == names[0]
    (here / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    names.append(up._state_name(here, None))
    assert len(set(names)) == 6
    assert all(re.fullmatch(r"tiny-[0-9a-f]{12}", name) for name in names)
    # The same by another way is the same.
    assert up._state_name(there.parent / ".." / "here" / "tiny", None) == names[-1]


def test_the_store_is_where_it_is_looked_for_if_the_port_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    monkeypatch.setattr(up, "STORE_PORT", port)
    with claiming() as claim:
        assert up._store_port(claim, port, 8000) == 0  # it was given to the gateway
        assert up._store_port(claim, 0, 8000) == port
    stack = LocalStack(tmp_path / "state", write_hollow_checkpoint(tmp_path / "tiny"), store_port=port)
    assert stack.store_address == f"{LOOPBACK}:{port}"
    with socket.create_server((LOOPBACK, port)), claiming() as claim:
        assert up._store_port(claim, 0, 8000) == 0


def test_two_ups_at_once_do_not_choose_the_same_ports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one looks when the first has looked, and has started nothing yet."""
    grpc, http, store = free_port(), free_port(), free_port()
    monkeypatch.setattr(up, "STORE_PORT", store)
    given: list[int] = []

    def serve(request: up.UpRequest, store_port: int, narrator: Narrator) -> None:
        given.append(store_port)
        if len(given) == 1:
            second = up.UpRequest(tmp_path / "second", gateway_port=grpc, http_port=free_port())
            with pytest.raises(BadInput, match=rf"port {grpc} of .* is in use; .*gRPC: `make up PORT=N`, or --port N"):
                up.run_up(second, narrator)
            second = up.UpRequest(tmp_path / "second", gateway_port=0, http_port=http)
            with pytest.raises(BadInput, match=rf"port {http} of .*HTTP: `make up HTTP_PORT=N`, or --http-port N"):
                up.run_up(second, narrator)
            assert up.run_up(up.UpRequest(tmp_path / "second", gateway_port=0, http_port=0), narrator) == 0
        raise KeyboardInterrupt

    monkeypatch.setattr(up, "_serve", serve)
    first = up.UpRequest(tmp_path / "first", gateway_port=grpc, http_port=http)
    assert up.run_up(first, Narrator(Console(file=io.StringIO()))) == 0
    assert given == [store, 0]
    with claiming() as claim:
        assert [claim(port) for port in (grpc, http, store)] == [True, True, True], "given back when it ended"


def test_a_claim_ends_with_its_owner(tmp_path: Path) -> None:
    port = free_port()
    program = (
        f"from services.local.ports import claiming\n"
        f"with claiming() as claim:\n    print(claim({port}), claim({port}), flush=True)\n    input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "True False\n"
        with claiming() as claim:
            assert not claim(port)
            owner.kill()
            owner.wait()
            assert claim(port)


def test_up_puts_the_store_where_the_command_looks() -> None:
    assert f"localhost:{up.STORE_PORT}" == DEFAULT_STORE
