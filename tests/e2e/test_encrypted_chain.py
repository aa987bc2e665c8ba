"""All services as real processes, with certificates on every port, tokens between them and keys for tenants."""

from __future__ import annotations

import asyncio
import http.client
import json
import random
import ssl
from pathlib import Path
from typing import Any

import grpc
import pytest
from slora_client import AdapterClient, SloraClient, SloraRequestError, Tls
from slora_client.command.main import app
from typer.testing import CliRunner

from services.common.grpc_client import open_blocking_channel
from services.common.tls import ChannelSecurity
from services.local.ports import free_port
from services.local.stack import LocalStack
from services.tenancy.directory import TenantDirectory
from services.tenancy.tenancy_redis import TenancyRedis
from tests.fixtures.certificates import Certificates
from tests.fixtures.random_adapters import write_random_adapter
from tests.fixtures.tiny_models import make_checkpoint
from tests.fixtures.tiny_tokenizer import write_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180), pytest.mark.usefixtures("stack_logs")]


def encrypted_stack(state: Path, checkpoint: Path, certificates: Certificates) -> LocalStack:
    """One of each service; each has a certificate, and asks for one of the same authority."""

    def of(name: str) -> dict[str, Any]:
        return {"health": f"127.0.0.1:{free_port()}", **certificates.server_settings(name)}

    def token(role: str) -> dict[str, str]:
        return {"store_token_file": certificates.path(f"tokens/{role}")}

    engine = {"num_threads": 1, "pool_bytes": 8 * 2**20, "max_model_len": 256}
    store_options: dict[str, Any] = {**of("adapter-store"), "service_tokens": certificates.path("tokens")}
    gateway_options: dict[str, Any] = {**of("gateway"), **token("gateway")}
    for peer in ("store", "engine"):
        gateway_options |= certificates.caller_settings("gateway", peer)
    stack = LocalStack(
        state,
        checkpoint,
        store_options=store_options,
        engine_options={**engine, **of("engine"), **certificates.caller_settings("engine", "store"), **token("engine")},
        gateway_options=gateway_options,
    )
    for options in (store_options, gateway_options):
        options["tenancy_redis"] = stack.redis.url
    return stack


async def make_keys(redis_url: str, *tenants: str) -> list[str]:
    redis = TenancyRedis(redis_url, "slora:tenancy", 20.0)
    try:
        directory = TenantDirectory(redis)
        for tenant in tenants:
            await directory.set_tenant(tenant, {}, ["*"])
        return [(await directory.create_key(tenant, ""))[0].text for tenant in tenants]
    finally:
        await redis.close()


def get_models(address: str, context: ssl.SSLContext, key: str) -> tuple[list[str], bytes]:
    """Models by the HTTP API, and the certificate that its server showed."""
    connection = http.client.HTTPSConnection(*address.split(":"), context=context, timeout=30)
    try:
        connection.request("GET", "/v1/models", headers={"Authorization": f"Bearer {key}"})
        shown = connection.sock.getpeercert(binary_form=True)
        return [model["id"] for model in json.load(connection.getresponse())["data"]], shown
    finally:
        connection.close()


def test_a_tenant_is_served_over_tls_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("certificates", "base"):
        (tmp_path / name).mkdir()
    certificates = Certificates(tmp_path / "certificates")
    seed = random.randrange(2**31)
    print(f"seed {seed}")
    checkpoint = make_checkpoint(tmp_path / "base", "llama", vocab_size=320, seed=seed)
    write_tokenizer(checkpoint, 320)
    adapter = write_random_adapter(tmp_path / "adapter", checkpoint, rank=2, seed=seed, scale=1.0)
    files = [certificates.path(file) for file in ("ca.crt", "operator.crt", "operator.key")]
    with encrypted_stack(tmp_path / "state", checkpoint, certificates) as stack:
        own_key, other_key = asyncio.run(make_keys(stack.redis.url, "team", "other"))
        with AdapterClient(stack.store_address, own_key, Tls(*files)) as store:
            assert store.upload("poet", adapter).tenant == "team"
        ask = {"temperature": 0, "max_tokens": 4, "ignore_eos": True, "timeout": 60}
        with SloraClient(stack.gateway_address, own_key, Tls(*files)) as client:
            answer = client.generate("poet", "x", **ask)  # type: ignore[arg-type]
            assert (answer.model, answer.usage.num_completion_tokens) == ("poet@1", 4)
        with SloraClient(stack.gateway_address, other_key, Tls(*files)) as client:
            with pytest.raises(SloraRequestError) as refused:
                client.generate("poet", "x", **ask)  # type: ignore[arg-type]
            assert refused.value.reason == "MODEL_NOT_FOUND"

        # The engine, past the gateway: not in plain text, nor with the gateway's certificate left out.
        for security in (ChannelSecurity(), ChannelSecurity(certificates.path("ca.crt"))):
            with open_blocking_channel(stack.engine_addresses[0], security) as channel:
                generate = channel.unary_stream("/slora.engine.v1.EngineService/Generate")
                with pytest.raises(grpc.RpcError) as shut:
                    next(generate(b"", timeout=30))
                assert shut.value.code() is grpc.StatusCode.UNAVAILABLE

        # The command, with what it knows from the environment.
        for name, value in zip(("SLORA_CA", "SLORA_CERTIFICATE", "SLORA_CERTIFICATE_KEY"), files, strict=True):
            monkeypatch.setenv(name, value)
        for key, found in ((own_key, ["poet"]), (other_key, [])):
            monkeypatch.setenv("SLORA_API_KEY", key)
            listed = CliRunner().invoke(app, ["adapters", "ls", "--store", stack.store_address, "--json"])
            assert [entry["name"] for entry in json.loads(listed.stdout)] == found

        # HTTP has the same certificate, asks for one as well, and follows the files.
        address = stack.http_url.removeprefix("http://").removesuffix("/v1")
        context = ssl.create_default_context(cafile=files[0])
        with pytest.raises((ssl.SSLError, OSError)):
            get_models(address, context, own_key)
        context.load_cert_chain(*files[1:])
        models, shown = get_models(address, context, own_key)
        assert models == [stack.base_model, "poet"]
        assert ssl.DER_cert_to_PEM_cert(shown).strip().encode() in certificates.read("gateway.crt")
        certificates.issue("127.0.0.1", to="gateway", is_address=True)
        models, shown = get_models(address, context, other_key)
        assert models == [stack.base_model]
        assert ssl.DER_cert_to_PEM_cert(shown).strip().encode() in certificates.read("gateway.crt")
