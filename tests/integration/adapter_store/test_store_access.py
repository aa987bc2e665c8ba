"""A store process that asks for certificates and credentials: every RPC, for strangers and for services.

What is asked of each RPC stands in tables that are held equal to the service's descriptor: a new RPC without a rule
fails here, and in `test_store_tenants.py`.
"""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest

from services.adapter_store.access import ALLOWED
from services.adapter_store.callers import Role
from services.common.errors import Reason
from services.common.grpc_client import open_blocking_channel
from services.common.tls import ChannelSecurity
from services.local.health_client import is_serving
from tests.fixtures.certificates import Certificates
from tests.fixtures.guarded_store import METHODS, ONE_OF_EACH, TIMEOUT, Person, World
from tests.fixtures.store_client import reason_of


def test_every_rpc_has_a_rule() -> None:
    assert set(METHODS) == set(ALLOWED) == set(ONE_OF_EACH)
    assert all(Role.OPERATOR in roles for roles in ALLOWED.values())


@pytest.mark.parametrize("method", METHODS)
def test_without_credentials_nothing_is_possible(world: World, method: str) -> None:
    for credential, reason in (
        (None, Reason.API_KEY_MISSING),
        ("", Reason.API_KEY_INVALID),
        ("0" * 64, Reason.API_KEY_INVALID),
        (world.certificates.token("engine") + "0", Reason.API_KEY_INVALID),
        (f"sk-slora-{'0' * 16}-{'A' * 43}", Reason.API_KEY_INVALID),
    ):
        assert Person(world.channel, credential).refusal(method, *ONE_OF_EACH[method])[0] is reason, credential


@pytest.mark.parametrize("method", METHODS)
def test_services_may_do_what_is_theirs_and_nothing_else(world: World, method: str) -> None:
    for role in (Role.ENGINE, Role.GATEWAY):
        try:
            world.service(role.value).ask(method, *ONE_OF_EACH[method])
            is_refused = False
        except grpc.RpcError as error:
            is_refused = reason_of(error) is Reason.NOT_PERMITTED
        assert is_refused == (role not in ALLOWED[method]), role


def test_reflection_is_not_served(world: World) -> None:
    reflect = world.channel.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
    with pytest.raises(grpc.RpcError) as refused:
        next(reflect(iter([b""]), timeout=TIMEOUT))
    assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_certificates_that_are_not_believed(world: World, tmp_path: Path) -> None:
    strangers = Certificates(tmp_path)
    world.certificates.issue("operator", to="expired", days_ago=60)
    other = {"certificate": strangers.path("operator.crt"), "key": strangers.path("operator.key")}
    for security in (
        ChannelSecurity(),
        world.security(certificate="", key=""),
        world.security(**other),
        world.security("expired"),
    ):
        with open_blocking_channel(f"127.0.0.1:{world.port}", security) as channel:
            with pytest.raises(grpc.RpcError) as refused:
                Person(channel, world.certificates.token("operator")).listed()
            assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    # What a probe of Kubernetes sends: no TLS, no credentials.
    assert is_serving(f"127.0.0.1:{world.store.listening['health_port']}")


def test_a_token_file_is_what_a_service_calls_with(world: World) -> None:
    security = world.security("engine", token_file=world.certificates.path("tokens/engine"))
    digest = world.service("operator").upload("of-nobody", world.adapter()).digest
    with open_blocking_channel(f"127.0.0.1:{world.port}", security) as channel:
        assert Person(channel, None).fetch(digest)


def test_a_new_token_is_let_in_and_an_old_one_no_longer(world: World) -> None:
    old, new = world.certificates.token("gateway"), "f" * 64
    world.certificates.write("tokens/gateway", f"{old}\n{new}\n".encode())
    for token in (old, new):
        Person(world.channel, token).watched()
    world.certificates.write("tokens/gateway", f"{new}\n".encode())
    assert Person(world.channel, old).refusal("GetAdapter", *ONE_OF_EACH["GetAdapter"])[0] is Reason.API_KEY_INVALID
    world.certificates.write("tokens/gateway", b"short")
    Person(world.channel, new).watched()
    assert any("a token has" in line["message"] for line in world.store.lines())
    world.certificates.write("tokens/gateway", f"{old}\n".encode())
    Person(world.channel, old).watched()
