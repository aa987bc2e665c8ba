"""The frontend as a real process with a real (if brainless) core process: deaths, drains, starts."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from slora.engine.v1 import engine_pb2, engine_pb2_grpc

from services.common.errors import Reason, SloraError
from services.common.grpc_client import open_blocking_channel
from services.common.grpc_errors import from_rpc_error

FAKE_ENGINE = str(Path(__file__).with_name("fake_engine.py"))
PATIENCE = 30.0


class Process:
    """A running engine process and what it logged."""

    def __init__(self, checkpoint: Path, folder: Path, mode: str, pace: float, *settings: str) -> None:
        self.core_log = folder / "core.log"
        argv = [mode, str(pace), str(self.core_log), "--checkpoint", str(checkpoint), "--adapter-store", "none:1"]
        argv += ["--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0", *settings]
        self.process = subprocess.Popen([sys.executable, FAKE_ENGINE, *argv], stderr=subprocess.PIPE, text=True)
        self.lines: list[dict[str, Any]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with contextlib.suppress(ValueError):
                self.lines.append(json.loads(line))

    def logged(self, message: str) -> dict[str, Any]:
        wait_for(lambda: any(message in line["message"] for line in list(self.lines)), f"log line {message!r}")
        return next(line for line in self.lines if message in line["message"])

    def core_pids(self) -> list[int]:
        return [child.pid for child in psutil.Process(self.process.pid).children()]

    def exit_code(self) -> int:
        code = self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        return code

    def core_was_sent(self, kind: str) -> int:
        return sum(line.startswith(kind) for line in self.core_log.read_text().splitlines())


def is_alive(pid: int) -> bool:
    """A zombie, waiting for an init process to notice, is dead."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_for(condition: Callable[[], Any], what: str, seconds: float = PATIENCE) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"no {what} within {seconds} s"
        time.sleep(0.01)


@pytest.fixture
def launch(checkpoints: dict[str, Path], tmp_path: Path) -> Iterator[Callable[..., Process]]:
    started: list[Process] = []

    def start(mode: str = "echo", pace: float = 0.01, *settings: str) -> Process:
        started.append(Process(checkpoints["byte-level"], tmp_path, mode, pace, *settings))
        return started[-1]

    yield start
    for one in started:
        pids = []
        with contextlib.suppress(psutil.NoSuchProcess):
            pids = one.core_pids()
        one.process.kill()
        one.exit_code()
        assert one.process.stderr is not None
        one.process.stderr.close()
        wait_for(lambda pids=pids: not any(map(is_alive, pids)), "end of the core")


class Client:
    def __init__(self, process: Process) -> None:
        self.channel = open_blocking_channel(f"127.0.0.1:{process.logged('listening')['port']}")
        self.stub = engine_pb2_grpc.EngineServiceStub(self.channel)
        self.health = health_pb2_grpc.HealthStub(self.channel)

    def is_serving(self) -> bool:
        try:
            answer = self.health.Check(health_pb2.HealthCheckRequest(service="slora.engine.v1.EngineService"))
        except grpc.RpcError:
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    def generate(self, max_tokens: int, prompt: list[int] | None = None, seconds: float = 60.0) -> Any:
        request = engine_pb2.GenerateRequest(
            request_id="x", prompt={"token_ids": {"ids": prompt or [300, 301]}}, stopping={"max_tokens": max_tokens}
        )
        return self.stub.Generate(request, timeout=seconds)

    def watch(self) -> Any:
        return self.stub.WatchState(engine_pb2.WatchStateRequest(), timeout=60)


@pytest.fixture
def connect() -> Iterator[Callable[[Process], Client]]:
    clients: list[Client] = []

    def open_client(process: Process) -> Client:
        clients.append(Client(process))
        return clients[-1]

    yield open_client
    for client in clients:
        client.channel.close()


def reason_of(call: Any) -> SloraError:
    with pytest.raises(grpc.RpcError) as caught:
        for _ in call:
            pass
    return from_rpc_error(caught.value, Reason.ENGINE_UNAVAILABLE)


def test_serves(launch: Any, connect: Any) -> None:
    process = launch()
    client = connect(process)
    wait_for(client.is_serving, "health SERVING")
    responses = list(client.generate(5))
    assert [i for r in responses for i in r.token_ids] == [300, 301, 300, 301, 300]
    first = next(client.watch())
    assert first.profile.base_model == "bytes"  # the checkpoint directory's name
    assert first.profile.engine_id
    assert [a.adapter_id for a in first.loaded_adapters] == ["first@1"]
    answer = client.stub.PrefetchAdapter(
        engine_pb2.PrefetchAdapterRequest(adapter={"adapter_id": "a@1", "digest": "sha256:" + "2" * 64})
    )
    assert answer.load_time.ToMilliseconds() == 500
    port = process.logged("listening")["metrics_port"]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as page:
        text = page.read().decode()
    assert 'slora_engine_requests_total{adapter="base",outcome="length"} 1.0' in text
    assert 'slora_engine_generation_tokens_total{adapter="base"} 5.0' in text
    assert process.logged("request ended")["num_completion_tokens"] == 5


def test_killed_core_ends_every_stream_at_once_and_comes_back(launch: Any, connect: Any) -> None:
    process = launch("echo", 0.01)
    client = connect(process)
    wait_for(client.is_serving, "health SERVING")
    watch = client.watch()
    first_id = next(watch).profile.engine_id
    calls = [client.generate(10**5) for _ in range(8)]
    for call in calls:
        next(call)
    (pid,) = process.core_pids()
    killed_at = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    for call in [*calls, watch]:
        assert reason_of(call).reason is Reason.ENGINE_CORE_DEAD
    assert time.monotonic() - killed_at < 10
    wait_for(client.is_serving, "health SERVING again")
    assert next(client.watch()).profile.engine_id not in ("", first_id)
    assert process.core_pids() != [pid]
    assert len(list(client.generate(3))) >= 1
    assert "SIGKILL" in process.logged("the core died")["message"]


def test_not_serving_while_there_is_no_core(launch: Any, connect: Any) -> None:
    process = launch("die-on-request", 0.01)
    client = connect(process)
    wait_for(client.is_serving, "health SERVING")
    states = []
    watching = client.health.Watch(health_pb2.HealthCheckRequest())

    def follow() -> None:
        with contextlib.suppress(grpc.RpcError):
            states.extend(answer.status for answer in watching)

    follower = threading.Thread(target=follow)
    follower.start()
    wait_for(lambda: states, "first state")
    assert reason_of(client.generate(3)).reason is Reason.ENGINE_CORE_DEAD
    values = health_pb2.HealthCheckResponse
    wait_for(lambda: len(states) == 3, "health states")
    watching.cancel()
    follower.join()
    assert states == [values.SERVING, values.NOT_SERVING, values.SERVING]


def test_cancel_reaches_the_core(launch: Any, connect: Any) -> None:
    process = launch("echo", 0.01)
    client = connect(process)
    wait_for(client.is_serving, "health SERVING")
    call = client.generate(10**5)
    next(call)
    call.cancel()
    wait_for(lambda: process.core_was_sent("Abort") == 1, "Abort")
    for seconds in (0.3, 3.0, 20.0):  # on a slow machine the first one may pass before the core has heard of the call
        with pytest.raises(grpc.RpcError):
            list(client.generate(10**5, seconds=seconds))
        if process.core_was_sent("Generate") > 1:
            break
    assert process.core_was_sent("Generate") > 1
    wait_for(lambda: process.core_was_sent("Abort") == process.core_was_sent("Generate"), "Abort of the deadline")


def test_drain_lets_running_requests_end(launch: Any, connect: Any) -> None:
    process = launch("echo", 0.01, "--drain-seconds", "60")
    client = connect(process)
    wait_for(client.is_serving, "health SERVING")
    watch = client.watch()
    next(watch)
    call, long = client.generate(150), client.generate(10**5)
    next(call)
    next(long)
    (core_pid,) = process.core_pids()
    process.process.send_signal(signal.SIGTERM)
    process.logged("draining")
    assert not client.is_serving()
    assert reason_of(client.generate(3)).reason is Reason.DRAINING
    wait_for(lambda: next(watch).load.draining, "draining in WatchState")
    responses = list(call)  # a second and a half of tokens
    assert sum(len(r.token_ids) for r in responses) >= 140
    assert responses[-1].HasField("completion")
    long.cancel()  # until then it drains, however slow this machine is
    assert reason_of(watch).reason is Reason.DRAINING
    assert process.exit_code() == 0
    assert not is_alive(core_pid)


def test_drain_cuts_what_takes_too_long(launch: Any, connect: Any) -> None:
    process = launch("echo", 0.01, "--drain-seconds", "0.5")
    client = connect(process)
    wait_for(client.is_serving, "health SERVING")
    call = client.generate(10**5)
    next(call)
    start = time.monotonic()
    process.process.send_signal(signal.SIGTERM)
    assert reason_of(call).reason is Reason.DRAINING
    assert 0.4 < time.monotonic() - start < 15
    assert process.exit_code() == 0
    assert not [line for line in process.lines if line["level"] in ("ERROR", "CRITICAL")]


def test_a_reader_that_stands_still_does_not_hold_up_the_end(launch: Any) -> None:
    process = launch("echo", 0.0, "--drain-seconds", "0.5")
    options = [("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0)]
    with grpc.insecure_channel(f"127.0.0.1:{process.logged('listening')['port']}", options=options) as channel:
        process.logged("the core is ready")
        call = engine_pb2_grpc.EngineServiceStub(channel).Generate(
            engine_pb2.GenerateRequest(request_id="x", prompt={"token_ids": {"ids": [300]}}), timeout=60
        )
        next(call)
        time.sleep(0.5)  # by now what may be under way is under way, and the rest waits here
        start = time.monotonic()
        process.process.send_signal(signal.SIGTERM)
        assert process.exit_code() == 0
        assert time.monotonic() - start < 15
        call.cancel()


def test_sigterm_while_idle_ends_at_once_without_errors(launch: Any, connect: Any) -> None:
    process = launch()
    client = connect(process)
    wait_for(client.is_serving, "health SERVING")
    (core_pid,) = process.core_pids()
    start = time.monotonic()
    process.process.send_signal(signal.SIGTERM)
    assert process.exit_code() == 0
    assert time.monotonic() - start < 15, "nor does it wait for the drain's 30 s"
    assert not is_alive(core_pid)
    assert not [line for line in process.lines if line["level"] in ("WARNING", "ERROR", "CRITICAL")]


def test_killed_frontend_leaves_no_core(launch: Any, connect: Any) -> None:
    process = launch()
    wait_for(connect(process).is_serving, "health SERVING")
    (core_pid,) = process.core_pids()
    process.process.kill()
    wait_for(lambda: not is_alive(core_pid), "end of the core")


def test_ctrl_c_is_the_frontends_to_handle(launch: Any, connect: Any) -> None:
    """A terminal sends SIGINT to the whole group; the core must live until requests are drained."""
    process = launch()
    wait_for(connect(process).is_serving, "health SERVING")
    (core_pid,) = process.core_pids()
    assert os.getpgid(core_pid) != os.getpgid(process.process.pid)


def test_a_core_that_cannot_start(launch: Any) -> None:
    process = launch("bad-checkpoint")
    assert process.exit_code() == 1
    message = process.logged("gives up")["message"]
    assert "exit code 1" in message
    assert "the checkpoint holds no weights" in message


def test_a_core_that_refuses_its_settings(launch: Any) -> None:
    process = launch("usage")
    assert process.exit_code() == 2
    assert process.lines[-1]["message"] == "the engine cannot start: num_pages is too small"
    assert not [line for line in process.lines if "trying again" in line["message"]]


def test_a_core_that_refuses_its_settings_without_saying_why(launch: Any) -> None:
    process = launch("usage-without-a-word")
    assert process.exit_code() == 2
    assert process.lines[-1]["message"].endswith("Its last words: usage: engine-core")


def test_requests_before_the_core_is_ready(launch: Any, connect: Any) -> None:
    process = launch("slow-start")
    client = connect(process)
    assert not client.is_serving()
    for call in (client.generate(1), client.watch()):
        error = reason_of(call)
        assert error.reason is Reason.ENGINE_UNAVAILABLE
        assert "loading its model" in error.message
    process.core_log.with_suffix(".go").touch()
    wait_for(client.is_serving, "health SERVING")
    assert len(list(client.generate(1))) == 1


@pytest.mark.parametrize(
    ("option", "address"),
    [("--listen", "taken"), ("--metrics", "taken"), ("--metrics", "nonsense"), ("--listen", "x:y")],
)
def test_an_address_that_cannot_be_served_is_named(checkpoints: dict[str, Path], option: str, address: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        if address == "taken":
            address = f"127.0.0.1:{taken.getsockname()[1]}"
        argv = ["--checkpoint", str(checkpoints["byte-level"]), "--adapter-store", "none:1"]
        argv += ["--listen", "127.0.0.1:0", option, address]
        command = [sys.executable, "-m", "services.engine", *argv]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 2
    message = json.loads(done.stderr.splitlines()[-1])["message"]
    assert f"{option} {address}" in message


def test_no_checkpoint_is_said_clearly(tmp_path: Path) -> None:
    argv = ["--checkpoint", str(tmp_path / "none"), "--adapter-store", "127.0.0.1:1", "--listen", "127.0.0.1:0"]
    done = subprocess.run([sys.executable, "-m", "services.engine", *argv], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    line = json.loads(done.stderr.splitlines()[-1])
    assert "holds no tokenizer.json" in line["message"]


def test_the_frontend_loads_neither_torch_nor_transformers() -> None:
    """They would cost seconds and hundreds of megabytes in a process that has no use for them."""
    code = (
        "import sys, services.engine.servicer, services.engine.frontend.supervisor, services.engine.__main__\n"
        "print([name for name in ('torch', 'transformers', 'numpy', 'kernels') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
