"""TLS of servers and channels, and what is said of files that cannot work."""

from __future__ import annotations

import os
import ssl
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.common.exposure import warn_of_plain_text
from services.common.grpc_client import open_blocking_channel, open_channel
from services.common.grpc_server import GrpcServer
from services.common.tls import ChannelSecurity, PemFiles, RenewedFiles, ServerTls, TlsError, read_token
from tests.fixtures.certificates import Certificates


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Of an authority that nobody believes."""
    return Certificates(tmp_path_factory.mktemp("others"))


def tls_of(certificates: Certificates, name: str = "engine", mutual: bool = True) -> ServerTls:
    settings = certificates.server_settings(name, mutual)
    return ServerTls(settings["tls_certificate"], settings["tls_key"], settings.get("tls_client_ca", ""))


def caller(certificates: Certificates, name: str = "gateway", **fields: Any) -> ChannelSecurity:
    ca, certificate, key = (certificates.path(file) for file in ("ca.crt", f"{name}.crt", f"{name}.key"))
    return ChannelSecurity(**{"ca": ca, "certificate": certificate, "key": key, **fields})


async def health(port: int, security: ChannelSecurity | None = None) -> int | grpc.StatusCode:
    async with open_channel(f"127.0.0.1:{port}", security=security or ChannelSecurity()) as channel:
        try:
            request = health_pb2.HealthCheckRequest()
            return int((await health_pb2_grpc.HealthStub(channel).Check(request, timeout=20)).status)
        except grpc.aio.AioRpcError as error:
            return error.code()


SERVING, AWAY = health_pb2.HealthCheckResponse.SERVING, grpc.StatusCode.UNAVAILABLE


async def test_who_has_no_certificate_that_is_asked_for_reaches_nothing(
    certificates: Certificates, others: Certificates
) -> None:
    server = GrpcServer("127.0.0.1:0", [], tls_of(certificates), "127.0.0.1:0")
    await server.start()
    try:
        assert await health(server.port, caller(certificates)) == SERVING
        assert await health(server.port) == AWAY
        assert await health(server.port, caller(certificates, certificate="", key="")) == AWAY
        assert await health(server.port, caller(others, ca=certificates.path("ca.crt"))) == AWAY
        # What a probe without TLS finds: health, and nothing else.
        assert await health(server.health_port) == SERVING
        async with open_channel(f"127.0.0.1:{server.health_port}") as channel:
            reflect = channel.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await reflect(iter([b""]), timeout=20).read()
            assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
    finally:
        await server.stop(0)


async def test_a_server_that_is_another_is_not_believed(certificates: Certificates, others: Certificates) -> None:
    server = GrpcServer("127.0.0.1:0", [], tls_of(certificates, mutual=False))
    await server.start()
    try:
        known = ChannelSecurity(certificates.path("ca.crt"))
        assert await health(server.port, known) == SERVING
        assert await health(server.port, ChannelSecurity(others.path("ca.crt"))) == AWAY
        assert await health(server.port, ChannelSecurity(known.ca, server_name="engine")) == SERVING
        assert await health(server.port, ChannelSecurity(known.ca, server_name="gateway")) == AWAY
    finally:
        await server.stop(0)


async def test_a_renewed_certificate_is_shown_at_the_next_connection(
    certificates: Certificates, caplog: pytest.LogCaptureFixture
) -> None:
    certificates.issue("first.example", to="renewed")
    server = GrpcServer("127.0.0.1:0", [], tls_of(certificates, "renewed"))
    await server.start()
    old, new = (caller(certificates, server_name=name) for name in ("first.example", "second.example"))
    try:
        assert (await health(server.port, old), await health(server.port, new)) == (SERVING, AWAY)
        # Half of a renewal: the certificate no longer fits the key.
        key = certificates.read("renewed.key")
        certificates.issue("second.example", to="renewed")
        fitting = certificates.read("renewed.key")
        certificates.write("renewed.key", key)
        assert await health(server.port, old) == SERVING
        assert "the key is another certificate's" in caplog.text
        certificates.write("renewed.key", fitting)
        assert (await health(server.port, old), await health(server.port, new)) == (AWAY, SERVING)
    finally:
        await server.stop(0)


def test_a_token_is_sent_encrypted_only(certificates: Certificates, tmp_path: Path) -> None:
    token = tmp_path / "token"
    with pytest.raises(TlsError, match="No such file"):
        caller(certificates, token_file=str(token)).read()
    token.write_text("first\nolder\n")
    assert read_token(str(token)) == "first"
    with pytest.raises(TlsError, match="encrypted only"):
        open_blocking_channel("127.0.0.1:1", ChannelSecurity(token_file=str(token)))


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"certificate": "MISSING"}, "missing: No such file"),
        ({"key": "gateway.key"}, "the key is another certificate's"),
        ({"key": ""}, "without a key"),
        ({"certificate": ""}, "without a certificate"),
        ({"certificate": "NONSENSE"}, "no PEM files"),
        ({"key": "NONSENSE"}, "no PEM files"),
        ({"ca": "NONSENSE"}, "no PEM file of certificates"),
        ({"key": "SECRET"}, "without a password"),
    ],
    ids=str,
)
def test_files_that_cannot_work_are_named(
    certificates: Certificates, tmp_path: Path, fields: dict[str, str], told: str
) -> None:
    (tmp_path / "NONSENSE").write_text("nonsense")
    (tmp_path / "SECRET").write_text(
        "-----BEGIN ENCRYPTED PRIVATE KEY-----\nMIIB\n-----END ENCRYPTED PRIVATE KEY-----\n"
    )
    given = {"certificate": "engine.crt", "key": "engine.key", "ca": "ca.crt"} | fields
    paths = {
        field: str(tmp_path / (file if file != "MISSING" else "missing")) if file.isupper() else certificates.path(file)
        for field, file in given.items()
    }
    paths = {field: path if given[field] else "" for field, path in paths.items()}
    with pytest.raises(TlsError, match=told):
        PemFiles(**paths).read()


@pytest.mark.parametrize("tls", [ServerTls(key="k"), ServerTls(client_ca="c")], ids=str)
def test_settings_without_a_certificate_are_refused(tls: ServerTls) -> None:
    with pytest.raises(TlsError, match="tls_certificate"):
        tls.open()


@pytest.mark.parametrize("field", ["certificate", "key", "server_name", "token_file"])
def test_settings_of_a_channel_without_an_authority_are_refused(field: str) -> None:
    with pytest.raises(TlsError, match="CA"):
        ChannelSecurity(**{field: "x"}).read()


def test_a_key_that_everybody_may_read_is_told(certificates: Certificates, caplog: pytest.LogCaptureFixture) -> None:
    certificates.issue("open.example", to="open")
    files = PemFiles(certificates.path("open.crt"), certificates.path("open.key"), "")
    files.read()
    assert not caplog.text
    os.chmod(files.key, 0o644)
    files.read()
    assert f"may read the key {files.key}" in caplog.text


def test_files_behind_a_link_are_followed(certificates: Certificates, tmp_path: Path) -> None:
    # As Kubernetes mounts a Secret: a link to a directory is exchanged, and all files with it.
    for version in ("one", "two"):
        certificates.issue(f"{version}.example", to=version)
        (tmp_path / version).mkdir()
        for kind in ("crt", "key"):
            os.link(certificates.path(f"{version}.{kind}"), tmp_path / version / f"tls.{kind}")
    current = tmp_path / "current"
    current.symlink_to("one")
    files = RenewedFiles(PemFiles(str(current / "tls.crt"), str(current / "tls.key"), ""))
    assert files.renewed() is None
    (tmp_path / "next").symlink_to("two")
    (tmp_path / "next").replace(current)
    renewed = files.renewed()
    assert renewed is not None
    assert renewed.certificate == certificates.read("two.crt")
    assert files.renewed() is None
    ssl.PEM_cert_to_DER_cert(renewed.certificate.decode())


@pytest.mark.parametrize(("address", "told"), [("127.0.0.1:1", False), ("0.0.0.0:1", True), ("[::]:1", True)])
def test_plain_text_beyond_this_host_is_told(address: str, told: bool, caplog: pytest.LogCaptureFixture) -> None:
    warn_of_plain_text("--listen", address)
    assert ("plain text" in caplog.text) == told
