"""The chart's values: each is described, used, and held to its type; settings are those of the services."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from services.adapter_store.config import AdapterStoreSettings
from services.engine.config import EngineSettings
from services.gateway.config import GatewaySettings
from tests.deploy.rendered_chart import CHART, EXAMPLES, Object, Rendered, charts, environment, example_values, rendered

SCHEMA: Object = json.loads((CHART / "values.schema.json").read_text())
VALUES: Object = yaml.safe_load((CHART / "values.yaml").read_text())
TEMPLATES = "\n".join(path.read_text() for path in sorted((CHART / "templates").iterdir()))
SERVICES = {
    "engine": ("engine", "engine", EngineSettings),
    "adapter-store": ("adapterStore", "adapter-store", AdapterStoreSettings),
    "gateway": ("gateway", "gateway", GatewaySettings),
}


def described(schema: Object, place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Object]]:
    for name, value in schema.get("properties", {}).items():
        yield (*place, name), value
        yield from described(value, (*place, name))


def given(values: Any, place: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, value in values.items():
        yield (*place, name)
        if isinstance(value, dict) and (*place, name) != ("model", "volume"):
            yield from given(value, (*place, name))


def test_every_value_has_a_description_and_a_default() -> None:
    places = dict(described(SCHEMA))
    assert all(value["description"] for value in places.values())
    in_schema = {place for place in places if "settings" not in place[:-1] and place != ("global",)}
    assert in_schema == set(given(VALUES))


def test_no_object_of_values_takes_what_it_does_not_know() -> None:
    assert SCHEMA["additionalProperties"] is False
    for place, value in described(SCHEMA):
        if "properties" in value:
            assert value["additionalProperties"] is False, place


def test_every_value_is_used() -> None:
    for place in given(VALUES):
        if "properties" not in dict(described(SCHEMA))[place]:
            # Of an object that a template gave a name to, only the value's own name is seen.
            assert re.search(rf"\.{place[-1]}\b", TEMPLATES), place


@pytest.mark.parametrize("service", SERVICES)
def test_settings_in_the_schema_are_the_services_own(service: str) -> None:
    key, _, cls = SERVICES[service]
    in_schema = SCHEMA["properties"][key]["properties"]["settings"]["properties"]
    fields = {field.name: field.metadata["help"] for field in dataclasses.fields(cls)}
    assert {name: value["description"] for name, value in in_schema.items()}.items() <= fields.items()
    _, container = next(rendered("one-gpu").containers(service))
    chosen = {name for name in fields if f"SLORA_{service}_{name}".upper().replace("-", "_") in environment(container)}
    # The chart chooses the rest. An engine's id is made up anew at each start, as it must be.
    left = {"engine_id"} if service == "engine" else set()
    assert fields.keys() - in_schema.keys() == chosen | left


@pytest.mark.parametrize(
    "wrong",
    [
        {"engines": {}},
        {"engine": {"replicas": 0}},
        {"engine": {"settings": {"max_adaptors": 1}}},
        {"engine": {"settings": {"listen": "0.0.0.0:1"}}},
        {"adapterStore": {"placement": "moon"}},
        {"adapterStore": {"arenaBytes": "16Gi"}},
        {"gateway": {"autoscaling": {"mode": "vpa"}}},
        {"secrets": {"redisPassword": "a b"}},
        {"tracing": {"endpoint": "collector"}},
        {"tracing": {"sampleRatio": 2}},
    ],
    ids=str,
)
def test_wrong_values_are_refused(wrong: Object) -> None:
    with (
        charts.Chart.load(CHART) as chart,
        pytest.raises(Exception, match=f"at .*{next(iter(wrong))}|additional properties"),
    ):
        chart.validate_schema(wrong)


@pytest.mark.parametrize(("wrong", "told"), [
    ({}, "redisPassword"),
    ({"secrets": {"redisPassword": "x"}}, "s3AccessKey"),
    ({"secrets": {"existing": "x"}, "gateway": {"autoscaling": {"mode": "keda"}}}, "prometheusUrl"),
])  # fmt: skip
def test_what_is_missing_is_told(wrong: Object, told: str) -> None:
    with pytest.raises(Exception, match=told):
        Rendered(wrong)


def test_examples_say_nothing_that_is_the_default() -> None:
    def repeated(values: Object, defaults: Object) -> Iterator[str]:
        for name, value in values.items():
            if isinstance(value, dict) and isinstance(defaults.get(name), dict):
                yield from repeated(value, defaults[name])
            elif value == defaults.get(name):
                yield name

    for example in EXAMPLES:
        # What an example is about may stand in it though it is the default.
        assert set(repeated(example_values(example), VALUES)) <= {"gpus", "sizeLimit", "readOnly", "replicas"}, example
