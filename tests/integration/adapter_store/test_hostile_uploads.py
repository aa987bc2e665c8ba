"""A store process under a barrage of hostile files and messages: each is refused with its reason, and nothing else.

The process stays up, logs no error, its memory stays bounded, and what is sound is served as before.
"""

from __future__ import annotations

import asyncio
import json
import pickle
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from slora.adapter_store.v1 import adapter_store_pb2 as pb
from slora_client import AdapterClient, SloraRequestError
from slora_client.command.main import app
from typer.testing import CliRunner

from services.adapter_store.arena import SEGMENT_PREFIX
from services.adapter_store.delivery_servicer import MAX_REQUEST_BYTES
from services.adapter_store.peft_config import MAX_CONFIG_BYTES
from services.adapter_store.safetensors_reader import MAX_HEADER_BYTES
from services.common.errors import Reason
from tests.fixtures.adapter_files import CONFIG, make_tensors, write_adapter
from tests.fixtures.embedded_servers import RedisServer, S3Server
from tests.fixtures.store_client import StoreClient, cut, reason_of, refused
from tests.fixtures.store_process import StoreProcess
from tests.integration.adapter_store.conftest import MakeAdapter

F32 = {"dtype": "F32", "shape": [4, 32], "data_offsets": [0, 512]}
F32_B = {"dtype": "F32", "shape": [32, 4], "data_offsets": [512, 1024]}
Q_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
Q_B = Q_A.replace("lora_A", "lora_B")
NOT_SOUND = Reason.ADAPTER_FILE_INVALID


def file_of(header: Any, content: bytes = b"\0" * 512, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + content


def with_config(**fields: Any) -> bytes:
    return json.dumps(CONFIG | fields).encode()


def filled(begin: bytes, piece: bytes, size: int) -> bytes:
    return begin + piece * ((size - len(begin)) // len(piece))


SOUND, EMPTY, PAIR = with_config(), file_of({}, b""), file_of({Q_A: F32, Q_B: F32_B}, b"\0" * 1024)
FILES: dict[str, tuple[bytes, bytes, Reason]] = {
    "a header of 100 GB": (SOUND, file_of({}, length=100 * 2**30), NOT_SOUND),
    "the longest header, lists": (SOUND, file_of(filled(b'{"a":[', b"[],", MAX_HEADER_BYTES)), NOT_SOUND),
    "the longest name": (SOUND, file_of({"x" * (MAX_HEADER_BYTES - 100): F32}), Reason.ADAPTER_TENSORS_INVALID),
    "most tensors": (
        SOUND,
        file_of({f"t{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(20_000)}, b""),
        Reason.ADAPTER_TENSORS_INVALID,
    ),
    "overlap": (SOUND, file_of({Q_A: F32, "b": F32}), NOT_SOUND),
    "out of range": (SOUND, file_of({Q_A: F32 | {"data_offsets": [2**40, 2**40 + 512]}}), NOT_SOUND),
    "a size no message can hold": (SOUND, file_of({Q_A: F32 | {"shape": [2**40, 0]}}), NOT_SOUND),
    "wrong type": (SOUND, file_of({Q_A: F32 | {"dtype": "I32"}}), Reason.ADAPTER_TENSORS_INVALID),
    "a pickle": (SOUND, pickle.dumps({str(i): i for i in range(99)}), NOT_SOUND),
    "a path for a name": (SOUND, file_of({"../../etc/passwd": F32}), Reason.ADAPTER_TENSORS_INVALID),
    "a rank that lies": (
        with_config(r=64),
        file_of({Q_A: F32, Q_B: F32_B}, b"\0" * 1024),
        Reason.ADAPTER_TENSORS_INVALID,
    ),
    "a rank of 4000 digits": (with_config(r=10**4000), file_of({Q_A: F32}), Reason.ADAPTER_RANK_INVALID),
    "half a surrogate": (with_config(target_modules="(?\ud800)"), EMPTY, Reason.ADAPTER_CONFIG_INVALID),
    "nested": (filled(b"", b'{"a":', MAX_CONFIG_BYTES), EMPTY, Reason.ADAPTER_CONFIG_INVALID),
    "an alphabet of lists": (filled(b"[", b"[],", MAX_CONFIG_BYTES), EMPTY, Reason.ADAPTER_CONFIG_INVALID),
    "not UTF-8": (b"\xff\xfe", EMPTY, Reason.ADAPTER_CONFIG_INVALID),
}


@pytest.fixture
def store(tmp_path: Path, checkpoint: Path, redis_server: RedisServer, s3_server: S3Server) -> Iterator[StoreProcess]:
    process = StoreProcess(
        tmp_path,
        base_model_config=checkpoint,
        redis_url=redis_server.url,
        s3_endpoint=s3_server.endpoint,
        s3_bucket=s3_server.bucket,
        s3_prefix="managed",
        arena_bytes=4 * 2**20,
        arena_dir=tmp_path,
        upload_dir=tmp_path,
    )
    yield process
    process.kill()
    assert process.errors() == []


def names_in(directory: Path) -> set[str]:
    """Names of what lies there; the arena's without its number."""
    return {"arena" if path.name.startswith(SEGMENT_PREFIX) else path.name for path in directory.iterdir()}


def own_megabytes(store: StoreProcess) -> int:
    """Memory of the process alone: without the arena and mapped files."""
    memory = psutil.Process(store.process.pid).memory_info()
    return int(memory.rss - memory.shared) >> 20


def chunks(config: bytes, weights: bytes) -> list[tuple[str, bytes]]:
    pieces = (("config_chunk", config), ("weights_chunk", weights))
    return [(kind, chunk) for kind, content in pieces for chunk in cut(content, 2**20)]


async def upload(client: StoreClient, config: bytes, weights: bytes) -> None:
    header = pb.UploadAdapterRequest(header=pb.UploadAdapterHeader(name="hostile"))
    parts = [pb.UploadAdapterRequest(**{kind: chunk}) for kind, chunk in chunks(config, weights)]
    await client.stub.UploadAdapter(iter([header, *parts]), timeout=60)


async def attack(client: StoreClient, name: str) -> None:
    """One hostile file, uploaded and looked over; refused for its reason each time."""
    config, weights, reason = FILES[name]
    with refused(reason):
        await upload(client, config, weights)
    found = await client.validate(*chunks(config, weights))
    assert reason.name in [problem.reason for problem in found.problems]


async def test_a_barrage_of_hostile_files_leaves_nothing_behind(
    store: StoreProcess, s3_server: S3Server, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    async with StoreClient(store.await_listening()) as client:
        good = (await client.upload("good", make_adapter(1))).adapter
        await asyncio.gather(*(attack(client, name) for name in FILES))
        before = own_megabytes(store)
        await asyncio.gather(*(attack(client, name) for name in FILES))
        assert own_megabytes(store) < before + 64, "what refused files took is not given back"
        assert before < 600, "64 uploads at once are to fit beside the arena"
        assert (await client.fetch(good.digest))[0].packed_bytes == good.packed_bytes
        assert await client.list_ids() == ["good@1"]
    assert len(s3_server.keys("managed/sha256/")) == 2
    assert names_in(tmp_path) == {"tiny", "redis", "s3", "store-0.log", "adapter-1-4", "arena"}, "a spool is left"


async def test_the_same_files_from_s3_and_by_a_sync(store: StoreProcess, s3_server: S3Server, tmp_path: Path) -> None:
    names = ["a pickle", "overlap", "a header of 100 GB", "a size no message can hold", "not UTF-8"]
    async with StoreClient(store.await_listening()) as client:
        for number, name in enumerate(names):
            config, weights, reason = FILES[name]
            uri = s3_server.put_directory(write_adapter(tmp_path / str(number), config, weights), f"lib/h{number}")
            with refused(reason):
                await client.register("hostile", uri)
        s3_server.put_directory(tmp_path / "0", "lib/%2e%2e")
        s3_server.put_directory(tmp_path / "0", "lib/-rf")
        s3_server.put_directory(tmp_path / "0", "lib/deep/er")
        report = await client.sync("s3://adapters/lib/")
        assert report.num_found == len(names)
        assert {entry.name: entry.reason for entry in report.refused} == dict.fromkeys(
            ["%2e%2e", "-rf"], "ADAPTER_NAME_INVALID"
        )
        for number, name in enumerate(names):
            with refused(FILES[name][2]):
                await client.fetch((await client.get(f"h{number}")).digest)


RAW: list[tuple[str, Any, grpc.StatusCode]] = [
    ("GetAdapter", b"\x0a\x02\xff\xfe", grpc.StatusCode.INVALID_ARGUMENT),
    ("GetAdapter", b"\0" * (MAX_REQUEST_BYTES + 1), grpc.StatusCode.RESOURCE_EXHAUSTED),
    ("GetAdapter", pb.GetAdapterRequest(adapter_id="a" * 2_000_000), grpc.StatusCode.INVALID_ARGUMENT),
    ("DeleteAdapter", pb.DeleteAdapterRequest(adapter_id="a@" + "\0" * 2_000_000), grpc.StatusCode.INVALID_ARGUMENT),
    ("ListAdapters", pb.ListAdaptersRequest(page_size=-(2**31)), grpc.StatusCode.INVALID_ARGUMENT),
    ("ListAdapters", pb.ListAdaptersRequest(page_token="/" * 2_000_000), grpc.StatusCode.INVALID_ARGUMENT),
    ("FetchAdapter", pb.FetchAdapterRequest(digest="sha256:" + "0" * 64, offset=2**64 - 1), grpc.StatusCode.NOT_FOUND),
    ("SetAlias", pb.SetAliasRequest(name="a", alias="b", version=2**32 - 1), grpc.StatusCode.NOT_FOUND),
    (
        "RegisterAdapter",
        pb.RegisterAdapterRequest(name="a", source_uri="s3://bucket/a", labels={str(i): "" for i in range(100_000)}),
        grpc.StatusCode.INVALID_ARGUMENT,
    ),
    (
        "UpdateAdapter",
        pb.UpdateAdapterRequest(adapter_id="a", set_labels={str(i): "" for i in range(100_000)}),
        grpc.StatusCode.INVALID_ARGUMENT,
    ),
    (
        "ReportAdapterUse",
        pb.ReportAdapterUseRequest(uses=[pb.AdapterUse(adapter_id="a@1")] * 200_000),
        grpc.StatusCode.INVALID_ARGUMENT,
    ),
    (
        "ReportCopies",
        pb.ReportCopiesRequest(copies=[pb.CopiedAdapter(digest="sha256:")] * 100_000),
        grpc.StatusCode.INVALID_ARGUMENT,
    ),
    *(
        (
            "ReportAdapterUse",
            pb.ReportAdapterUseRequest(uses=[pb.AdapterUse(adapter_id="a@1", last_use_time=time)]),
            grpc.StatusCode.INVALID_ARGUMENT,
        )
        for time in (Timestamp(seconds=2**62), Timestamp(seconds=-(2**62)), Timestamp(nanos=-5))
    ),
    ("WatchAdapters", pb.WatchAdaptersRequest(resume_token="e" * 2_000_000), grpc.StatusCode.INVALID_ARGUMENT),
]


async def test_messages_that_no_client_sends(store: StoreProcess) -> None:
    port = store.await_listening()
    async with (
        grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.max_send_message_length", -1)]) as channel,
        StoreClient(port) as client,
    ):
        await client.list_page(page_size=1)
        before = own_megabytes(store)
        for method, request, code in RAW:
            data = request if isinstance(request, bytes) else request.SerializeToString()
            call: Any = channel.unary_unary(f"/slora.adapter_store.v1.AdapterStoreService/{method}")
            with pytest.raises(grpc.RpcError) as caught:
                await call(data, timeout=20)
            assert caught.value.code() is code, (method, caught.value.details())
            if len(data) <= MAX_REQUEST_BYTES:  # else it is gRPC that refuses
                assert reason_of(caught.value).status.value == code.name
        bomb = pb.GetAdapterRequest(adapter_id="a" * (64 * 2**20)).SerializeToString()
        call = channel.unary_unary("/slora.adapter_store.v1.AdapterStoreService/GetAdapter")
        with pytest.raises(grpc.RpcError) as caught:
            await call(bomb, timeout=20, compression=grpc.Compression.Gzip)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert own_megabytes(store) < before + 128
        assert await client.list_ids() == []


async def test_pushed_by_command_and_by_client(store: StoreProcess, tmp_path: Path) -> None:
    address = f"127.0.0.1:{store.await_listening()}"
    for number, name in enumerate(("a pickle", "half a surrogate", "a path for a name")):
        config, weights, reason = FILES[name]
        directory = write_adapter(tmp_path / str(number), config, weights)
        line = ["adapters", "push", str(directory), "hostile", "--store", address]
        done = await asyncio.to_thread(CliRunner().invoke, app, line)
        assert done.exit_code == 1
        assert reason.name in done.stderr
    sound = write_adapter(tmp_path / "sound", CONFIG, make_tensors())
    endless = tmp_path / "endless"
    endless.mkdir()
    (endless / "adapter_config.json").symlink_to(sound / "adapter_config.json")
    (endless / "adapter_model.safetensors").symlink_to("/dev/zero")
    with AdapterClient(address) as client:
        with pytest.raises(FileNotFoundError, match=r"adapter_model\.safetensors"):
            await asyncio.to_thread(client.upload, "hostile", endless)
        for name in ("../hostile", "a/b", "a\0b", ".hidden"):
            with pytest.raises(SloraRequestError) as caught:
                await asyncio.to_thread(client.upload, name, sound)
            assert caught.value.reason == "ADAPTER_NAME_INVALID"
        assert await asyncio.to_thread(client.list) == ()
