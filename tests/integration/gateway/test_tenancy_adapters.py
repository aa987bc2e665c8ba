"""Which adapters a tenant's keys reach, over both APIs."""

from __future__ import annotations

import openai
import pytest
from slora.gateway.v1 import inference_pb2

from services.common.errors import Reason
from tests.integration.gateway.conftest import FleetFactory
from tests.integration.gateway.tenancy_desk import Desk, ask, http


async def test_other_tenants_adapters_do_not_exist(fleet_of: FleetFactory, desk: Desk, redis_url: str) -> None:
    adapters = ("team-a@1", "team-b@3", "secret@1", "cook@1")
    fleet = await fleet_of(1, adapters=adapters, tenancy_redis=redis_url)
    key = await desk.key("team", ("team-*", "cook"))
    assert (await ask(fleet, key, model="team-b@3"))[0].model == "team-b@3"
    hidden, unknown = "secret", "sesame"
    told = []
    for name in (hidden, unknown, f"{hidden}@1", f"{unknown}@1", "team-z"):
        error = await fleet.refusal(ask(fleet, key, model=name))
        assert error.reason is Reason.MODEL_NOT_FOUND
        told.append(error.message.replace(name, "…"))
    assert len(set(told)) == 1, "whether it exists is not told"
    listed = await fleet.stub.ListModels(
        inference_pb2.ListModelsRequest(page_size=2), metadata=[("authorization", f"Bearer {key}")]
    )
    assert [model.name for model in listed.models] == ["base", "cook"]
    async with http(fleet, key) as client:
        assert [model.id async for model in client.models.list()] == ["base", "cook", "team-a", "team-b"]
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("secret")
        with pytest.raises(openai.NotFoundError):
            await client.completions.create(model="secret", prompt="x", n=2)
