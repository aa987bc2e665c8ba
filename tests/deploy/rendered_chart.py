"""The chart, rendered with each of its examples."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy" / "helm" / "slora"
EXAMPLES = tuple(sorted(path.stem for path in (CHART / "examples").glob("*.yaml")))
RELEASE = "slora"
Object = dict[str, Any]

charts = pytest.importorskip(
    "helm_python.chart", reason="the chart is NOT CHECKED: helm-python-sdk is not installed here"
)


@dataclass(frozen=True)
class Workload:
    """A Deployment, StatefulSet or DaemonSet."""

    manifest: Object

    @property
    def component(self) -> str:
        return str(self.manifest["spec"]["selector"]["matchLabels"]["app.kubernetes.io/component"])

    @property
    def labels(self) -> dict[str, str]:
        return dict(self.manifest["spec"]["template"]["metadata"]["labels"])

    @property
    def pod(self) -> Object:
        return dict(self.manifest["spec"]["template"]["spec"])

    @property
    def containers(self) -> list[Object]:
        """All that run as long as the pod: sidecars too."""
        beside = self.pod.get("initContainers", [])
        assert all(container["restartPolicy"] == "Always" for container in beside)
        return [*beside, *self.pod["containers"]]

    @property
    def ports(self) -> dict[str, int]:
        named = [(p["name"], p["containerPort"]) for c in self.containers for p in c.get("ports", [])]
        assert len(dict(named)) == len(named), "two ports of one pod have one name"
        return dict(named)

    def listens_on(self, port: str | int) -> bool:
        """Whether there is this port, by name or by number."""
        return port in self.ports or port in self.ports.values()


class Rendered:
    """All objects of a release."""

    def __init__(self, values: Object) -> None:
        with charts.Chart.load(CHART) as chart:
            chart.validate_schema(values)
            self.values: Object = chart.merge_values(values)
            files = chart.render(values, name=RELEASE, namespace="serving")
        texts = [text for name, text in files.items() if name.endswith(".yaml")]
        self.objects: list[Object] = [item for text in texts for item in yaml.safe_load_all(text) if item]

    def of_kind(self, *kinds: str) -> list[Object]:
        return [item for item in self.objects if item["kind"] in kinds]

    @property
    def workloads(self) -> list[Workload]:
        return [Workload(item) for item in self.of_kind("Deployment", "StatefulSet", "DaemonSet")]

    def workload(self, component: str) -> Workload:
        (found,) = (workload for workload in self.workloads if workload.component == component)
        return found

    def containers(self, name: str) -> Iterator[tuple[Workload, Object]]:
        for workload in self.workloads:
            yield from ((workload, container) for container in workload.containers if container["name"] == name)


@functools.cache
def rendered(example: str) -> Rendered:
    return Rendered(example_values(example))


def example_values(example: str) -> Object:
    return dict(yaml.safe_load((CHART / "examples" / f"{example}.yaml").read_text()))


def selects(selector: dict[str, str], labels: dict[str, str]) -> bool:
    return selector.items() <= labels.items()


def environment(container: Object) -> dict[str, str]:
    """A container's variables, those of Secrets made up; `$(NAME)` is replaced as Kubernetes does it."""
    variables: dict[str, str] = {}
    for variable in container["env"]:
        value = variable.get("value", "from-a-secret")
        for name, known in variables.items():
            value = value.replace(f"$({name})", known)
        variables[variable["name"]] = value
    assert len(variables) == len(container["env"]), "a variable is set twice"
    return variables
