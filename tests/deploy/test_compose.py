"""docker-compose.yml and the Dockerfile agree with the services and with each other."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from services.adapter_store.config import AdapterStoreSettings
from services.common.settings import parse_settings
from services.engine.config import EngineSettings
from services.gateway.config import GatewaySettings

ROOT = Path(__file__).resolve().parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
GPU: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.gpu.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
DOCKERFILE = (ROOT / "deploy" / "Dockerfile").read_text()
OURS = {
    "adapter-store": ("adapter-store", AdapterStoreSettings),
    "engine-0": ("engine", EngineSettings),
    "engine-1": ("engine", EngineSettings),
    "gateway": ("gateway", GatewaySettings),
}
each_service = pytest.mark.parametrize("name", OURS)


def with_defaults(text: str) -> str:
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


def settings(name: str, more: dict[str, str] | None = None) -> Any:
    program, cls = OURS[name]
    environment = {key: with_defaults(value) for key, value in SERVICES[name]["environment"].items()} | (more or {})
    prefix = f"SLORA_{program}_".upper().replace("-", "_")
    parsed = parse_settings(cls, program, [], environment)
    named = {key.removeprefix(prefix).lower() for key in environment if key.startswith("SLORA_")}
    assert named <= vars(parsed).keys(), f"{name} is given a setting that it does not have"
    return parsed


def mounts(name: str) -> dict[str, tuple[str, str]]:
    """By place: what is mounted there, and how."""
    found = {}
    for volume in SERVICES[name].get("volumes", []):
        source, place, *mode = with_defaults(volume).split(":")
        found[place] = (source, mode[0] if mode else "rw")
    return found


@each_service
def test_settings_exist_and_metrics_are_scraped(name: str) -> None:
    address = settings(name).metrics
    prometheus = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text())
    (scrape,) = prometheus["scrape_configs"]
    assert f"{name}:{address.rpartition(':')[2]}" in scrape["static_configs"][0]["targets"]


def test_grafana_knows_where_prometheus_is_and_how_often_it_scrapes() -> None:
    (source,) = yaml.safe_load((ROOT / "deploy/grafana/provisioning/datasources/prometheus.yml").read_text())[
        "datasources"
    ]
    prometheus = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text())
    assert source["jsonData"]["timeInterval"] == prometheus["global"]["scrape_interval"]
    host, port = source["url"].removeprefix("http://").split(":")
    assert SERVICES[host]["ports"] == [f"127.0.0.1:{port}:{port}"]


def test_services_know_each_other() -> None:
    store = "adapter-store:" + settings("adapter-store").listen.rpartition(":")[2]
    gateway = settings("gateway")
    engines = ["engine-0", "engine-1"]
    assert list(gateway.engines) == [f"{e}:{settings(e).listen.rpartition(':')[2]}" for e in engines]
    assert gateway.adapter_store == (store,)
    assert all(settings(engine).adapter_store == (store,) for engine in engines)
    assert store in SERVICES["demo-adapters"]["command"]
    assert {settings(name).base_model for name in (*engines, "adapter-store")} == {"tiny-llama"}


def test_published_ports_are_those_that_are_listened_on() -> None:
    for name in OURS:
        parsed = settings(name)
        listens = {
            getattr(parsed, key).rpartition(":")[2] for key in ("listen", "metrics", "http") if hasattr(parsed, key)
        }
        for port in SERVICES[name].get("ports", []):
            host, published, inside = port.split(":")
            assert host == "127.0.0.1", "there is no authentication"
            assert inside in listens
            assert published == inside
        assert any(f":{parsed.listen.rpartition(':')[2]}'" in part for part in SERVICES[name]["healthcheck"]["test"])


def test_store_and_engines_share_memory_and_a_checkpoint() -> None:
    store = settings("adapter-store")
    size = re.search(r"size=(\d+)g", COMPOSE["volumes"]["arena"]["driver_opts"]["o"])
    assert size
    assert int(size[1]) * 2**30 > store.arena_bytes
    assert int(SERVICES["adapter-store"]["mem_limit"].removesuffix("g")) > int(size[1])
    assert mounts("adapter-store")[store.arena_dir] == ("arena", "rw")
    assert mounts("adapter-store")[store.upload_dir] == ("uploads", "rw")
    for engine in ("engine-0", "engine-1"):
        assert mounts(engine)[store.arena_dir] == ("arena", "ro")
        assert settings(engine).checkpoint == store.base_model_config
        assert mounts(engine)[settings(engine).checkpoint] == ("model", "ro")


def test_volumes_are_those_that_are_used() -> None:
    used = {source for name in SERVICES for source, _ in mounts(name).values()}
    assert {source for source in used if not source.startswith("./")} == COMPOSE["volumes"].keys()
    for source in used:
        assert not source.startswith("./") or (ROOT / source).exists(), source


@pytest.mark.parametrize("name", SERVICES)
def test_containers_are_confined_and_bounded(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    assert service["mem_limit"]
    assert service["pids_limit"]
    # Images of others run as who is told; ours say it themselves.
    assert "user" in service or service["image"].startswith("slora-")
    if not name.startswith("demo-"):
        assert service["healthcheck"]["test"]
        assert float(service["stop_grace_period"].removesuffix("s")) > 30.0
    waited_for = service.get("depends_on", {})
    assert set(waited_for) <= SERVICES.keys()


def test_gpus_go_to_engines_that_there_are() -> None:
    assert GPU["services"].keys() == {"engine-0", "engine-1"}
    for name, service in GPU["services"].items():
        assert settings(name, service["environment"]).device == "cuda"
        (device,) = service["deploy"]["resources"]["reservations"]["devices"]
        assert device["device_ids"] == [name.rpartition("-")[2]]


def stages() -> dict[str, str]:
    parts = re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)[1:]
    return {re.match(r"\S+ AS (\S+)", part)[1]: part for part in parts}  # type: ignore[index]


def test_images_hold_what_they_need_and_run_as_nobody_special() -> None:
    builds = {s["build"]["target"]: s["image"] for s in SERVICES.values() if "build" in s}
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for target, image in builds.items():
        assert image.startswith(f"slora-{target}:")
        last_user = re.findall(r"^USER (\S+)", stages()["base"] + stages()[target], re.MULTILINE)[-1]
        assert last_user == "10001:10001"
    for target in ("gateway", "adapter-store", "engine"):
        (installed,) = re.findall(r"\[([\w-]+)\]\"", stages()[f"{target}-needs"])
        assert installed == target
        assert f"COPY --from={target}-needs /venv /venv\nCOPY --from=code /app /app\n" in stages()[target]
        has_torch = any(requirement.startswith("torch") for requirement in extras[target])
        assert has_torch == (target == "engine")


def test_an_image_is_built_for_one_service() -> None:
    """Builds run side by side: two that export one name fail where there was none before."""
    built = [service["image"] for service in SERVICES.values() if "build" in service]
    assert sorted(built) == sorted({service["image"] for service in SERVICES.values() if "slora-" in service["image"]})


def test_every_stage_that_runs_pip_takes_its_options() -> None:
    """Without BuildKit a stage inherits no argument."""
    piping = {name: text for name, text in stages().items() if re.search(r"\bpip (install|wheel)\b", text)}
    assert len(piping) == 6
    for name, text in piping.items():
        declared, _, commands = text.partition('ARG PIP_OPTIONS=""\n')
        assert "RUN" not in declared, name
        assert all("$PIP_OPTIONS" in run for run in re.findall(r"\bpip (?:install|wheel)[^&]*", commands)), name


def ancestors(stage: str) -> Iterator[str]:
    """The stage and those that it is built on."""
    while stage in stages():
        yield stage
        stage = stages()[stage].split()[0]


@pytest.mark.parametrize("target", ["gateway", "adapter-store", "engine", "demo"])
def test_a_change_of_code_installs_no_requirement_anew(target: str) -> None:
    before = "".join(stages()[stage] for stage in ancestors(f"{target}-needs"))
    assert re.findall(r"^COPY (.*)$", before, re.MULTILINE) == ["pyproject.toml ./"]
    (install,) = re.findall(r"\bpip install .*", stages()["code"])
    assert "--no-deps" in install.split()


def test_a_stage_comes_after_all_that_it_needs() -> None:
    seen: set[str] = set()
    for name, text in stages().items():
        needed = {text.split()[0], *re.findall(r"--from=(\S+)", text)} & stages().keys()
        assert needed <= seen, name
        seen.add(name)


def test_the_code_is_built_from_all_that_belongs_to_it() -> None:
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"][
        "packages"
    ]
    copied = set(re.findall(r"^COPY (\w+) \1$", DOCKERFILE, re.MULTILINE))
    assert {package.split("/")[0] for package in packages} == copied
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert not copied & set(ignored)


@pytest.mark.skipif(
    shutil.which("docker-compose") is None,
    reason="compose files are NOT READ by docker-compose: it is not installed here",
)
def test_docker_compose_reads_them() -> None:
    command = ["docker-compose", "-f", "docker-compose.yml", "-f", "docker-compose.gpu.yml", "config", "-q"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
