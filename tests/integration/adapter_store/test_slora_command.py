"""The `slora` command against a real store: tables, JSON, exit statuses, errors on stderr."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from slora_client.command.main import app
from slora_client.command.tables import age_text, bytes_text
from typer.testing import CliRunner

from tests.fixtures.embedded_servers import S3Server, free_port
from tests.integration.adapter_store.conftest import Harness, MakeAdapter

Slora = Callable[..., Any]


@pytest.fixture
def slora(harness: Harness) -> Slora:
    """Runs `slora adapters …`: its result has exit_code, stdout, stderr."""

    async def run(*arguments: str, store: str = "", status: int = 0) -> Any:
        address = store or f"localhost:{harness.port}"
        line = ["adapters", *arguments, "--store", address]
        result = await asyncio.to_thread(CliRunner().invoke, app, line)
        assert result.exit_code == status, (result.stdout, result.stderr, result.exception)
        assert not (status and result.stdout) or arguments[0] == "validate"
        return result

    return run


async def test_push_list_show_alias_pin_and_remove(slora: Slora, make_adapter: MakeAdapter) -> None:
    first, second = str(make_adapter(1)), str(make_adapter(2))
    pushed = await slora("push", first, "pirate", "--label", "team=search", "--alias", "prod", "--tenant", "acme")
    for word in ("pirate@1", "prod", "team=search", "acme", "q v"):
        assert word in pushed.stdout
    made = json.loads((await slora("push", second, "pirate", "--json")).stdout)
    assert (made["adapter_id"], made["aliases"], made["pinned"], made["state"]) == ("pirate@2", [], False, "ready")
    assert "means pirate@2" in (await slora("alias", "pirate", "canary")).stdout
    assert "means pirate@2" in (await slora("alias", "pirate@2", "prod", "--expect", "1")).stdout
    refusal = await slora("alias", "pirate@1", "prod", "--expect", "1", status=1)
    assert "ALIAS_CHANGED: pirate@prod means version 2 now" in refusal.stderr
    assert "is removed" in (await slora("alias", "pirate", "canary", "--remove")).stdout
    assert "is pinned" in (await slora("pin", "pirate@prod")).stdout
    table = (await slora("ls")).stdout
    lines = [line for line in table.splitlines() if "pirate@" in line]
    assert ["yes" in line for line in lines] == [False, True]
    assert [entry["adapter_id"] for entry in json.loads((await slora("ls", "pi", "--json")).stdout)] == [
        "pirate@1",
        "pirate@2",
    ]
    assert json.loads((await slora("ls", "x", "--json")).stdout) == []
    assert "is not pinned" in (await slora("unpin", "pirate@2")).stdout
    labelled = json.loads((await slora("label", "pirate@1", "team-", "run=7", "--json")).stdout)
    assert labelled["labels"] == {"run": "7"}
    assert "name one, or give --all" in (await slora("rm", "pirate", status=1)).stderr
    assert "ALIAS_IN_USE" in (await slora("rm", "pirate@2", status=1)).stderr
    assert "deleted pirate@1" in (await slora("rm", "pirate@1")).stdout
    assert json.loads((await slora("rm", "pirate", "--all", "--json")).stdout)["num_deleted"] == 1


async def test_a_push_says_whether_the_content_was_there(
    slora: Slora, make_adapter: MakeAdapter, s3_server: S3Server
) -> None:
    first, second = make_adapter(1), str(make_adapter(2))
    s3_server.put_directory(first, "elsewhere/pirate")
    assert (await slora("push", str(first), "pirate")).stdout.startswith("pirate@1 is new\n")
    assert (await slora("push", second, "pirate")).stdout.startswith("pirate@2 is new\n")
    for source in (str(first), "s3://adapters/elsewhere/pirate/"):
        # What changes the version afterwards does not make it new.
        again = await slora("push", source, "pirate", "--label", "run=1", "--pin")
        assert again.stdout.startswith(
            "pirate@1 had this content already: not a new version\npirate goes on meaning pirate@2:"
        )
        assert json.loads((await slora("push", source, "pirate", "--json")).stdout)["is_new"] is False
    assert json.loads((await slora("push", second, "poet", "--alias", "prod", "--json")).stdout)["is_new"] is True
    assert json.loads((await slora("show", "poet", "--json")).stdout)["is_new"] is None


async def test_content_that_was_there_gets_the_labels_it_is_pushed_with(
    slora: Slora, make_adapter: MakeAdapter
) -> None:
    adapter = str(make_adapter(1))
    await slora("push", adapter, "pirate", "--label", "team=search", "--label", "run=1")
    pushed = await slora("push", adapter, "pirate", "--label", "run=2", "--json")
    assert json.loads(pushed.stdout)["adapter_id"] == "pirate@1"
    assert json.loads(pushed.stdout)["labels"] == {"team": "search", "run": "2"}


async def test_errors_say_what_would_be_right(slora: Slora, make_adapter: MakeAdapter, tmp_path: Path) -> None:
    await slora("push", str(make_adapter(1)), "pirate")
    missing = await slora("show", "pirate@9", status=1)
    assert "has no version 9; its only version is 1, its aliases: none" in missing.stderr
    as_json = json.loads((await slora("show", "pirate@9", "--json", status=1)).stderr)
    assert as_json["error"]["reason"] == "ADAPTER_NOT_FOUND"
    assert as_json["error"]["metadata"]["versions"] == "1"
    assert "adapter_config.json is missing" in (await slora("push", str(tmp_path), "x", status=1)).stderr
    for source in (str(tmp_path / "none"), "hub/adapter", "ftp://host/adapter"):
        assert f"slora: {source} is no directory; give one" in (await slora("push", source, status=1)).stderr
    assert "give KEY=VALUE" in (await slora("push", str(make_adapter(1)), "x", "--label", "a", status=1)).stderr
    away = await slora("ls", store=f"localhost:{free_port()}", status=3)
    assert "UNAVAILABLE" in away.stderr
    assert (await slora("push", status=2)).stderr


async def test_sync_tells_what_it_did(slora: Slora, make_adapter: MakeAdapter, s3_server: S3Server) -> None:
    for name in ("a", "b", "-bad"):
        s3_server.put_directory(make_adapter(1), f"lib/{name}")
    told = (await slora("sync", "s3://adapters/lib/")).stdout
    assert "2 adapters; 2 added, 0 changed, 0 removed, 1 refused" in told
    assert "ADAPTER_NAME_INVALID" in told
    assert "no folder" not in told
    for prefix in ("libs", "lib/a"):
        assert "no folder lies there" in (await slora("sync", f"s3://adapters/{prefix}/")).stdout
    assert "not read yet" in (await slora("ls")).stdout
    report = json.loads((await slora("sync", "s3://adapters/lib/", "--json")).stdout)
    assert (report["num_found"], report["num_added"], report["refused"][0]["name"]) == (2, 0, "-bad")
    assert "sync_uri is empty" in (await slora("sync", status=1)).stderr


async def test_validate_says_what_is_wrong_and_what_it_fits(slora: Slora, make_adapter: MakeAdapter) -> None:
    good = (await slora("validate", str(make_adapter(1)))).stdout
    assert "its shapes fit the base model tiny" in good
    assert "valid: rank 4" in good
    dora = await slora("validate", str(make_adapter(1, use_dora=True)), status=1)
    assert "wrong: ADAPTER_UNSUPPORTED" in dora.stdout
    assert "its shapes fit the base model tiny" in dora.stdout
    directory = make_adapter(1)
    weights = directory / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes().replace(b'"shape":[16,4]', b'"shape":[4,16]'))
    other = json.loads((await slora("validate", str(directory), "--json", status=1)).stdout)
    assert [problem["reason"] for problem in other["problems"]] == ["ADAPTER_BASE_MISMATCH"]
    assert not other["fit"]["fits"]


def test_the_command_is_installed_and_explains_itself() -> None:
    code = "from slora_client.command.entry import main; import sys; sys.argv = ['slora', 'adapters', '--help']; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for word in ("push", "ls", "show", "alias", "pin", "unpin", "rm", "sync", "validate"):
        assert word in done.stdout


async def test_on_a_terminal_a_push_shows_how_far_it_is_and_elsewhere_nothing(
    harness: Harness, make_adapter: MakeAdapter
) -> None:
    directory = make_adapter(1)
    run = [sys.executable, "-c", "from slora_client.command.entry import main; main()", "adapters", "push"]
    run += [str(directory), "pirate", "--json", "--store", f"localhost:{harness.port}"]
    terminal, its_end = pty.openpty()
    try:
        told = await asyncio.create_subprocess_exec(*run, stdout=subprocess.PIPE, stderr=its_end)
        stdout, _ = await told.communicate()
    finally:
        os.close(its_end)
    shown = await asyncio.to_thread(_all_of, terminal)
    assert (told.returncode, json.loads(stdout)["adapter_id"]) == (0, "pirate@1")
    size = sum(path.stat().st_size for path in directory.iterdir())
    assert "pirate" in shown
    assert f"{size / 1000:.1f}/{size / 1000:.1f} kB" in shown, shown
    untold = await asyncio.create_subprocess_exec(*run, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert (await untold.communicate())[1] == b""


def _all_of(terminal: int) -> str:
    """What was written to a terminal whose other end is closed."""
    shown = b""
    with contextlib.suppress(OSError):  # so Linux tells the end
        while part := os.read(terminal, 65536):
            shown += part
    os.close(terminal)
    return shown.decode()


def test_sizes_and_ages_for_people() -> None:
    assert [bytes_text(size) for size in (0, 512, 2048, 17 * 2**20)] == ["-", "512 B", "2.0 KiB", "17.0 MiB"]
    assert age_text(None) == "-"
