"""What the gateway asks of an engine."""

from __future__ import annotations

from slora.gateway.v1 import inference_pb2

from services.gateway.codec import to_engine_request
from services.gateway.models import ResolvedModel
from services.tenancy.tenants import ANONYMOUS, Tenant


def test_priority_and_tenant_are_passed_on() -> None:
    request = inference_pb2.GenerateRequest(model="base", prompt={"text": "Hi"}, priority=-3, tenant="acme")
    sent = to_engine_request(request, "id", ResolvedModel("base", None), ANONYMOUS)
    assert (sent.priority, sent.tenant) == (-3, "acme")
    plain = inference_pb2.GenerateRequest(model="base", prompt={"text": "Hi"})
    sent = to_engine_request(plain, "id", ResolvedModel("base", None), ANONYMOUS)
    assert (sent.priority, sent.tenant) == (0, "")


def test_a_caller_cannot_pass_for_another_tenant() -> None:
    request = inference_pb2.GenerateRequest(model="base", prompt={"text": "Hi"}, tenant="acme")
    sent = to_engine_request(request, "id", ResolvedModel("base", None), Tenant("thrifty"))
    assert sent.tenant == "thrifty"
