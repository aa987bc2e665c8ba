"""Where adapters are found: in a directory, or below a prefix in S3."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from services.local.adapter_sources import AdapterSource, find_adapters
from services.local.checkpoint import BadInput
from services.local.ports import free_port
from services.local.s3_client import ADAPTER_FILES, S3Place
from tests.fixtures.embedded_servers import S3Server

BAD_NAMES = ("my adapter", "-first", "_first", "käse", "a" * 129, "a@1")


def write_files(directory: Path, *names: str) -> Path:
    directory.mkdir(parents=True)
    for name in names:
        (directory / name).write_text("{}")
    return directory


def refusal(named: str, environment: Mapping[str, str] | None = None) -> str:
    """Why `named` is refused: one line."""
    with pytest.raises(BadInput) as caught:
        find_adapters(named, environment or {})
    assert len(str(caught.value).splitlines()) == 1, str(caught.value)
    return str(caught.value)


def test_each_subdirectory_with_an_adapter_is_one(tmp_path: Path) -> None:
    for name in ("two", "one", "Three-3_b.v2"):
        write_files(tmp_path / name, *ADAPTER_FILES)
    # The store says what is wrong with it, for this one alone.
    write_files(tmp_path / "no-weights", ADAPTER_FILES[0])
    write_files(tmp_path / "not-an-adapter", "README.md")
    write_files(tmp_path / "deep" / "er", *ADAPTER_FILES)
    (tmp_path / "file").write_text("")
    source = find_adapters(str(tmp_path), {})
    names = ("Three-3_b.v2", "no-weights", "one", "two")
    assert source == AdapterSource({name: tmp_path / name for name in names}, {})
    assert source.names == names
    assert source.s3_place is None


def test_an_adapter_itself_may_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = write_files(tmp_path / "solo", *ADAPTER_FILES)
    write_files(directory / "checkpoint-500", *ADAPTER_FILES)
    assert find_adapters(str(directory), {}) == AdapterSource({"solo": directory}, {})
    monkeypatch.chdir(directory)
    assert find_adapters(".", {}).names == ("solo",)


def test_a_directory_without_adapters_is_refused(tmp_path: Path) -> None:
    write_files(tmp_path / "only-weights", ADAPTER_FILES[1])
    assert refusal(str(tmp_path)) == (f"{tmp_path} has no adapters: no subdirectory of it has an adapter_config.json")
    for named in (tmp_path / "nowhere", tmp_path / "only-weights" / ADAPTER_FILES[1]):
        assert refusal(str(named)) == f"{named} is neither a directory nor s3://bucket/prefix"


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_that_no_request_could_use_is_left_to_the_store(tmp_path: Path, name: str) -> None:
    """It refuses that one, and the others are served."""
    write_files(tmp_path / "good", *ADAPTER_FILES)
    directory = write_files(tmp_path / name, *ADAPTER_FILES)
    assert set(find_adapters(str(tmp_path), {}).names) == {"good", name}
    assert find_adapters(str(directory), {}).names == (name,)


def test_the_longest_name_is_taken(tmp_path: Path) -> None:
    write_files(tmp_path / ("a" * 128), *ADAPTER_FILES)
    assert find_adapters(str(tmp_path), {}).names == ("a" * 128,)


@pytest.fixture
def environment(s3_server: S3Server) -> dict[str, str]:
    """How any AWS client reaches the S3 server."""
    return {**s3_server.client_environ, "AWS_ENDPOINT_URL": s3_server.endpoint}


def put(s3_server: S3Server, prefix: str, *names: str) -> None:
    write_files(s3_server.directory / s3_server.bucket / prefix, *names)


def test_adapters_right_below_a_prefix_are_found(s3_server: S3Server, environment: dict[str, str]) -> None:
    put(s3_server, "team/loras/two", *ADAPTER_FILES)
    put(s3_server, "team/loras/one", *ADAPTER_FILES, "README.md")
    put(s3_server, "team/loras/half", ADAPTER_FILES[0])
    put(s3_server, "team/loras/deep/er", *ADAPTER_FILES)
    put(s3_server, "team/loras-old/three", *ADAPTER_FILES)
    put(s3_server, "four", *ADAPTER_FILES)
    put(s3_server, "others/bad name", *ADAPTER_FILES)
    place = S3Place("adapters", "team/loras/")
    for named in ("s3://adapters/team/loras", "s3://adapters/team/loras/"):
        source = find_adapters(named, environment)
        assert source == AdapterSource({}, {"one": place.below("one"), "two": place.below("two")}, place)
        assert source.places["one"].uri == "s3://adapters/team/loras/one/"
    for named in ("s3://adapters", "s3://adapters/"):
        source = find_adapters(named, environment)
        assert source == AdapterSource({}, {"four": S3Place("adapters", "four/")}, S3Place("adapters", ""))
    named = "s3://adapters/team"
    assert refusal(named, environment) == (
        f"{named} has no adapters: nothing right below it has adapter_config.json and adapter_model.safetensors"
    )
    assert find_adapters("s3://adapters/others", environment).names == ("bad name",)


def test_more_adapters_than_one_answer_lists_are_all_found(s3_server: S3Server, environment: dict[str, str]) -> None:
    names = [f"a{i:03}" for i in range(510)]  # S3 lists 1000 objects at a time; each adapter is two.
    for name in names:
        put(s3_server, f"many/{name}", *ADAPTER_FILES)
    assert find_adapters("s3://adapters/many", environment).names == tuple(names)


def test_the_endpoint_of_s3_alone_goes_first(s3_server: S3Server, environment: dict[str, str]) -> None:
    put(s3_server, "four", *ADAPTER_FILES)
    endpoints = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{free_port()}", "AWS_ENDPOINT_URL_S3": s3_server.endpoint}
    assert find_adapters("s3://adapters", environment | endpoints).names == ("four",)


def test_s3_that_refuses_is_said_in_one_line(s3_server: S3Server, environment: dict[str, str]) -> None:
    said = refusal("s3://nobody/loras", environment)
    assert said.startswith("s3://nobody/loras cannot be listed: ")
    assert "NoSuchBucket" in said
    said = refusal("s3://adapters/x", environment | {"AWS_SECRET_ACCESS_KEY": "wrong"})
    assert said.startswith("s3://adapters/x cannot be listed: ")
    assert "SignatureDoesNotMatch" in said


def test_s3_that_is_away_is_said_in_one_line() -> None:
    endpoint = f"http://127.0.0.1:{free_port()}"
    credentials = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"}
    said = refusal("s3://adapters/x", credentials | {"AWS_ENDPOINT_URL": endpoint})
    assert said.startswith(f's3://adapters/x cannot be listed: Could not connect to the endpoint URL: "{endpoint}/')


def test_no_credentials_are_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    said = refusal("s3://adapters/x", {"AWS_ENDPOINT_URL": "http://127.0.0.1:1"})
    assert said == "s3://adapters/x cannot be listed: Unable to locate credentials"


@pytest.mark.parametrize("named", ["s3://", "s3:///x", "s3://a b/x", "s3://a:b"])
def test_what_is_no_address_in_s3_is_refused(named: str) -> None:
    assert refusal(named) == f"{named} is not of the form s3://bucket/prefix"


def test_an_endpoint_that_is_no_url_is_refused() -> None:
    assert refusal("s3://adapters/x", {"AWS_ENDPOINT_URL": "nonsense"}) == "Invalid endpoint: nonsense"
