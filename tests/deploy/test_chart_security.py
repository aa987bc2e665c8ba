"""Certificates and tokens of the chart: each service finds its files, shows what its callers expect, and no more."""

from __future__ import annotations

import functools
import itertools

import pytest

from tests.deploy.rendered_chart import Object, Rendered, environment, example_values, rendered
from tests.deploy.test_chart_values import SERVICES

each_placement = pytest.mark.parametrize("placement", ["pod", "node", "network"])
FILES = {"CERTIFICATE": "tls.crt", "KEY": "tls.key", "CA": "ca.crt"}


@functools.cache
def encrypted(placement: str) -> Rendered:
    values = example_values("tls")
    return Rendered(values | {"adapterStore": values["adapterStore"] | {"placement": placement}})


def secret_of(pod: Object, container: Object, path: str) -> tuple[str, list[str]]:
    """The Secret that a directory of a container shows, and the files of it that are chosen."""
    (mount,) = (mount for mount in container["volumeMounts"] if mount["mountPath"] == path)
    assert mount["readOnly"]
    (volume,) = (volume for volume in pod["volumes"] if volume["name"] == mount["name"])
    assert volume["secret"]["defaultMode"] == 0o440, "others could read a key"
    return volume["secret"]["secretName"], [item["key"] for item in volume["secret"].get("items", [])]


@each_placement
def test_certificates_are_where_services_look_for_them(placement: str) -> None:
    release = encrypted(placement)
    for name in SERVICES:
        for workload, container in release.containers(name):
            found = environment(container)
            prefix = f"SLORA_{name}_".upper().replace("-", "_")
            given = {k.removeprefix(prefix): v for k, v in found.items() if k.endswith(tuple(f"_{x}" for x in FILES))}
            given = {setting: path for setting, path in given.items() if not setting.startswith("AWS")}
            for setting, path in given.items():
                if setting == "TLS_CLIENT_CA" and name == "gateway":
                    assert not path, "the public is asked for no certificates"
                    continue
                directory, _, file = path.rpartition("/")
                assert file == FILES[setting.rpartition("_")[2]]
                is_public = name == "gateway" and setting.startswith("TLS_")
                secret = "slora-gateway" if is_public else "slora-services"
                assert secret_of(workload.pod, container, directory) == (secret, [])
            assert {"TLS_CERTIFICATE", "TLS_KEY", "TLS_CLIENT_CA"} <= given.keys()


@each_placement
def test_callers_expect_the_names_of_the_certificates_page(placement: str) -> None:
    release = encrypted(placement)
    for name, peers in (("engine", ["store"]), ("gateway", ["store", "engine"])):
        _, container = next(release.containers(name))
        for peer in peers:
            expected = {"store": "slora-adapter-store", "engine": "slora-engine"}[peer]
            assert environment(container)[f"SLORA_{name}_{peer}_server_name".upper()] == expected


@each_placement
def test_each_service_has_its_own_token_and_stores_have_all(placement: str) -> None:
    release = encrypted(placement)
    for name in ("engine", "gateway"):
        for workload, container in release.containers(name):
            path = environment(container)[f"SLORA_{name.upper()}_STORE_TOKEN_FILE"]
            assert secret_of(workload.pod, container, path.rpartition("/")[0]) == ("slora-tokens", [name])
            assert path.endswith(f"/{name}")
            assert "tokens" not in {mount["name"] for mount in container["volumeMounts"]}
    for workload, container in release.containers("adapter-store"):
        found = environment(container)
        assert found["SLORA_ADAPTER_STORE_ALLOW_ANONYMOUS"] == "false"
        directory = found["SLORA_ADAPTER_STORE_SERVICE_TOKENS"]
        assert secret_of(workload.pod, container, directory) == ("slora-tokens", [])


def test_ports_for_probes_differ_within_a_pod() -> None:
    for workload in encrypted("pod").workloads:
        variables = [environment(container) for container in workload.containers if "env" in container]
        ports = [
            value.rpartition(":")[2]
            for key, value in itertools.chain.from_iterable(found.items() for found in variables)
            if key.endswith(("_HEALTH", "_LISTEN", "_METRICS", "_GATEWAY_HTTP"))
        ]
        assert len(set(ports)) == len(ports)


def test_without_certificates_all_is_as_it_was() -> None:
    release = rendered("one-gpu")
    for name in SERVICES:
        for workload, container in release.containers(name):
            variables = environment(container)
            assert not [
                key for key in variables if "_TLS_" in key or key.endswith(("_TOKENS", "_FILE")) if variables[key]
            ]
            assert not [volume for volume in workload.pod["volumes"] if "secret" in volume]
    _, store = next(release.containers("adapter-store"))
    assert environment(store)["SLORA_ADAPTER_STORE_ALLOW_ANONYMOUS"] == "true"


def test_tokens_need_certificates() -> None:
    with pytest.raises(Exception, match=r"tls\.services"):
        Rendered(example_values("tls") | {"tls": {}})


def test_a_gateway_may_ask_its_callers_for_certificates() -> None:
    values = example_values("tls")
    release = Rendered(values | {"tls": values["tls"] | {"gatewayClients": True}})
    _, container = next(release.containers("gateway"))
    assert environment(container)["SLORA_GATEWAY_TLS_CLIENT_CA"] == "/gateway-certificates/ca.crt"
