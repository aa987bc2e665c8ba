"""Alerts and dashboard name only metrics that services have, labels and outcomes included; each alert is explained."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.registry import Collector

from deploy.draw_dashboard import Span, filled_in
from services.adapter_store.host_cache import CacheFigures
from services.adapter_store.metrics import StoreMetrics
from services.common.errors import Reason
from services.engine.frontend.metrics import EngineMetrics
from services.engine.frontend.vllm_metrics import AdapterPresence, VllmCollector
from services.engine.messages import CoreLoad
from services.gateway.metrics import EngineCollector, GatewayMetrics
from services.gateway.router import Decision

ROOT = Path(__file__).resolve().parents[2]
ALERTS = ROOT / "deploy" / "prometheus" / "alerts.yml"
RULES: list[dict[str, Any]] = [
    rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]
]
DASHBOARD = json.loads((ROOT / "deploy" / "grafana" / "dashboard.json").read_text())
OPERATIONS = (ROOT / "docs" / "operations.md").read_text()
SPAN = Span(0.0, 600.0, scrape_seconds=5.0)
METRIC = re.compile(r"\b(?:slora_|vllm:)\w+")


def exposed(registry: CollectorRegistry) -> Iterator[str]:
    """Names of samples, also of metrics that have none yet."""
    endings = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}
    for family in registry.collect():
        yield from (family.name + ending for ending in endings[family.type])


# Every label there is, and what bounds the number of its values. Request ids, tenants, prompts and paths that callers
# make up belong into logs and traces.
BOUNDED_LABELS = {
    "adapter": "BoundedLabels, by names that were seen at work",
    "model": "BoundedLabels, by names that were resolved",
    "engine": "the configuration",
    "outcome": "reasons of errors, and a few words",
    "reason": "reasons of errors, or of the policy",
    "decision": "an enumeration",
    "route": "the API's routes, or `other`",
    "status": "HTTP's statuses",
    "method": "the RPCs of the store",
    "kind": "prompt, completion",
    "path": "lent, streamed",
    "place": "home, away",
    "tier": "s3, disk, arena",
    "cause": "an enumeration",
    "replica": "the stores, by names that last",
    "result": "hit, miss",
    "state": "kinds of pages",
    "model_name": "one base model",
    "running_lora_adapters": "one sample, whose value changes",
    "waiting_lora_adapters": "the same",
    "max_lora": "the configuration",
}


def labels_of(registry: CollectorRegistry) -> Iterator[tuple[str, str]]:
    """Name and label of each metric, also of those that have no value yet."""
    for collector in list(registry._collector_to_names):
        for label in getattr(collector, "_labelnames", ()):
            yield type(collector).__name__ + " " + collector._name, label  # type: ignore[attr-defined]
        for family in collector.collect():
            for label in {*getattr(family, "_labelnames", ()), *(key for s in family.samples for key in s.labels)}:
                if label not in ("le", "quantile"):
                    yield family.name, label


def all_registries() -> list[CollectorRegistry]:
    gateway = CollectorRegistry()
    GatewayMetrics(gateway, 10)
    gateway.register(EngineCollector([], lambda: 0))
    store_metrics = StoreMetrics(store := CollectorRegistry())
    store_metrics.observe_cache(lambda: CacheFigures(1, 1, 1, 1, 0, 0))
    store_metrics.observe_copies(lambda: 0)
    store_metrics.observe_replicas(lambda: 1, lambda: True)
    engine_metrics = EngineMetrics()
    engine_metrics.watch_core(CoreLoad, lambda: 0, lambda: True)
    vllm: Collector = VllmCollector("base", 1, CoreLoad, AdapterPresence)
    engine_metrics.registry.register(vllm)
    return [gateway, store, engine_metrics.registry]


def all_metrics() -> set[str]:
    return {name for registry in all_registries() for name in exposed(registry)}


def test_every_label_has_a_bounded_set_of_values() -> None:
    found = [pair for registry in all_registries() for pair in labels_of(registry)]
    assert {label for _, label in found} == BOUNDED_LABELS.keys(), found


def test_a_label_that_is_not_listed_is_noticed() -> None:
    registry = CollectorRegistry()
    Counter("slora_gateway_by_request", "Not to be.", ["request_id"], registry=registry)
    assert ("Counter slora_gateway_by_request", "request_id") in list(labels_of(registry))


def test_rates_have_a_zero_to_rise_from() -> None:
    """A series that begins with its first event hides it: labels of a few known words are there from the start."""
    samples = [s for registry in all_registries() for family in registry.collect() for s in family.samples]
    zeros = {(sample.name, *sorted(sample.labels.values())) for sample in samples if sample.value == 0}
    assert zeros >= {("slora_gateway_routing_decisions_total", decision.value) for decision in Decision}
    assert zeros >= {("slora_engine_adapter_loaded_bytes_total", path) for path in ("lent", "streamed")}
    assert ("slora_engine_adapter_load_seconds_count",) in zeros
    for tier in ("arena", "s3"):
        assert zeros >= {("slora_adapter_store_tier_lookups_total", *sorted((tier, r))) for r in ("hit", "miss")}
        assert zeros >= {(f"slora_adapter_store_tier_{name}", tier) for name in ("read_bytes_total", "seconds_count")}


def dashboard_queries() -> list[str]:
    return [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", [])]


def adapter_rules() -> Iterable[str]:
    rules = yaml.safe_load((ROOT / "deploy" / "prometheus" / "adapter-rules.yml").read_text())
    return (rule["seriesQuery"] for rule in rules["rules"]["custom"])


def test_every_metric_that_is_named_exists() -> None:
    known = all_metrics()
    for text in [*(rule["expr"] for rule in RULES), *dashboard_queries(), *adapter_rules()]:
        named = set(METRIC.findall(text))
        assert named, text
        assert named <= known, text
    # `slora_…_*` in prose is a family.
    assert {name for name in METRIC.findall(OPERATIONS) if not name.endswith("_")} <= known | {
        "slora_gateway_tokens_per_second"
    }


def test_every_outcome_that_is_named_exists() -> None:
    for rule in RULES:
        for service, outcomes in re.findall(r'slora_(\w+?)_\w+_total\{outcome=~?"([^"]+)"', rule["expr"]):
            reasons = {reason.name.lower() if service == "gateway" else reason.name for reason in Reason} | {"OK"}
            assert set(outcomes.split("|")) <= reasons, rule["alert"]


def test_every_alert_is_explained_and_no_other() -> None:
    alerts = [rule["alert"] for rule in RULES]
    assert len(alerts) == len(set(alerts))
    assert re.findall(r"^### (Slora\w+)$", OPERATIONS, re.MULTILINE) == alerts
    for rule in RULES:
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert rule["annotations"]["summary"].endswith("."), rule["alert"]


def test_every_alert_is_tried() -> None:
    tried = (ALERTS.parent / "alerts.test.yml").read_text()
    assert {rule["alert"] for rule in RULES} <= set(re.findall(r"Slora\w+", tried))


@pytest.mark.skipif(
    shutil.which("promtool") is None, reason="the alert rules are NOT TRIED: promtool is not installed here"
)
@pytest.mark.parametrize(
    "command", [("check", "rules", "alerts.yml"), ("test", "rules", "alerts.test.yml")], ids=" ".join
)
def test_alerts_fire_when_they_should(command: tuple[str, ...]) -> None:
    done = subprocess.run(["promtool", *command], cwd=ALERTS.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(
    shutil.which("promtool") is None, reason="the dashboard's queries are NOT READ: promtool is not installed here"
)
def test_queries_of_the_dashboard_can_be_read(tmp_path: Path) -> None:
    shown = [filled_in(text, SPAN) for text in dashboard_queries()]
    rules = [{"record": f"panel:{number}", "expr": text} for number, text in enumerate(shown)]
    (tmp_path / "panels.yml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    command = ["promtool", "check", "rules", "panels.yml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_dashboard_is_whole() -> None:
    ids = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids)), "two panels have one place"
    for panel in DASHBOARD["panels"]:
        assert panel["title"]
        if panel["type"] != "row":
            assert panel["targets"]
            assert panel["datasource"]["uid"] == "${datasource}"
