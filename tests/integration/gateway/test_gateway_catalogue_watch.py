"""The catalogue of a gateway follows the adapter store: new, newer, deleted, reset, away."""

from __future__ import annotations

import asyncio

import pytest
from slora.gateway.v1 import inference_pb2

from services.common.errors import Reason, SloraError
from tests.fakes.fake_engine import Context, FakeEngine, Received, answer_messages, expected_tokens
from tests.integration.gateway.conftest import PROMPT, Fleet, FleetFactory, eventually


def known(fleet: Fleet) -> list[str]:
    assert fleet.gateway is not None
    return [adapter.adapter_id for adapter in fleet.gateway.catalogue.newest_after("")]


async def listed(fleet: Fleet, page_size: int = 0) -> list[inference_pb2.Model]:
    models: list[inference_pb2.Model] = []
    token = ""
    while True:
        page = await fleet.stub.ListModels(inference_pb2.ListModelsRequest(page_size=page_size, page_token=token))
        assert len(page.models) <= (page_size or 100)
        models += page.models
        token = page.next_page_token
        if not token:
            return models


async def test_versions_come_and_go(fleet_of: FleetFactory) -> None:
    fleet = await fleet_of(1)
    assert await fleet.right("poet", "poet@2") == "poet@2"
    assert await fleet.right("poet@1", "poet@1") == "poet@1"
    fleet.store.add("poet", 3)
    await eventually("the new version is known", lambda: "poet@3" in known(fleet))
    assert await fleet.right("poet", "poet@3") == "poet@3"
    fleet.store.remove("poet", 3)
    fleet.store.remove("cook", 1)
    await eventually("the deletions are known", lambda: known(fleet) == ["poet@2"])
    assert await fleet.right("poet", "poet@2") == "poet@2"
    assert (await fleet.refusal(fleet.ask("cook"))).reason is Reason.MODEL_NOT_FOUND
    assert (await fleet.refusal(fleet.ask("poet@3"))).reason is Reason.MODEL_NOT_FOUND


async def test_an_alias_flips_for_new_requests_and_use_is_reported(fleet_of: FleetFactory) -> None:
    fleet = await fleet_of(1)
    fleet.store.set_alias("poet", "prod", 1)
    assert await fleet.right("poet@prod", "poet@1") == "poet@1"
    fleet.store.set_alias("poet", "prod", 2)
    assert fleet.gateway is not None
    catalogue = fleet.gateway.catalogue
    await eventually("the flip is known", lambda: catalogue.versions_of("poet")[1] == {"prod": 2})
    assert await fleet.right("poet@prod", "poet@2") == "poet@2"
    assert (await fleet.refusal(fleet.ask("poet@9"))).message.endswith("the versions 1, 2; its aliases: prod → 2")
    await fleet.gateway.close()
    assert set(fleet.store.uses) == {"poet@1", "poet@2"}


async def test_after_a_restart_of_the_store_nothing_stale_is_served(
    fleet_of: FleetFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.gateway.models._CONFIRM_SECONDS", 20.0)  # a slow machine may need a moment
    fleet = await fleet_of(1)
    await fleet.store.stop()
    fleet.store.add("poet", 3)
    fleet.store.remove("cook")
    fleet.store.is_watch_mute = True  # the watch tells nothing yet
    await fleet.store.start()
    await eventually("it is reached again", lambda: len(fleet.store.watch_tokens) == 2)
    assert await fleet.right("poet", "poet@3") == "poet@3"
    assert (await fleet.refusal(fleet.ask("cook"))).reason is Reason.MODEL_NOT_FOUND


async def test_an_adapter_registered_just_now_works_at_once(fleet_of: FleetFactory) -> None:
    fleet = await fleet_of(1)
    fleet.store.is_watch_mute = True
    fleet.store.add("fresh")
    assert await fleet.right("fresh", "fresh@1") == "fresh@1"
    assert await fleet.right("fresh@1", "fresh@1") == "fresh@1"
    assert known(fleet) == ["cook@1", "poet@2"], "it was asked of the store"


async def test_unknown_names(fleet_of: FleetFactory) -> None:
    fleet = await fleet_of(1)
    for model in ("nobody", "nobody@1", "poet@9", "poet@0", "Base", "a b/c", "poet@"):
        error = await fleet.refusal(fleet.ask(model))
        assert error.reason is Reason.MODEL_NOT_FOUND, model
    assert fleet.value("requests_total", model="unresolved", outcome="model_not_found") == 7


async def test_a_name_that_no_adapter_can_have_is_an_unknown_model(fleet_of: FleetFactory) -> None:
    fleet = await fleet_of(1)
    fleet.store.get_error = SloraError(Reason.ADAPTER_NAME_INVALID, "bad name")
    assert (await fleet.refusal(fleet.ask("a/b"))).reason is Reason.MODEL_NOT_FOUND


async def test_the_store_is_asked_whatever_the_request_is_called(fleet_of: FleetFactory) -> None:
    fleet = await fleet_of(1)
    for request_id in ("\0", "two\nlines", "größe"):
        error = await fleet.refusal(fleet.ask("nobody", request_id=request_id))
        assert error.reason is Reason.MODEL_NOT_FOUND, request_id


async def test_a_version_of_thousands_of_digits_is_an_unknown_model(fleet_of: FleetFactory) -> None:
    fleet = await fleet_of(1)
    assert (await fleet.refusal(fleet.ask("poet@" + "1" * 5000))).reason is Reason.MODEL_NOT_FOUND


async def test_a_request_keeps_what_it_was_resolved_to(fleet_of: FleetFactory) -> None:
    deleted = asyncio.Event()

    async def slow(engine: FakeEngine, received: Received, context: Context) -> None:
        messages = answer_messages(received.request)
        await context.write(messages[0])
        await deleted.wait()
        for message in messages[1:]:
            await context.write(message)

    fleet = await fleet_of(1, script=slow)
    digest = fleet.store.adapters["poet@2"].digest
    call = fleet.call("poet")
    tokens = [*(await anext(aiter(call))).token_ids]
    fleet.store.remove("poet", 2)
    await eventually("the deletion is known", lambda: "poet@1" in known(fleet))
    deleted.set()
    async for message in call:
        tokens += message.token_ids
    assert tokens == expected_tokens(PROMPT, digest, 4)


async def test_with_the_store_away_what_is_known_goes_on(fleet_of: FleetFactory) -> None:
    fleet = await fleet_of(1)
    await fleet.store.stop()
    assert await fleet.right("poet", "poet@2") == "poet@2"
    assert await fleet.right("base") == "base"
    error = await fleet.refusal(fleet.ask("nobody"))
    assert error.reason is Reason.ADAPTER_STORE_UNAVAILABLE
    assert len(await listed(fleet)) == 3
    fleet.store.add("fresh")
    fleet.store.remove("cook")
    await fleet.store.start()
    await eventually("the changes are known", lambda: known(fleet) == ["fresh@1", "poet@2"])
    assert fleet.store.watch_tokens == ["", "1:3"], "resumed after what was seen"


async def test_a_store_that_hangs_is_as_if_away(fleet_of: FleetFactory) -> None:
    fleet = await fleet_of(1, store_timeout_seconds=0.3)
    fleet.store.answer_seconds = 30
    error = await fleet.refusal(fleet.ask("nobody"))
    assert error.reason is Reason.ADAPTER_STORE_UNAVAILABLE
    assert await fleet.right("poet", "poet@2") == "poet@2"


async def test_a_catalogue_out_of_reach_is_told_as_it_is(fleet_of: FleetFactory) -> None:
    fleet = await fleet_of(1)
    fleet.store.get_error = SloraError(Reason.CATALOGUE_UNAVAILABLE, "no Redis")
    error = await fleet.refusal(fleet.ask("nobody"))
    assert (error.reason, error.message) == (Reason.CATALOGUE_UNAVAILABLE, "no Redis")


async def test_reset_after_the_history_was_lost(fleet_of: FleetFactory) -> None:
    fleet = await fleet_of(1)
    await fleet.store.stop()
    fleet.store.remove("cook")
    fleet.store.add("fresh")
    fleet.store.forget_history()
    await fleet.store.start()
    await eventually("everything was sent again", lambda: known(fleet) == ["fresh@1", "poet@2"])
    fleet.store.add("later")
    await eventually("and changes follow", lambda: "later@1" in known(fleet))


async def test_a_watch_broken_before_everything_was_sent_begins_anew(fleet_of: FleetFactory) -> None:
    fleet = await fleet_of(1, adapters=())
    await fleet.store.stop()
    for name in "abcd":
        fleet.store.add(name)
    fleet.store.forget_history()
    fleet.store.stop_watch_after = 2
    await fleet.store.start()
    await eventually("it was tried", lambda: len(fleet.store.watch_tokens) >= 3)
    assert fleet.store.watch_tokens[2] == ""
    fleet.store.stop_watch_after = None
    await eventually("all are known", lambda: known(fleet) == ["a@1", "b@1", "c@1", "d@1"])


async def test_list_models(fleet_of: FleetFactory) -> None:
    fleet = await fleet_of(2, adapters=tuple(f"a{i}@1" for i in range(7)))
    digest = fleet.store.adapters["a3@1"].digest
    fleet.engines[0].load_adapter(digest)
    await eventually("residency is known", lambda: fleet.in_state(0).resident)
    for page_size in (1, 3, 4, 8, 100):
        models = await listed(fleet, page_size)
        assert [m.name for m in models] == ["base", *(f"a{i}" for i in range(7))]
        assert [m.num_resident_engines for m in models] == [2, 0, 0, 0, 1, 0, 0, 0]
    assert (models[4].adapter_id, models[4].base_model, models[4].rank) == ("a3@1", "base", 8)
    assert models[4].create_time.seconds == 1_700_000_001
    await fleet.engines[0].stop()
    await eventually("it is lost", lambda: not fleet.in_state(0).is_up)
    models = await listed(fleet)
    assert [m.num_resident_engines for m in models] == [1, 0, 0, 0, 0, 0, 0, 0]


async def test_pages_stay_right_while_adapters_change(fleet_of: FleetFactory) -> None:
    fleet = await fleet_of(1, adapters=("b@1", "d@1", "f@1"))
    request = inference_pb2.ListModelsRequest(page_size=2)
    first = await fleet.stub.ListModels(request)
    assert [m.name for m in first.models] == ["base", "b"]
    fleet.store.remove("b")
    fleet.store.add("a")
    fleet.store.add("e")
    await eventually("the changes are known", lambda: known(fleet) == ["a@1", "d@1", "e@1", "f@1"])
    request.page_token = first.next_page_token
    assert [m.name for m in (await fleet.stub.ListModels(request)).models] == ["d", "e"]


@pytest.mark.parametrize("fields", [{"page_size": -1}, {"page_size": 1001}, {"page_token": "made up"}])
async def test_bad_pages(fleet_of: FleetFactory, fields: dict[str, object]) -> None:
    fleet = await fleet_of(1)
    request = inference_pb2.ListModelsRequest(**fields)  # type: ignore[arg-type]
    assert (await fleet.refusal(fleet.stub.ListModels(request))).reason is Reason.PAGE_INVALID


async def test_no_list_before_the_catalogue_was_seen(fleet_of: FleetFactory) -> None:
    fleet = await fleet_of(1)
    late = Fleet(fleet.engines, fleet.store)
    await fleet.store.stop()
    await late.start()
    try:
        error = await fleet.refusal(late.stub.ListModels(inference_pb2.ListModelsRequest()))
        assert error.reason is Reason.ADAPTER_STORE_UNAVAILABLE
        assert await late.right("base") == "base", "the base model needs no store"
        assert (await fleet.refusal(late.ask("poet"))).reason is Reason.ADAPTER_STORE_UNAVAILABLE
        await fleet.store.start()
        await eventually("the catalogue is seen", lambda: late.gateway and late.gateway.catalogue.is_complete)
        assert await late.right("poet", "poet@2") == "poet@2"
    finally:
        await late.close()
