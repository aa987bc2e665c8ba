"""A store process that asks for certificates and credentials: every RPC, for strangers, services and tenants.

What is asked of each RPC stands in tables that are held equal to the service's descriptor: a new RPC without a rule
fails here.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from slora.adapter_store.v1 import adapter_store_pb2 as pb
from slora.adapter_store.v1 import adapter_store_pb2_grpc
from slora_client import AdapterClient, SloraRequestError, Tls

from services.adapter_store.access import ALLOWED
from services.adapter_store.callers import Role
from services.common.errors import Reason
from services.common.grpc_client import open_blocking_channel
from services.common.tls import ChannelSecurity
from services.local.health_client import is_serving
from services.tenancy.directory import TenantDirectory
from services.tenancy.tenancy_redis import TenancyRedis
from tests.fixtures.adapter_files import make_tensors, write_adapter, write_checkpoint_config
from tests.fixtures.certificates import Certificates
from tests.fixtures.embedded_servers import RedisServer, S3Server
from tests.fixtures.store_client import reason_of, upload_parts
from tests.fixtures.store_process import StoreProcess

METHODS = pb.DESCRIPTOR.services_by_name["AdapterStoreService"].methods_by_name
TIMEOUT = 60.0
CACHE_SECONDS = 0.2


class Person:
    """Whoever has this credential, with a certificate that the store believes."""

    def __init__(self, channel: grpc.Channel, credential: str | None) -> None:
        self._stub: Any = adapter_store_pb2_grpc.AdapterStoreServiceStub(channel)
        self._metadata = [("authorization", f"Bearer {credential}")] if credential is not None else []

    def begin(self, method: str, *requests: Message) -> Any:
        """Calls an RPC by its name, however it takes its requests."""
        what = iter(requests) if METHODS[method].client_streaming else requests[0]
        return getattr(self._stub, method)(what, timeout=TIMEOUT, metadata=self._metadata)

    def ask(self, method: str, *requests: Message) -> Any:
        """Its answer; of a stream, all answers, of a watch those up to SYNCED."""
        if not METHODS[method].server_streaming:
            return self.begin(method, *requests)
        call = self.begin(method, *requests)
        answers = []
        try:
            for answer in call:
                answers.append(answer)
                if getattr(answer, "event", None) == pb.WATCH_EVENT_SYNCED:
                    break
        finally:
            call.cancel()
        return answers

    def refusal(self, method: str, *requests: Message) -> tuple[Reason, str]:
        with pytest.raises(grpc.RpcError) as caught:
            self.ask(method, *requests)
        return reason_of(caught.value), str(caught.value.details())

    def upload(self, name: str, directory: Path, tenant: str = "") -> Any:
        return self.ask("UploadAdapter", *upload_parts(name, directory, tenant)).adapter

    def get(self, adapter_id: str) -> Any:
        return self.ask("GetAdapter", pb.GetAdapterRequest(adapter_id=adapter_id)).adapter

    def fetch(self, digest: str) -> bytes:
        return b"".join(part.chunk for part in self.ask("FetchAdapter", pb.FetchAdapterRequest(digest=digest)))

    def listed(self, page_size: int = 1000, **fields: Any) -> list[str]:
        found, token = [], ""
        while True:
            request = pb.ListAdaptersRequest(page_size=page_size, page_token=token, **fields)
            answer = self.ask("ListAdapters", request)
            found += [adapter.adapter_id for adapter in answer.adapters]
            token = answer.next_page_token
            if not token:
                return found

    def watched(self) -> list[str]:
        events = self.ask("WatchAdapters", pb.WatchAdaptersRequest())
        return [event.adapter.adapter_id for event in events if event.HasField("adapter")]


@dataclass
class World:
    """The store, whoever calls it, and adapters to call it for."""

    store: StoreProcess
    certificates: Certificates
    redis: RedisServer
    channel: grpc.Channel
    port: int
    directory: Path
    seeds: Iterator[int]

    def service(self, role: str) -> Person:
        return Person(self.channel, self.certificates.token(role))

    def tenant(self, name: str, *patterns: str) -> Person:
        return Person(self.channel, self.key(name, *patterns))

    def key(self, name: str, *patterns: str) -> str:
        async def make(directory: TenantDirectory) -> str:
            await directory.set_tenant(name, {}, patterns or ("*",))
            return (await directory.create_key(name, ""))[0].text

        return str(self.with_directory(make))

    def with_directory(self, work: Callable[[TenantDirectory], Any]) -> Any:
        async def run() -> Any:
            redis = TenancyRedis(self.redis.url, "slora:tenancy", 20.0)
            try:
                return await work(TenantDirectory(redis))
            finally:
                await redis.close()

        return asyncio.run(run())

    def security(self, name: str = "operator", **fields: Any) -> ChannelSecurity:
        files = {"ca": "ca.crt", "certificate": f"{name}.crt", "key": f"{name}.key"}
        return ChannelSecurity(**{field: self.certificates.path(file) for field, file in files.items()} | fields)

    def adapter(self) -> Path:
        """A directory with an adapter that nobody has uploaded."""
        seed = next(self.seeds)
        fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
        tensors = make_tensors(2, seed, ("q_proj",))
        return write_adapter(self.directory / f"adapter-{seed}", fields, tensors)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    directory = tmp_path_factory.mktemp("world")
    for name in ("redis", "s3", "certificates"):
        (directory / name).mkdir()
    redis, s3 = RedisServer(directory / "redis"), S3Server(directory / "s3")
    certificates = Certificates(directory / "certificates")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3.client_environ.items():
            patch.setenv(name, value)
        try:
            redis.start()
            s3.start()
            store = StoreProcess(
                directory,
                base_model_config=write_checkpoint_config(directory / "tiny"),
                redis_url=redis.url,
                tenancy_redis=redis.url,
                tenancy_timeout_seconds=20,
                tenancy_cache_seconds=CACHE_SECONDS,
                service_tokens=certificates.path("tokens"),
                s3_endpoint=s3.endpoint,
                s3_bucket=s3.bucket,
                arena_bytes=2**24,
                arena_dir=directory,
                health="127.0.0.1:0",
                **certificates.server_settings("adapter-store"),
            )
            port = store.await_listening()
            made = World(store, certificates, redis, None, port, directory, itertools.count())  # type: ignore[arg-type]
            with open_blocking_channel(f"127.0.0.1:{port}", made.security()) as made.channel:
                yield made
        finally:
            if "store" in locals():
                store.kill()
            s3.kill()
            redis.kill()


ONE_OF_EACH = {
    "RegisterAdapter": [pb.RegisterAdapterRequest(name="x", source_uri="s3://adapters/x/")],
    "UploadAdapter": [pb.UploadAdapterRequest(header=pb.UploadAdapterHeader(name="x"))],
    "GetAdapter": [pb.GetAdapterRequest(adapter_id="x")],
    "ListAdapters": [pb.ListAdaptersRequest()],
    "DeleteAdapter": [pb.DeleteAdapterRequest(adapter_id="x")],
    "FetchAdapter": [pb.FetchAdapterRequest(digest="sha256:" + "0" * 64)],
    "ShareAdapter": [pb.ShareAdapterRequest(digest="sha256:" + "0" * 64)],
    "WatchAdapters": [pb.WatchAdaptersRequest()],
    "SetAlias": [pb.SetAliasRequest(name="x", alias="prod", version=1)],
    "DeleteAlias": [pb.DeleteAliasRequest(name="x", alias="prod")],
    "UpdateAdapter": [pb.UpdateAdapterRequest(adapter_id="x", pinned=True)],
    "ReportAdapterUse": [pb.ReportAdapterUseRequest()],
    "ListReplicas": [pb.ListReplicasRequest()],
    "SyncAdapters": [pb.SyncAdaptersRequest(source_uri="s3://adapters/synced/")],
    "ValidateAdapter": [pb.ValidateAdapterRequest(config_chunk=b"{}")],
}


def test_every_rpc_has_a_rule() -> None:
    assert set(METHODS) == set(ALLOWED) == set(ONE_OF_EACH) == set(ON_ANOTHERS)
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


# Two tenants, both with every name: nothing but the owner tells their adapters apart.

VALIDATION = [pb.ValidateAdapterRequest(config_chunk=b"{}"), pb.ValidateAdapterRequest(weights_chunk=b"none")]
Attempt = Callable[[str, str], list[Message]]


def of_id(request: Callable[..., Message], field: str = "adapter_id", **more: Any) -> Attempt:
    return lambda name, digest: [request(**{field: name}, **more)]


ON_ANOTHERS: dict[str, tuple[Reason | None, list[Attempt]]] = {
    "ListReplicas": (Reason.NOT_PERMITTED, [lambda name, digest: [pb.ListReplicasRequest()]]),
    "RegisterAdapter": (Reason.NOT_PERMITTED, [of_id(pb.RegisterAdapterRequest, "name", source_uri="s3://adapters/")]),
    "UploadAdapter": (
        Reason.NOT_PERMITTED,
        [lambda name, digest: [pb.UploadAdapterRequest(header=pb.UploadAdapterHeader(name=name, tenant="alpha"))]],
    ),
    "GetAdapter": (
        Reason.ADAPTER_NOT_FOUND,
        [
            lambda name, digest: [pb.GetAdapterRequest(adapter_id=name)],
            lambda name, digest: [pb.GetAdapterRequest(adapter_id=f"{name}@1")],
            lambda name, digest: [pb.GetAdapterRequest(adapter_id=f"{name}@2")],
            lambda name, digest: [pb.GetAdapterRequest(adapter_id=f"{name}@prod")],
        ],
    ),
    "ListAdapters": (None, []),
    "DeleteAdapter": (
        Reason.ADAPTER_NOT_FOUND,
        [of_id(pb.DeleteAdapterRequest), lambda name, digest: [pb.DeleteAdapterRequest(adapter_id=f"{name}@1")]],
    ),
    "FetchAdapter": (Reason.ADAPTER_NOT_FOUND, [lambda name, digest: [pb.FetchAdapterRequest(digest=digest)]]),
    "ShareAdapter": (Reason.NOT_PERMITTED, [lambda name, digest: [pb.ShareAdapterRequest(digest=digest)]]),
    "WatchAdapters": (None, []),
    "SetAlias": (Reason.ADAPTER_NOT_FOUND, [of_id(pb.SetAliasRequest, "name", alias="mine", version=1)]),
    "DeleteAlias": (Reason.ADAPTER_NOT_FOUND, [of_id(pb.DeleteAliasRequest, "name", alias="prod")]),
    "UpdateAdapter": (
        Reason.ADAPTER_NOT_FOUND,
        [of_id(pb.UpdateAdapterRequest, pinned=True), of_id(pb.UpdateAdapterRequest, set_labels={"a": "b"})],
    ),
    "ReportAdapterUse": (
        Reason.NOT_PERMITTED,
        [lambda name, digest: [pb.ReportAdapterUseRequest(uses=[pb.AdapterUse(adapter_id=f"{name}@1")])]],
    ),
    "SyncAdapters": (Reason.NOT_PERMITTED, [of_id(pb.SyncAdaptersRequest, "source_uri")]),
    # Stores nothing, and tells of nothing but what is sent.
    "ValidateAdapter": (None, [lambda name, digest: VALIDATION]),
}
ABSENT, NO_DIGEST = "there-is-none", "sha256:" + "1" * 64


def test_a_tenant_cannot_reach_anothers_adapter_nor_tell_that_it_is_there(world: World) -> None:
    alpha, beta, operator = world.tenant("alpha"), world.tenant("beta"), world.service("operator")
    own = alpha.upload("of-alpha", world.adapter())
    assert own.tenant == "alpha"
    alpha.ask("SetAlias", pb.SetAliasRequest(name="of-alpha", alias="prod", version=1))
    before = operator.get("of-alpha@prod")
    for method, (reason, attempts) in ON_ANOTHERS.items():
        for attempt in attempts:
            if reason is None:
                beta.ask(method, *attempt("of-alpha", own.digest))
                continue
            told = beta.refusal(method, *attempt("of-alpha", own.digest))
            assert told[0] is reason, method
            absent = beta.refusal(method, *attempt(ABSENT, NO_DIGEST))
            plain = (absent[0], absent[1].replace(ABSENT, "of-alpha").replace(NO_DIGEST, own.digest))
            assert told == plain, f"{method} tells what is there from what is not"
    upload = pb.UploadAdapterRequest(header=pb.UploadAdapterHeader(name="of-alpha"))
    assert beta.refusal("UploadAdapter", upload)[0] is Reason.NOT_PERMITTED
    assert not [seen for seen in (*beta.listed(), *beta.watched()) if "alpha" in seen]
    assert beta.listed(tenant="alpha") == []
    assert operator.get("of-alpha@prod") == before
    assert "of-alpha@1" in operator.listed()


def test_a_tenant_may_do_all_this_with_its_own(world: World) -> None:
    gamma, directory = world.tenant("gamma", "gamma-*"), world.adapter()
    own = gamma.upload("gamma-own", directory, tenant="gamma")
    assert gamma.get("gamma-own") == own
    assert gamma.listed() == gamma.watched() == gamma.listed(tenant="gamma") == ["gamma-own@1"]
    assert gamma.fetch(own.digest) == world.service("engine").fetch(own.digest)
    assert gamma.ask("SetAlias", pb.SetAliasRequest(name="gamma-own", alias="prod", version=1)).adapter.aliases
    assert gamma.get("gamma-own@prod").digest == own.digest
    changes = pb.UpdateAdapterRequest(adapter_id="gamma-own@prod", set_labels={"a": "b"}, pinned=True)
    assert gamma.ask("UpdateAdapter", changes).adapter.pinned
    gamma.ask("DeleteAlias", pb.DeleteAliasRequest(name="gamma-own", alias="prod"))
    # Its patterns come first: a name outside them is not its own, and an operator's there is not seen.
    outside = pb.UploadAdapterRequest(header=pb.UploadAdapterHeader(name="other"))
    assert gamma.refusal("UploadAdapter", outside)[0] is Reason.NOT_PERMITTED
    world.service("operator").upload("outside", world.adapter())
    told = gamma.refusal("GetAdapter", pb.GetAdapterRequest(adapter_id="outside"))
    absent = gamma.refusal("GetAdapter", pb.GetAdapterRequest(adapter_id=ABSENT))
    assert told == (absent[0], absent[1].replace(ABSENT, "outside"))
    assert gamma.ask("DeleteAdapter", pb.DeleteAdapterRequest(adapter_id="gamma-own")).num_deleted == 1
    assert gamma.listed() == []


def test_what_is_nobodys_is_for_all_to_read_and_for_none_to_change(world: World) -> None:
    delta, operator = world.tenant("delta", "shared-*"), world.service("operator")
    shared = operator.upload("shared-one", world.adapter())
    assert delta.get("shared-one") == shared
    assert delta.fetch(shared.digest)
    assert delta.listed(page_size=1) == delta.watched() == ["shared-one@1"]
    for method, request in (
        ("SetAlias", pb.SetAliasRequest(name="shared-one", alias="x", version=1)),
        ("UpdateAdapter", pb.UpdateAdapterRequest(adapter_id="shared-one", pinned=True)),
        ("DeleteAdapter", pb.DeleteAdapterRequest(adapter_id="shared-one@1")),
        ("UploadAdapter", pb.UploadAdapterRequest(header=pb.UploadAdapterHeader(name="shared-one"))),
    ):
        assert delta.refusal(method, request)[0] is Reason.NOT_PERMITTED, method
    # An operator made this name two tenants': each sees its own versions, and changes none.
    delta.upload("shared-mixed", world.adapter())
    operator.upload("shared-mixed", world.adapter(), tenant="epsilon")
    assert delta.listed(name_prefix="shared-mixed") == ["shared-mixed@1"]
    for adapter_id in ("shared-mixed", "shared-mixed@1"):
        request = pb.DeleteAdapterRequest(adapter_id=adapter_id)
        assert delta.refusal("DeleteAdapter", request)[0] is Reason.NOT_PERMITTED
    assert operator.listed(name_prefix="shared-mixed") == ["shared-mixed@1", "shared-mixed@2"]


def test_pages_and_their_tokens_tell_of_nothing_else(world: World) -> None:
    person, operator, hidden = world.tenant("mu", "mu-*", "m*-for-all"), world.service("operator"), "mx-for-nobody"
    directory = world.adapter()
    names = ["ma-for-all", "mb-for-all", "mu-1", "mu-2", "mz-for-all"]
    for name in (*names, hidden):
        if name.startswith("mu-"):
            person.upload(name, directory)
        else:
            operator.upload(name, directory)
    expected = [f"{name}@1" for name in names]
    for page_size in (1, 2, 3, 5, 6):
        assert person.listed(page_size) == expected
    assert person.listed(1, name_prefix="mu") == expected[2:4]
    assert person.listed(1, tenant="mu") == expected[2:4]
    assert person.listed(1, tenant="") == [*expected[:2], expected[4]]
    tokens, token = [], ""
    while True:
        answer = person.ask("ListAdapters", pb.ListAdaptersRequest(page_size=1, page_token=token))
        token = answer.next_page_token
        if not token:
            break
        tokens.append(base64.urlsafe_b64decode(token))
    assert len(tokens) == len(names) - 1
    assert not [text for text in tokens if hidden.encode() in text]


def test_a_digest_is_no_way_round(world: World) -> None:
    zeta, eta, directory = world.tenant("zeta"), world.tenant("eta"), world.adapter()
    digest = zeta.upload("of-zeta", directory).digest
    request = pb.FetchAdapterRequest(digest=digest)
    assert eta.refusal("FetchAdapter", request)[0] is Reason.ADAPTER_NOT_FOUND
    # Who has the same files has the same digest; it is theirs for as long as they have it.
    assert eta.upload("of-eta", directory).digest == digest
    assert eta.fetch(digest) == zeta.fetch(digest)
    eta.ask("DeleteAdapter", pb.DeleteAdapterRequest(adapter_id="of-eta"))
    assert eta.refusal("FetchAdapter", request)[0] is Reason.ADAPTER_NOT_FOUND
    assert zeta.fetch(digest)


def test_of_two_tenants_that_want_a_name_at_once_one_gets_it(world: World) -> None:
    parts = {tenant: upload_parts("wanted", world.adapter()) for tenant in ("theta", "iota")}
    calls = []
    for tenant, messages in parts.items():
        person = world.tenant(tenant)
        stub: Any = person._stub
        calls.append(stub.UploadAdapter.future(iter(messages), timeout=TIMEOUT, metadata=person._metadata))
    outcomes = [call.exception() for call in calls]
    (lost,) = (error for error in outcomes if error is not None)
    assert reason_of(lost) is Reason.NOT_PERMITTED
    assert world.service("operator").listed(name_prefix="wanted") == ["wanted@1"]


def test_a_revoked_key_ends_a_watch(world: World) -> None:
    key = world.key("kappa")
    watch = Person(world.channel, key).begin("WatchAdapters", pb.WatchAdaptersRequest())
    while next(watch).event != pb.WATCH_EVENT_SYNCED:
        pass
    (key_id,) = re.findall("sk-slora-([0-9a-f]{16})", key)
    world.with_directory(lambda directory: directory.revoke_key(key_id))
    with pytest.raises(grpc.RpcError) as ended:
        list(watch)
    assert reason_of(ended.value) is Reason.API_KEY_INVALID


def test_the_python_client_and_its_errors(world: World) -> None:
    files = [world.certificates.path(file) for file in ("ca.crt", "operator.crt", "operator.key")]
    with AdapterClient(f"localhost:{world.port}", world.key("lambda"), Tls(*files)) as client:
        pushed = client.upload("of-lambda", world.adapter())
        assert (pushed.tenant, client.get("of-lambda")) == ("lambda", pushed)
        with pytest.raises(SloraRequestError) as refused:
            client.sync("s3://adapters/x/")
        assert (refused.value.code, refused.value.reason) == ("PERMISSION_DENIED", "NOT_PERMITTED")
