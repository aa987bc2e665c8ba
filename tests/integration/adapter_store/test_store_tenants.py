"""Tenants at a store that asks who calls: each reaches its own adapters and nobody's, never another's.

Two tenants, both with every name: nothing but the owner tells their adapters apart. What is tried on another's adapter
stands in a table that is held equal to the service's descriptor.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from slora.adapter_store.v1 import adapter_store_pb2 as pb
from slora_client import AdapterClient, SloraRequestError, Tls

from services.common.errors import Reason
from tests.fixtures.guarded_store import METHODS, TIMEOUT, Person, World
from tests.fixtures.store_client import reason_of, upload_parts

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
    "ReportCopies": (
        Reason.NOT_PERMITTED,
        [lambda name, digest: [pb.ReportCopiesRequest(copies=[pb.CopiedAdapter(digest=digest, num_copies=1)])]],
    ),
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


def test_every_rpc_is_tried_on_anothers() -> None:
    assert set(METHODS) == set(ON_ANOTHERS)


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
