"""`python -m services.local up` and `down` as a user runs them: real processes, a tiny checkpoint, adapters."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from slora_client import AdapterClient, SloraClient

from services.local.ports import free_port, is_free
from tests.e2e.conftest import wait_until
from tests.fixtures.embedded_servers import S3Server
from tests.fixtures.random_adapters import write_random_adapter
from tests.fixtures.tiny_models import make_checkpoint
from tests.fixtures.tiny_tokenizer import write_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("stack_logs")]

ENGINE = ("--engine-option", "num_threads=1", "--engine-option", "num-pages=64", "--engine-option", "max-model-len=96")
START_SECONDS = 60.0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = make_checkpoint(tmp_path_factory.mktemp("base") / "tiny", vocab_size=320)
    return write_tokenizer(directory, 320)


@pytest.fixture(scope="module")
def adapters(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters, and one of a kind that is not served."""
    root = tmp_path_factory.mktemp("adapters")
    for number, name in enumerate(("a0", "a1", "broken")):
        write_random_adapter(root / name, checkpoint, rank=2 + number, seed=number, scale=1.0)
    config = root / "broken" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"peft_type": "IA3"}))
    return root


def command(state: Path, *arguments: object) -> list[str]:
    return [sys.executable, "-m", "services.local", "--state-dir", str(state), *map(str, arguments)]


def run(state: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """A command that ends by itself."""
    return subprocess.run(command(state, *arguments), capture_output=True, text=True, timeout=60, check=False)


class Up:
    """An `up` that runs, and what it has said."""

    def __init__(self, process: subprocess.Popen[bytes], out: Path, err: Path) -> None:
        self.process, self._out, self._err = process, out, err

    @property
    def out(self) -> str:
        return self._out.read_text()

    @property
    def err(self) -> str:
        return self._err.read_text()

    def await_how_to_call(self) -> None:
        """Returns when it serves and has said how to call it."""

        def serves() -> bool:
            assert self.process.poll() is None, f"it ended: {self.out}{self.err}"
            return "`make down` stops it.\n" in self.out

        wait_until("up says how to call it", serves, START_SECONDS)

    def address(self, service: str) -> str:
        """Where it said that a service is."""
        found = re.search(rf"^  {service}  +(\S+)$", self.out, re.MULTILINE)
        assert found is not None, self.out
        return found[1]

    def descendants(self) -> list[psutil.Process]:
        """All processes that it has started, and those that they have."""
        return psutil.Process(self.process.pid).children(recursive=True)


@contextmanager
def heeding_interrupts() -> Iterator[None]:
    """What starts within heeds SIGINT, even where whoever runs these tests has it ignored, as a shell does for what it
    starts in the background: a process inherits that, but not a handler."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def running(state: Path, *arguments: object, environment: Mapping[str, str] | None = None) -> Iterator[Up]:
    """`up` for the length of a block; killed at its end if it still runs."""
    state.mkdir(exist_ok=True)
    out, err = state / "out", state / "err"
    with out.open("wb") as out_file, err.open("wb") as err_file:
        argv = command(state, "up", "--http-port", 0, *arguments, *ENGINE)
        with heeding_interrupts():
            process = subprocess.Popen(
                argv, stdout=out_file, stderr=err_file, env={**os.environ, **(environment or {})}
            )
    try:
        yield Up(process, out, err)
    finally:
        process.kill()
        process.wait()


def alive(processes: list[psutil.Process]) -> list[str]:
    """Those that still run."""
    running = []
    for process in processes:
        try:
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                running.append(str(process))
        except psutil.NoSuchProcess:
            continue
    return running


def words(process: psutil.Process) -> list[str]:
    """What it was started with; nothing of one that has just ended."""
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


def answers(gateway: str, *models: str) -> dict[str, tuple[int, ...]]:
    with SloraClient(gateway) as client:
        return {
            model: client.generate(
                model, "once upon a time", temperature=0, max_tokens=12, ignore_eos=True, timeout=60
            ).token_ids
            for model in models
        }


def model_names(gateway: str) -> list[str]:
    with SloraClient(gateway) as client:
        return [entry.name for entry in client.list_models(timeout=60)]


def test_up_serves_until_down_and_again_with_what_was_uploaded(
    checkpoint: Path, adapters: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state, port = tmp_path / "state", free_port()
    with running(state, "--checkpoint", checkpoint, "--adapters", adapters, "--port", port) as up:
        up.await_how_to_call()
        assert up.address("gateway") == f"127.0.0.1:{port}"
        assert "\n  Adapters (2 served, 1 refused): " in up.out
        assert "\n  refused: broken: ADAPTER_UNSUPPORTED: adapter_config.json: 'IA3' is not served" in up.out
        assert up.out.count("refused: ") == 1

        before = answers(up.address("gateway"), "tiny", "a0", "a1")
        assert len(set(before.values())) == 3
        run_what_was_told(up.out, adapters / "a1", capsys)
        assert model_names(up.address("gateway")) == ["tiny", "a0", "a1", "my-adapter"]

        second = run(state, "up", "--checkpoint", checkpoint, "--port", free_port())
        assert second.returncode == 2
        assert second.stderr == f"slora: already running as process {up.process.pid}; `make down` stops it\n"
        # The refused one has disturbed nothing.
        assert answers(up.address("gateway"), "tiny", "a0", "a1") == before

        started = up.descendants()
        assert len(started) >= 6, started  # Five services and the engine's core.
        down = run(state, "down")
        assert (down.returncode, down.stdout, down.stderr) == (0, f"stopped (process {up.process.pid})\n", "")
        assert up.process.wait(timeout=60) == 0
        assert alive(started) == []
        assert is_free(port)
        assert up.out.endswith("\nstopped\n")
        assert up.err == ""

    with running(state, "--checkpoint", checkpoint, "--port", port) as up:
        up.await_how_to_call()
        assert model_names(up.address("gateway")) == ["tiny", "a0", "a1", "my-adapter"]
        after = answers(up.address("gateway"), "tiny", "a0", "a1", "my-adapter")
        assert after == before | {"my-adapter": before["a1"]}
        started = up.descendants()
        up.process.send_signal(signal.SIGINT)
        assert up.process.wait(timeout=60) == 0
        assert alive(started) == []
    assert run(state, "down").stdout == "nothing is running\n"


def run_what_was_told(told: str, adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Runs the Python lines and the shell lines that `up` printed; all ask for the first adapter."""
    code = textwrap.dedent(told.partition("From Python:\n")[2].partition("From a shell:")[0])
    exec(code.replace("directory/of/a/peft/adapter", str(adapter)), {})
    text, models = capsys.readouterr().out.rstrip("\n").rsplit("\n", 1)
    assert models == "['tiny', 'a0', 'a1']"
    line = told.partition("From a shell:\n")[2].partition("\n\nAs OpenAI's")[0]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    asked = subprocess.run(
        ["bash", "-c", line], env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=60, check=False
    )
    assert asked.returncode == 0, asked.stderr
    # One JSON object a message.
    messages, rest, decoder = [], asked.stdout.strip(), json.JSONDecoder()
    while rest:
        message, end = decoder.raw_decode(rest)
        messages.append(message)
        rest = rest[end:].lstrip()
    assert "".join(message.get("text", "") for message in messages) == text
    line = told.partition("any key):\n")[2].partition("\n\nCtrl-C")[0]
    asked = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(asked.stdout)["choices"][0]["text"] == text


def test_adapters_in_s3_are_served_from_there(
    checkpoint: Path, adapters: Path, tmp_path: Path, s3_server: S3Server
) -> None:
    for name in ("a0", "a1", "broken"):
        s3_server.put_directory(adapters / name, f"team/loras/{name}")
    arguments = ("--checkpoint", checkpoint, "--adapters", "s3://adapters/team/loras", "--port", 0)
    with running(tmp_path / "state", *arguments, environment={"AWS_ENDPOINT_URL": s3_server.endpoint}) as up:
        up.await_how_to_call()
        assert "\n  Adapters (2 served, 1 refused): " in up.out
        assert not re.search("^  s3  ", up.out, re.MULTILINE)
        with AdapterClient(up.address("adapter store")) as store:
            store.upload("mine", adapters / "a1", timeout=60)
        said = answers(up.address("gateway"), "tiny", "a0", "a1", "mine")
        assert len(set(said.values())) == 3
        assert said["mine"] == said["a1"]
        # What is uploaded while it runs lies beside what the user has there, and so do copies of what is catalogued.
        managed = s3_server.keys("team/loras/slora-uploads/")
        uploaded = [key for key in managed if "/catalogue/" not in key]
        assert [key.rpartition("/")[2] for key in uploaded] == ["adapter_config.json", "adapter_model.safetensors"]

        def copied() -> set[str]:
            found = s3_server.keys("team/loras/slora-uploads/")
            return {key.split("/")[-2] for key in found if "/catalogue/" in key}

        wait_until("what was synced is copied as well", lambda: copied() == {"a0", "a1", "mine"})
        everything = s3_server.keys()
        assert len([key for key in everything if not key.startswith("team/loras/slora-uploads/")]) == 6
        assert run(tmp_path / "state", "down").returncode == 0
        assert up.process.wait(timeout=60) == 0


def test_down_ends_one_that_is_just_starting(checkpoint: Path, tmp_path: Path) -> None:
    with running(tmp_path, "--checkpoint", checkpoint, "--port", 0) as up:
        wait_until(
            "the first service runs", lambda: any("services.adapter_store" in words(p) for p in up.descendants())
        )
        started = up.descendants()
        assert run(tmp_path, "down").stdout == f"stopped (process {up.process.pid})\n"
        assert up.process.wait(timeout=60) == 0
        assert alive(started) == []
        assert "slora serves" not in up.out
        assert up.out.endswith("\nstopped\n")


def test_a_setting_that_only_the_engines_core_can_judge_is_refused_in_one_line(
    checkpoint: Path, tmp_path: Path
) -> None:
    options = ("--checkpoint", checkpoint, "--port", 0, "--http-port", 0, "--engine-option", "max-model-len=1000000")
    ended = run(tmp_path / "state", "up", *options)
    assert ended.returncode == 2
    said = "max_model_len 1000000 is outside 1 to 512, the checkpoint's longest"
    assert ended.stderr == f"slora: the engine cannot start: {said}\n"


def test_a_model_that_is_not_served_is_refused_in_one_line(checkpoint: Path, tmp_path: Path) -> None:
    unknown = tmp_path / "unknown"
    shutil.copytree(checkpoint, unknown)
    config = unknown / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "gpt_neox"}))
    ended = run(tmp_path / "state", "up", "--checkpoint", unknown, "--port", 0, "--http-port", 0)
    assert ended.returncode == 2
    assert re.fullmatch(
        rf"slora: cannot start: {config}: model_type 'gpt_neox' is not served; served are .*llama.*\n", ended.stderr
    )
    assert run(tmp_path / "state", "down").stdout == "nothing is running\n"
