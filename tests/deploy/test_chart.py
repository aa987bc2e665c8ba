"""The chart's objects: sound by Kubernetes' schemas, and in agreement with each other and with the services."""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest

from services.adapter_store.arena import TRAILER_BYTES
from services.common.grpc_server import LIVENESS
from services.common.settings import parse_settings
from services.gateway.servicer import SERVICE_NAME as GATEWAY_SERVICE
from tests.deploy.rendered_chart import (
    CHART,
    EXAMPLES,
    Object,
    Rendered,
    Workload,
    charts,
    environment,
    example_values,
    rendered,
    selects,
)
from tests.deploy.test_chart_values import SERVICES

OLDEST_KUBERNETES = "1.30"

kubernetes_validate = pytest.importorskip(
    "kubernetes_validate", reason="the chart is NOT VALIDATED: kubernetes-validate is not installed here"
)
each_example = pytest.mark.parametrize("example", EXAMPLES)


def one_of(**properties: Any) -> Object:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def array(items: Object) -> Object:
    return {"type": "array", "items": items}


TEXT = {"type": "string", "minLength": 1}
TEXTS = {"type": "object", "additionalProperties": TEXT}
RULE = {
    "type": "object",
    "properties": {"alert": TEXT, "expr": TEXT, "for": TEXT, "labels": TEXTS, "annotations": TEXTS},
    "required": ["alert", "expr", "labels", "annotations"],
    "additionalProperties": False,
}
# Of kinds that Kubernetes itself does not have: what the chart uses of them.
CUSTOM = {
    "ServiceMonitor": one_of(
        selector=one_of(matchLabels=TEXTS),
        podTargetLabels=array(TEXT),
        endpoints=array(one_of(port=TEXT, interval=TEXT)),
    ),
    "PrometheusRule": one_of(groups=array(one_of(name=TEXT, rules=array(RULE)))),
    "ScaledObject": one_of(
        scaleTargetRef=one_of(name=TEXT),
        minReplicaCount={"type": "integer"},
        maxReplicaCount={"type": "integer"},
        triggers=array(
            one_of(
                type={"const": "prometheus"},
                metadata=one_of(serverAddress=TEXT, query=TEXT, threshold=TEXT),
            )
        ),
        advanced=one_of(horizontalPodAutoscalerConfig=one_of(behavior={"type": "object"})),
    ),
}  # fmt: skip


def test_lint() -> None:
    messages = charts.lint(str(CHART))["messages"]
    assert [message["error"] for message in messages] == ["icon is recommended"]


@each_example
@pytest.mark.parametrize("version", [OLDEST_KUBERNETES, kubernetes_validate.latest_version()])
def test_objects_are_sound(example: str, version: str) -> None:
    names = set()
    for item in rendered(example).objects:
        names.add((item["kind"], item["metadata"]["name"]))
        if item["kind"] in CUSTOM:
            jsonschema.validate(item["spec"], CUSTOM[item["kind"]])
        else:
            kubernetes_validate.validate(item, version, strict=True)
    assert len(names) == len(rendered(example).objects), "two objects have one name"


@each_example
def test_every_container_is_confined_probed_and_bounded(example: str) -> None:
    for workload in rendered(example).workloads:
        security = workload.pod["securityContext"]
        assert security["runAsNonRoot"]
        assert security["runAsUser"]
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert workload.pod["automountServiceAccountToken"] is False
        assert {c["topologyKey"] for c in workload.pod["topologySpreadConstraints"]} == {
            "topology.kubernetes.io/zone",
            "kubernetes.io/hostname",
        }
        for container in workload.containers:
            security = container["securityContext"]
            assert security["readOnlyRootFilesystem"] is True
            assert security["allowPrivilegeEscalation"] is False
            assert security["capabilities"] == {"drop": ["ALL"]}
            assert {"startupProbe", "livenessProbe", "readinessProbe"} <= container.keys()
            assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
            assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"]


@each_example
def test_services_are_probed_over_grpc(example: str) -> None:
    for name in SERVICES:
        for workload, container in rendered(example).containers(name):
            own = {port["name"]: port["containerPort"] for port in container["ports"]}
            grpc = own["store-grpc" if name == "adapter-store" else "grpc"]
            # Where that port is encrypted, there is one for probes.
            (health,) = (value for key, value in environment(container).items() if key.endswith("_HEALTH"))
            grpc = int(health.rpartition(":")[2]) if health else grpc
            liveness, readiness = container["livenessProbe"]["grpc"], container["readinessProbe"]["grpc"]
            assert liveness == {"port": grpc, "service": LIVENESS}
            wanted = {"port": grpc, "service": GATEWAY_SERVICE} if name == "gateway" else {"port": grpc}
            assert readiness == wanted
            assert container["startupProbe"]["grpc"]["port"] == grpc, workload.component


@each_example
def test_settings_are_those_of_the_services(example: str) -> None:
    for name, (_, program, cls) in SERVICES.items():
        prefix = f"SLORA_{program}_".upper().replace("-", "_")
        found = list(rendered(example).containers(name))
        assert found, f"nothing runs {name}"
        for _, container in found:
            variables = environment(container)
            settings = parse_settings(cls, program, [], variables)
            passed = {key.removeprefix(prefix).lower() for key in variables if key.startswith("SLORA_")}
            assert passed <= vars(settings).keys()


@each_example
def test_ports_agree_with_what_is_listened_on(example: str) -> None:
    for name in SERVICES:
        for _, container in rendered(example).containers(name):
            variables = environment(container)
            listens = {
                int(value.rpartition(":")[2])
                for key, value in variables.items()
                if key.endswith(("_LISTEN", "_METRICS", "GATEWAY_HTTP"))
            }
            assert listens == {port["containerPort"] for port in container["ports"]}


@each_example
def test_services_lead_to_ports_that_pods_have(example: str) -> None:
    release = rendered(example)
    for service in release.of_kind("Service"):
        behind = [w for w in release.workloads if selects(service["spec"]["selector"], w.labels)]
        assert behind, service["metadata"]["name"]
        for port in service["spec"]["ports"]:
            assert any(w.listens_on(port["targetPort"]) for w in behind), (service["metadata"]["name"], port)
    names = {service["metadata"]["name"]: service for service in release.of_kind("Service")}
    for name in SERVICES:
        for _, container in release.containers(name):
            for key, value in environment(container).items():
                if key.endswith(("_ENGINES", "_ADAPTER_STORE")) and not value.startswith("127.0.0.1:"):
                    for address in value.split(","):
                        host, _, port = address.partition(":")
                        ports = names[host.rpartition(".")[2]]["spec"]["ports"]
                        assert int(port) in {p["port"] for p in ports}, (key, address)


@each_example
def test_gateways_know_every_engine(example: str) -> None:
    release = rendered(example)
    engine = release.workload("engine").manifest
    _, gateway = next(release.containers("gateway"))
    name, service = engine["metadata"]["name"], engine["spec"]["serviceName"]
    addresses = [f"{name}-{i}.{service}:50061" for i in range(engine["spec"]["replicas"])]
    assert environment(gateway)["SLORA_GATEWAY_ENGINES"].split(",") == addresses


@each_example
def test_the_arena_is_where_store_and_engine_both_see_it(example: str) -> None:
    release = rendered(example)
    placement = release.values["adapterStore"]["placement"]
    (engine_pod, engine) = next(release.containers("engine"))
    (store_pod, store) = next(release.containers("adapter-store"))
    volume = next(v for v in store_pod.pod["volumes"] if v["name"] == "arena")
    variables = environment(store)
    arena_bytes, place = int(variables["SLORA_ADAPTER_STORE_ARENA_BYTES"]), variables["SLORA_ADAPTER_STORE_ARENA_DIR"]
    assert {"name": "arena", "mountPath": place} in store["volumeMounts"]
    assert int(store["resources"]["limits"]["memory"]) > arena_bytes, "shared memory counts as the store's"
    if placement == "node":
        assert volume["hostPath"] == {"path": "/dev/shm", "type": "Directory"}
    else:
        assert volume["emptyDir"]["medium"] == "Memory"
        assert int(volume["emptyDir"]["sizeLimit"]) >= arena_bytes + TRAILER_BYTES
    shared = placement != "network"
    assert environment(engine)["SLORA_ENGINE_SHARE_ARENA"] == str(shared).lower()
    assert ({"name": "arena", "mountPath": place, "readOnly": True} in engine["volumeMounts"]) is shared
    assert (volume in engine_pod.pod["volumes"]) is shared
    assert (store_pod.component == "engine") is (placement == "pod")
    assert engine_pod.pod["securityContext"]["runAsUser"] == store_pod.pod["securityContext"]["runAsUser"]


def test_an_engine_asks_the_store_whose_memory_it_shares() -> None:
    one, many = rendered("one-gpu"), rendered("eight-engines")
    assert environment(next(one.containers("engine"))[1])["SLORA_ENGINE_ADAPTER_STORE"] == "127.0.0.1:50052"
    address = environment(next(many.containers("engine"))[1])["SLORA_ENGINE_ADAPTER_STORE"]
    (service,) = (s for s in many.of_kind("Service") if f"{s['metadata']['name']}:50052" == address)
    assert service["spec"]["internalTrafficPolicy"] == "Local"
    engine, store = many.workload("engine").pod, many.workload("adapter-store").pod
    assert (engine["nodeSelector"], engine["tolerations"]) == (store["nodeSelector"], store["tolerations"])


def test_two_thousand_adapters_fit_into_the_arena_of_eight_engines() -> None:
    release = rendered("eight-engines")
    _, store = next(release.containers("adapter-store"))
    assert int(environment(store)["SLORA_ADAPTER_STORE_ARENA_BYTES"]) >= 2000 * 16_777_216
    assert int(release.values["engine"]["settings"]["max_adapters"]) >= 2000


@each_example
def test_pods_have_the_time_to_drain(example: str) -> None:
    release = rendered(example)
    for workload in release.workloads:
        needed = 0.0
        for container in workload.containers:
            drains = [float(v) for k, v in environment(container).items() if k.endswith("_DRAIN_SECONDS")]
            needed += sum(drains) + (release.values["preStopSeconds"] if drains else 0)
            assert not drains or container["lifecycle"]["preStop"]["sleep"]["seconds"] > 0
        assert workload.pod["terminationGracePeriodSeconds"] > needed


@each_example
def test_writable_places_are_volumes(example: str) -> None:
    for workload in rendered(example).workloads:
        claims = [claim["metadata"]["name"] for claim in workload.manifest["spec"].get("volumeClaimTemplates", [])]
        volumes = {volume["name"] for volume in workload.pod.get("volumes", [])} | set(claims)
        mounted = {mount["name"] for container in workload.containers for mount in container["volumeMounts"]}
        assert mounted == volumes
        for volume in workload.pod.get("volumes", []):
            assert "emptyDir" not in volume or "sizeLimit" in volume["emptyDir"], "an emptyDir may fill the node's disk"


def test_a_disk_cache_has_its_volume_and_is_off_by_default() -> None:
    _, without = next(rendered("one-gpu").containers("adapter-store"))
    assert environment(without)["SLORA_ADAPTER_STORE_DISK_CACHE_DIR"] == ""
    workload, container = next(rendered("network-store").containers("adapter-store"))
    variables = environment(container)
    (volume,) = (volume for volume in workload.pod["volumes"] if volume["name"] == "disk-cache")
    assert int(volume["emptyDir"]["sizeLimit"]) > int(variables["SLORA_ADAPTER_STORE_DISK_CACHE_BYTES"]) > 0
    assert {"name": "disk-cache", "mountPath": variables["SLORA_ADAPTER_STORE_DISK_CACHE_DIR"]} in container[
        "volumeMounts"
    ]


@each_example
def test_drains_of_nodes_leave_all_but_one(example: str) -> None:
    release = rendered(example)
    budgets = release.of_kind("PodDisruptionBudget")
    if not release.values["podDisruptionBudget"]["enabled"]:
        assert not budgets
        return
    for workload in release.workloads:
        (budget,) = (b for b in budgets if selects(b["spec"]["selector"]["matchLabels"], workload.labels))
        assert budget["spec"]["maxUnavailable"] == 1
    assert len(budgets) == len(release.workloads)


@each_example
def test_updates_never_take_the_last_gateway(example: str) -> None:
    strategy = rendered(example).workload("gateway").manifest["spec"]["strategy"]["rollingUpdate"]
    assert strategy == {"maxUnavailable": 0, "maxSurge": 1}


def let_in(release: Rendered, target: Workload, port: str) -> list[Object]:
    number = target.ports[port]
    (policy,) = (
        p
        for p in release.of_kind("NetworkPolicy")
        if selects(p["spec"]["podSelector"]["matchLabels"], target.labels)
    )  # fmt: skip
    assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
    return [
        peer
        for rule in policy["spec"]["ingress"] or []
        if number in {p["port"] for p in rule["ports"]}
        for peer in rule["from"]
    ]


def lets_pod_in(release: Rendered, source: str, target: str, port: str) -> bool:
    labels = release.workload(source).labels
    peers = let_in(release, release.workload(target), port)
    return any(selects(p.get("podSelector", {}).get("matchLabels", {"": ""}), labels) for p in peers)


@pytest.mark.parametrize("example", [e for e in EXAMPLES if e != "kind-cpu"])
def test_network_policies_let_in_who_is_needed_and_no_other(example: str) -> None:
    release = rendered(example)
    store = "engine" if release.values["adapterStore"]["placement"] == "pod" else "adapter-store"
    assert lets_pod_in(release, "gateway", "engine", "grpc")
    assert lets_pod_in(release, "gateway", store, "store-grpc")
    assert lets_pod_in(release, "engine", store, "store-grpc")
    assert let_in(release, release.workload("gateway"), "grpc") == release.values["networkPolicy"]["clients"]
    assert let_in(release, release.workload("gateway"), "metrics") == release.values["networkPolicy"]["monitoring"]
    if release.values["redis"]["bundled"]:
        assert lets_pod_in(release, store, "redis", "redis")
        assert lets_pod_in(release, store, "s3", "s3")
        assert not lets_pod_in(release, "gateway", "redis", "redis")
    for policy in release.of_kind("NetworkPolicy"):
        (behind,) = (
            w for w in release.workloads if selects(policy["spec"]["podSelector"]["matchLabels"], w.labels)
        )  # fmt: skip
        for rule in policy["spec"]["ingress"] or []:
            assert rule["from"], "a rule without peers lets everybody in"
            assert all(behind.listens_on(port["port"]) for port in rule["ports"])


def test_scaling_is_by_requests_and_tokens() -> None:
    (scaler,) = rendered("network-store").of_kind("HorizontalPodAutoscaler")
    metrics = [metric["pods"]["metric"]["name"] for metric in scaler["spec"]["metrics"]]
    assert metrics == ["slora_gateway_in_flight_requests", "slora_gateway_tokens_per_second"]
    (scaled,) = rendered("eight-engines").of_kind("ScaledObject")
    queries = [trigger["metadata"]["query"] for trigger in scaled["spec"]["triggers"]]
    assert "slora_gateway_in_flight_requests" in queries[0]
    assert queries[1].startswith("sum(rate(slora_gateway_tokens_total{namespace=")
    assert ',kind="completion"}[1m]))' in queries[1]
    for example in ("network-store", "eight-engines"):
        # Or each upgrade would undo what the autoscaler did.
        assert "replicas" not in rendered(example).workload("gateway").manifest["spec"]
    for example in ("one-gpu", "kind-cpu"):
        assert not rendered(example).of_kind("HorizontalPodAutoscaler", "ScaledObject")
        assert rendered(example).workload("gateway").manifest["spec"]["replicas"] == 1


def test_services_are_told_where_traces_go_and_get_there() -> None:
    values = example_values("network-store")
    traced = Rendered(values | {"tracing": {"endpoint": "http://collector:4317", "sampleRatio": 0.25}})
    for service in ("gateway", "engine", "adapter-store"):
        _, container = next(traced.containers(service))
        told = {name.partition("_OTLP_")[2] or name: value for name, value in environment(container).items()}
        assert told["ENDPOINT"] == "http://collector:4317"
        assert f"SLORA_{service.replace('-', '_').upper()}_TRACE_SAMPLE_RATIO" in told
        assert "0.25" in told.values()
    for policy in traced.of_kind("NetworkPolicy"):
        if policy["metadata"]["name"] in ("slora-gateway", "slora-engine"):
            assert {"ports": [{"port": 4317, "protocol": "TCP"}]} in policy["spec"]["egress"]
    assert not [p for p in rendered("network-store").of_kind("NetworkPolicy") if "4317" in str(p)]


def test_gpus_are_asked_for_where_there_are_some() -> None:
    for example, gpus, device in (("one-gpu", 1, "cuda"), ("eight-engines", 1, "cuda"), ("kind-cpu", None, "cpu")):
        _, engine = next(rendered(example).containers("engine"))
        assert engine["resources"]["limits"].get("nvidia.com/gpu") == gpus
        assert environment(engine)["SLORA_ENGINE_DEVICE"] == device


@each_example
def test_secrets_are_in_secrets_only(example: str) -> None:
    release = rendered(example)
    chosen = release.values["secrets"]
    hidden = [chosen[key] for key in ("redisPassword", "s3SecretKey") if chosen[key]]
    for item in release.objects:
        if item["kind"] != "Secret":
            assert not any(f"'{secret}'" in str(item) or f":{secret}@" in str(item) for secret in hidden)
    assert len(release.of_kind("Secret")) == (0 if chosen["existing"] else 1)


def test_metrics_of_every_service_are_scraped() -> None:
    release_with_sidecars = Rendered(example_values("one-gpu") | {"monitoring": {"serviceMonitor": True}})
    for release in (rendered("eight-engines"), rendered("network-store"), release_with_sidecars):
        (monitor,) = release.of_kind("ServiceMonitor")
        labels = monitor["spec"]["selector"]["matchLabels"]
        (endpoint,) = monitor["spec"]["endpoints"]
        scraped = []
        for service in release.of_kind("Service"):
            if selects(labels, service["metadata"]["labels"]):
                (port,) = (p["targetPort"] for p in service["spec"]["ports"] if p["name"] == endpoint["port"])
                scraped.append((service["spec"]["selector"], port))
        assert len(scraped) == len(SERVICES)
        for name in SERVICES:
            workload, container = next(release.containers(name))
            (metrics,) = (
                int(v.rpartition(":")[2]) for k, v in environment(container).items() if k.endswith("_METRICS")
            )
            assert [port for selector, port in scraped if selects(selector, workload.labels) and port == metrics]
