"""`make release-check`: one version everywhere; builds package, chart and images, and looks into what was built."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"
CHART = ROOT / "deploy" / "helm" / "slora"
IMAGES = ("gateway", "adapter-store", "engine")
# Where a version stands, and how.
PLACES = {
    "deploy/helm/slora/Chart.yaml": (r"^version: (\S+)$", r"^appVersion: (\S+)$"),
    "deploy/Dockerfile": (r"^ARG VERSION=(\S+)$",),
    "docker-compose.yml": (r"^ +image: slora-[\w-]+:(\S+)$",),
}


class ReleaseError(Exception):
    """Something is not as it must be; the message says what."""


def package_version() -> str:
    """The version that all others must be."""
    return str(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"])


def other_versions(wanted: str) -> Iterator[str]:
    """Places with another version, or with none."""
    for place, patterns in PLACES.items():
        text = (ROOT / place).read_text()
        for pattern in patterns:
            found = set(re.findall(pattern, text, re.MULTILINE))
            if found != {wanted}:
                yield f"{place} has {', '.join(sorted(found)) or 'no version'}, not {wanted}"


def build_package(version: str) -> None:
    """Builds sdist and wheel and looks for what must be in them."""
    _run(sys.executable, "-m", "uv", "build", "--quiet", "--out-dir", str(DIST), str(ROOT))
    with zipfile.ZipFile(DIST / f"slora-{version}-py3-none-any.whl") as wheel:
        names = set(wheel.namelist())
        metadata = wheel.read(f"slora-{version}.dist-info/METADATA").decode()
    if f"\nVersion: {version}\n" not in metadata:
        raise ReleaseError("the wheel's metadata has another version")
    for module in ("services/gateway", "services/adapter_store", "services/engine", "slora_client", "kernels"):
        if f"{module}/__init__.py" not in names:
            raise ReleaseError(f"the wheel lacks {module}")
    if "slora_client/py.typed" not in names:
        raise ReleaseError("the wheel lacks slora_client/py.typed: type checkers would not look at the client")
    with tarfile.open(DIST / f"slora-{version}.tar.gz") as sdist:
        if f"slora-{version}/pyproject.toml" not in sdist.getnames():
            raise ReleaseError("the sdist cannot be built from")


def build_chart(version: str) -> None:
    """Packages the chart; what it takes from elsewhere in the tree must have come along."""
    from helm_python.chart import Chart, lint, package

    errors = lint(str(CHART))["errors"]
    if errors:
        raise ReleaseError(f"the chart is not sound: {errors}")
    package(CHART, destination=DIST)
    with Chart.load(DIST / f"slora-{version}.tgz") as chart:
        files = {file["name"] for file in chart.files}
    for needed in ("files/alerts.yml", "files/dashboard.json"):
        if needed not in files:
            raise ReleaseError(f"the packaged chart lacks {needed}")


def build_images(version: str) -> bool:
    """Builds the images and checks their labels; False, doing nothing, where no Docker engine runs."""
    if (
        shutil.which("docker") is None
        or subprocess.run(["docker", "info"], capture_output=True, check=False).returncode
    ):
        return False
    for name in IMAGES:
        image = f"slora-{name}:{version}"
        arguments = ("--build-arg", f"VERSION={version}", "--file", "deploy/Dockerfile", "--target", name)
        _run("docker", "build", *arguments, "--tag", image, ".")
        label = '{{index .Config.Labels "org.opencontainers.image.version"}}'
        found = _run("docker", "image", "inspect", "--format", label, image).strip()
        if found != version:
            raise ReleaseError(f"{image} is labelled {found}")
    return True


def main() -> int:
    """0 if a release can be made of this tree."""
    version = package_version()
    try:
        wrong = list(other_versions(version))
        if wrong:
            raise ReleaseError("; ".join(wrong))
        shutil.rmtree(DIST, ignore_errors=True)
        build_package(version)
        build_chart(version)
        has_images = build_images(version)
    except (ReleaseError, subprocess.CalledProcessError, ImportError) as error:
        print(f"release-check: {getattr(error, 'stderr', None) or error}", file=sys.stderr)
        return 1
    for path in sorted(DIST.glob("slora-*")):
        print(f"  {path.relative_to(ROOT)}")
    print(f"release-check: {version} in package, chart and files" + (", and in images" if has_images else ""))
    if not has_images:
        print("release-check: IMAGES WERE NOT BUILT: no Docker engine runs here", file=sys.stderr)
    return 0


def _run(*command: str) -> str:
    return subprocess.run(command, cwd=ROOT, check=True, text=True, capture_output=True).stdout


if __name__ == "__main__":
    sys.exit(main())
