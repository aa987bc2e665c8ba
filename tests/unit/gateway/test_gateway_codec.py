"""What the gateway asks of an engine."""

from __future__ import annotations

import random

import pytest
from slora.gateway.v1 import inference_pb2

from services.common.errors import Reason, SloraError
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


def priority_sent(tenant: Tenant, priority: int | None) -> int:
    request = inference_pb2.GenerateRequest(model="base", prompt={"text": "Hi"}, priority=priority)
    return to_engine_request(request, "id", ResolvedModel("base", None), tenant).priority


@pytest.mark.parametrize("highest", range(-10, 11))
def test_a_priority_is_passed_on_up_to_the_tenants_and_refused_above(highest: int) -> None:
    tenant = Tenant("thrifty", max_priority=highest)
    for priority in range(-10, 11):
        if priority <= highest:
            assert priority_sent(tenant, priority) == priority
            continue
        with pytest.raises(SloraError) as refused:
            priority_sent(tenant, priority)
        assert refused.value.reason is Reason.NOT_PERMITTED
        told = f"priority is {priority}; requests of tenant 'thrifty' may have at most {highest}"
        assert refused.value.message == told
        named = {"field": "priority", "value": str(priority), "limit": str(highest), "tenant": "thrifty"}
        assert refused.value.metadata == named


def test_a_priority_left_out_is_0_also_for_who_may_not_have_it() -> None:
    assert priority_sent(Tenant("new"), None) == 0
    with pytest.raises(SloraError, match="priority is 0; requests of tenant 'last' may have at most -1"):
        priority_sent(Tenant("last", max_priority=-1), None)


@pytest.mark.parametrize("tenant", [ANONYMOUS, Tenant("new"), Tenant("first", max_priority=10)])
def test_a_priority_that_nobody_can_have_is_malformed(tenant: Tenant) -> None:
    for priority in (-(2**31), -11, 11, random.randint(12, 2**31 - 1)):
        with pytest.raises(SloraError) as refused:
            priority_sent(tenant, priority)
        assert refused.value.reason is Reason.REQUEST_INVALID
        assert refused.value.message == f"priority is {priority}; it is in [-10, 10]"


def test_without_keys_all_priorities_may_be_used() -> None:
    assert [priority_sent(ANONYMOUS, priority) for priority in range(-10, 11)] == list(range(-10, 11))
