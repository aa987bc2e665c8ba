"""`python -m services.local`: what its arguments mean, and how it refuses what it cannot use."""

from __future__ import annotations

import json
import signal
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from services.adapter_store.arena import TRAILER_BYTES
from services.local import __main__ as command_line
from services.local.child_process import StartFailed
from services.local.narrator import Narrator
from services.local.pid_file import claimed
from services.local.ports import free_port
from services.local.up import GATEWAY_PORT, UpRequest
from tests.fixtures.hollow_checkpoint import write_hollow_checkpoint


@pytest.fixture(autouse=True)
def undisturbed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process keeps its environment, its warnings and its handler of SIGTERM."""
    monkeypatch.setattr(command_line, "_prepare_libraries", lambda: None)
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


ANY_PORTS = ("--port", 0, "--http-port", 0)
"""The ports that `up` takes by itself may be somebody's here."""


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[UpRequest]:
    """What `up` would have been asked for."""
    asked: list[UpRequest] = []

    def run_up(request: UpRequest, narrator: Narrator) -> int:
        asked.append(request)
        return 0

    monkeypatch.setattr(command_line, "run_up", run_up)
    return asked


def refusal(capsys: pytest.CaptureFixture[str], argv: Sequence[object], code: int = 2) -> str:
    """Runs the command, which must end with `code`; all that it says on stderr."""
    assert command_line.main([str(argument) for argument in argv]) == code
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("slora: ")
    assert said.err.endswith("\n")
    return said.err.removeprefix("slora: ").removesuffix("\n")


def test_up_alone_serves_the_demo(requests: list[UpRequest]) -> None:
    assert command_line.main(["up"]) == 0
    assert requests == [UpRequest(Path(".slora"), None, None, GATEWAY_PORT, 1, {})]


def test_every_argument_of_up_is_understood(requests: list[UpRequest]) -> None:
    options = ["--engine-option", "num-pages=64", "--engine-option", "device=cuda", "--engine-option", "engine_id=a=b"]
    options += ["--gateway-option", "http-allow-adapter-updates=true", "--store-option", "sync_seconds=5"]
    where = [
        "--checkpoint",
        "models/base",
        "--adapters",
        "s3://bucket/loras",
        "--port",
        "0",
        "--http-port",
        "1",
        "--engines",
        "3",
    ]
    assert command_line.main(["--state-dir", "state", "up", *where, *options]) == 0
    engine_options = {"num_pages": "64", "device": "cuda", "engine_id": "a=b"}
    asked = UpRequest(
        Path("state"),
        Path("models/base"),
        "s3://bucket/loras",
        0,
        3,
        engine_options,
        http_port=1,
        gateway_options={"http_allow_adapter_updates": "true"},
        store_options={"sync_seconds": "5"},
    )
    assert requests == [asked]


@pytest.mark.parametrize("service", ["engine", "gateway", "store"])
@pytest.mark.parametrize("option", ["device", "=cuda", "", "="])
def test_an_option_of_a_service_is_name_and_value(
    requests: list[UpRequest], capsys: pytest.CaptureFixture[str], service: str, option: str
) -> None:
    argv = ["up", f"--{service}-option", "device=cpu", f"--{service}-option", option]
    assert refusal(capsys, argv) == f"--{service}-option {option} is not NAME=VALUE"
    assert requests == []


@pytest.mark.parametrize("number", [0, -1])
def test_at_least_one_engine_is_needed(
    requests: list[UpRequest], capsys: pytest.CaptureFixture[str], number: int
) -> None:
    assert refusal(capsys, ["up", "--engines", number]) == f"--engines {number}: at least one is needed"
    assert requests == []


@pytest.mark.parametrize("option", ["--port", "--http-port"])
@pytest.mark.parametrize("port", [-1, 65_536])
def test_a_port_is_a_port(
    requests: list[UpRequest], capsys: pytest.CaptureFixture[str], port: int, option: str
) -> None:
    assert refusal(capsys, ["up", option, port]).startswith(f"{option} {port}: a port is a number up to 65535")
    assert requests == []


@pytest.mark.parametrize("argv", [[], ["upp"], ["up", "--engines", "two"], ["up", "--port", "x"], ["down", "now"]])
def test_what_is_no_command_gets_a_usage_message(capsys: pytest.CaptureFixture[str], argv: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command_line.main(argv)
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("usage: python -m services.local ")


def test_adapters_need_their_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refusal(capsys, ["--state-dir", tmp_path, "up", *ANY_PORTS, "--adapters", tmp_path])
    assert said == "adapters need the checkpoint that they were trained on: CHECKPOINT=dir"


def test_a_directory_that_is_no_checkpoint_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--state-dir", tmp_path / "state", "up", *ANY_PORTS, "--checkpoint"]
    nowhere, empty = tmp_path / "nowhere", tmp_path / "empty"
    empty.mkdir()
    assert refusal(capsys, [*argv, nowhere]).startswith(f"{nowhere} is not a directory")
    assert refusal(capsys, [*argv, empty]) == f"{empty} is not a Hugging Face checkpoint: it has no config.json"
    checkpoint = write_hollow_checkpoint(tmp_path / "hollow")
    (checkpoint / "config.json").write_text("[]")
    assert refusal(capsys, [*argv, checkpoint]) == f"{checkpoint}/config.json is not the configuration of a model"


def test_adapters_are_looked_for_before_anything_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = write_hollow_checkpoint(tmp_path / "hollow")
    argv = ["--state-dir", tmp_path / "state", "up", *ANY_PORTS, "--checkpoint", checkpoint, "--adapters", checkpoint]
    assert refusal(capsys, argv).startswith(f"{checkpoint} has no adapters: ")
    assert not (tmp_path / "state" / "up").exists()


def test_a_port_that_is_taken_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = write_hollow_checkpoint(tmp_path / "hollow")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        argv = ["--state-dir", tmp_path / "state", "up", "--checkpoint", checkpoint]
        told = refusal(capsys, [*argv, "--port", port])
        assert told.startswith(f"port {port} of 127.0.0.1 is in use; choose another one for the gateway's gRPC")
        assert "make up PORT=N" in told
        assert "make up HTTP_PORT=N" in refusal(capsys, [*argv, "--port", 0, "--http-port", port])
    port = free_port()
    assert "cannot be the gateway's for gRPC and for HTTP" in refusal(
        capsys, [*argv, "--port", port, "--http-port", port]
    )


@pytest.fixture
def nothing_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the demo's model would be made."""

    def obtain_materials(cache_dir: Path, narrator: Narrator) -> None:
        raise AssertionError("it trains")

    monkeypatch.setattr("services.local.demo.materials.obtain_materials", obtain_materials)
    monkeypatch.setattr("services.local.demo.run.obtain_materials", obtain_materials)


@pytest.mark.usefixtures("nothing_trained")
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ["--store-option", f"arena-bytes={2**60}"],
            f"adapter-store: cannot make the arena: /dev/shm has no room for {2**60 + TRAILER_BYTES} bytes: ",
        ),
        (["--store-option", "num_homes=0"], "adapter-store: num_homes is 0; it must be above 0"),
        (["--engine-option", "num-pagse=3"], "engine: unrecognized arguments: --num-pagse 3"),
        (["--engine-option", "tp-size=0"], "engine: tp_size is 0; it must be in 1 to "),
        (["--gateway-option", "max-attempts=many"], "gateway: argument --max-attempts: invalid int value: 'many'"),
    ],
)
def test_what_a_service_would_refuse_is_refused_before_the_demos_model_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    assert refusal(capsys, ["--state-dir", tmp_path, "up", *ANY_PORTS, *options]).startswith(said)


@pytest.mark.usefixtures("nothing_trained")
def test_a_machine_too_small_for_the_demo_is_told_so_before_its_model_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("services.adapter_store.arena._available_memory", lambda: 64 * 2**20)
    said = refusal(capsys, ["--state-dir", tmp_path, "demo", "--out", tmp_path])
    assert f"/dev/shm has no room for {128 * 2**20 + TRAILER_BYTES} bytes: {64 * 2**20} are left" in said


def test_a_second_up_is_refused_and_a_refused_one_does_not_stay(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--state-dir", tmp_path, "up", *ANY_PORTS, "--checkpoint", tmp_path / "nowhere"]
    with claimed(tmp_path / "up.pid"):
        assert refusal(capsys, argv).startswith("already running as process ")
    for _ in range(2):
        assert "is not a directory" in refusal(capsys, argv)


def test_down_with_nothing_to_stop_is_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for state in (tmp_path, tmp_path / "nowhere"):
        assert command_line.main(["--state-dir", str(state), "down"]) == 0
        assert capsys.readouterr().out == "nothing is running\n"


def refuse_to_start(monkeypatch: pytest.MonkeyPatch, log: Path, last_line: str, exit_code: int | None) -> None:
    """`up` ends because a service did, with this at the end of its log."""

    def run_up(request: UpRequest, narrator: Narrator) -> int:
        log.write_text(f"first line\n{last_line}\n")
        raise StartFailed("engine-0 ended", log, exit_code)

    monkeypatch.setattr(command_line, "run_up", run_up)


@pytest.mark.parametrize(
    ("last_line", "said"),
    [
        (json.dumps({"level": "CRITICAL", "message": "no such model"}), "no such model"),
        ("engine: error: unrecognized arguments: --num-pagse 3", "engine: unrecognized arguments: --num-pagse 3"),
    ],
)
def test_a_service_that_refuses_its_input_is_quoted_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], last_line: str, said: str
) -> None:
    refuse_to_start(monkeypatch, tmp_path / "engine-0.log", last_line, exit_code=2)
    assert refusal(capsys, ["up"]) == said


@pytest.mark.parametrize(
    ("last_line", "exit_code"),
    [
        (json.dumps({"level": "CRITICAL", "message": "out of memory"}), 1),
        (json.dumps({"level": "CRITICAL", "message": "out of memory"}), None),
        ("plain words", 2),
    ],
)
def test_a_service_that_fails_shows_the_end_of_its_log(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    last_line: str,
    exit_code: int | None,
) -> None:
    log = tmp_path / "engine-0.log"
    refuse_to_start(monkeypatch, log, last_line, exit_code)
    said = refusal(capsys, ["up"], code=1)
    assert said == f"engine-0 ended; the end of {log}:\nfirst line\n{last_line}"


def test_an_interrupt_outside_of_up_is_an_interrupt(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_down(state_dir: Path, narrator: Narrator) -> int:
        signal.raise_signal(signal.SIGTERM)
        return 0

    monkeypatch.setattr(command_line, "run_down", run_down)
    assert command_line.main(["down"]) == 130
    assert capsys.readouterr().out == "stopped\n"
