"""Administration of adapters through the Python client, both kinds of it, against a store to order."""

from __future__ import annotations

import asyncio
import inspect
import random
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from slora_client import Adapter, AdapterClient, AsyncAdapterClient, SloraRequestError

from services.common.errors import Reason, SloraError
from tests.fakes.fake_adapter_store import FakeAdapterStore, digest_of


@pytest.fixture
async def store() -> AsyncIterator[FakeAdapterStore]:
    store = FakeAdapterStore()
    await store.start()
    yield store
    await store.stop()


class Client:
    """One face for both clients: calls of the blocking one run on a thread."""

    def __init__(self, kind: str, address: str) -> None:
        self._kind = kind
        self._address = address

    async def __call__(self, method: str, *args: Any, **options: Any) -> Any:
        if self._kind == "blocking":

            def run() -> Any:
                with AdapterClient(self._address) as client:
                    return getattr(client, method)(*args, **options)

            return await asyncio.to_thread(run)
        async with AsyncAdapterClient(self._address) as client:
            return await getattr(client, method)(*args, **options)


@pytest.fixture(params=["blocking", "asyncio"])
def client(request: pytest.FixtureRequest, store: FakeAdapterStore) -> Client:
    return Client(request.param, store.address)


def adapter_directory(tmp_path: Path, num_bytes: int) -> tuple[Path, bytes, bytes]:
    seed = random.randrange(2**31)
    print("seed", seed)
    config, weights = b'{"r": 8}', random.Random(seed).randbytes(num_bytes)
    (tmp_path / "adapter_config.json").write_bytes(config)
    (tmp_path / "adapter_model.safetensors").write_bytes(weights)
    return tmp_path, config, weights


@pytest.mark.parametrize("num_bytes", [0, 1, 2**20, 3 * 2**20 + 17])
async def test_upload(store: FakeAdapterStore, client: Client, tmp_path: Path, num_bytes: int) -> None:
    directory, config, weights = adapter_directory(tmp_path, num_bytes)
    adapter = await client("upload", "poet", directory, tenant="me", timeout=30)
    assert (adapter.adapter_id, adapter.tenant, adapter.source_uri) == ("poet@1", "me", "s3://uploads/poet/")
    header, got_config, got_weights = store.uploads[0]
    assert (header.name, header.tenant) == ("poet", "me")
    assert got_config == config
    assert got_weights == weights


async def test_an_upload_that_is_refused_midway(client: Client, tmp_path: Path) -> None:
    directory, _, _ = adapter_directory(tmp_path, 8 * 2**20)
    with pytest.raises(SloraRequestError) as caught:
        await client("upload", "refused", str(directory))
    assert (caught.value.code, caught.value.reason) == ("INVALID_ARGUMENT", "ADAPTER_NAME_INVALID")


async def test_an_upload_of_no_adapter(store: FakeAdapterStore, client: Client, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json"):
        await client("upload", "poet", tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.safetensors"):
        await client("upload", "poet", tmp_path)
    assert store.uploads == []


async def test_register_get_delete(store: FakeAdapterStore, client: Client) -> None:
    first = await client("register", "poet", "s3://bucket/poet/", tenant="me")
    assert first == Adapter(
        name="poet",
        version=1,
        adapter_id="poet@1",
        digest=digest_of("poet@1"),
        rank=8,
        target_modules=("q", "down"),
        packed_bytes=1000,
        source_bytes=900,
        source_uri="s3://bucket/poet/",
        tenant="me",
        base_model="base",
        create_time=datetime.fromtimestamp(1_700_000_001, UTC),
    )
    second = await client("register", "poet", "s3://bucket/poet-2/")
    assert await client("get", "poet") == second
    assert await client("get", "poet@1") == first
    assert await client("delete", "poet@1") == 1
    assert await client("delete", "poet") == 1
    with pytest.raises(SloraRequestError) as caught:
        await client("get", "poet")
    assert (caught.value.code, caught.value.reason) == ("NOT_FOUND", "ADAPTER_NOT_FOUND")
    with pytest.raises(SloraRequestError) as caught:
        await client("delete", "poet")
    assert caught.value.reason == "ADAPTER_NOT_FOUND"


async def test_list_follows_pages_and_filters(store: FakeAdapterStore, client: Client) -> None:
    for number in range(5):
        store.add(f"a{number}", 1)
    store.add("a0", 2)
    store.add("b")
    store.adapters["a3@1"].tenant = "me"
    everything = await client("list")
    assert [a.adapter_id for a in everything] == ["a0@1", "a0@2", "a1@1", "a2@1", "a3@1", "a4@1", "b@1"]
    assert [a.name for a in await client("list", name_prefix="b")] == ["b"]
    assert [a.name for a in await client("list", tenant="me")] == ["a3"]
    assert len(await client("list", tenant="")) == 6


async def test_errors_carry_everything(store: FakeAdapterStore, client: Client) -> None:
    with pytest.raises(SloraRequestError) as caught:
        await client("register", "poet", "/tmp/poet")
    assert (caught.value.code, caught.value.reason) == ("INVALID_ARGUMENT", "SOURCE_URI_INVALID")
    assert caught.value.metadata == {"field": "source_uri"}
    store.get_error = SloraError(Reason.CATALOGUE_UNAVAILABLE, "no Redis")
    with pytest.raises(SloraRequestError) as caught:
        await client("get", "poet")
    assert caught.value.is_worth_retrying
    store.answer_seconds = 30
    with pytest.raises(SloraRequestError) as caught:
        await client("get", "poet", timeout=0.2)
    assert caught.value.code == "DEADLINE_EXCEEDED"


def test_both_clients_have_the_same_methods() -> None:
    def methods(cls: type) -> dict[str, list[str]]:
        found = inspect.getmembers(cls, inspect.isfunction)
        return {name: list(inspect.signature(f).parameters) for name, f in found if not name.startswith("_")}

    assert methods(AdapterClient) == methods(AsyncAdapterClient)
