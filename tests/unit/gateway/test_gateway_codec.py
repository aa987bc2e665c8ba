"""What the gateway asks of an engine."""

from __future__ import annotations

from slora.gateway.v1 import inference_pb2

from services.gateway.codec import to_engine_request
from services.gateway.models import ResolvedModel


def test_priority_and_tenant_are_passed_on() -> None:
    request = inference_pb2.GenerateRequest(model="base", prompt={"text": "Hi"}, priority=-3, tenant="acme")
    sent = to_engine_request(request, "id", ResolvedModel("base", None))
    assert (sent.priority, sent.tenant) == (-3, "acme")
    plain = inference_pb2.GenerateRequest(model="base", prompt={"text": "Hi"})
    sent = to_engine_request(plain, "id", ResolvedModel("base", None))
    assert (sent.priority, sent.tenant) == (0, "")
