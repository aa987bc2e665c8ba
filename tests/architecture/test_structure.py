"""The shape of the project itself: what must stay empty, equal, or apart."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from services.common.errors import Reason

ROOT = Path(__file__).resolve().parents[2]


def test_kernels_package_is_empty() -> None:
    # transformers probes for a library named `kernels`; anything imported here would run inside that probe.
    assert (ROOT / "kernels" / "__init__.py").read_text() == ""


def test_transformers_imports_beside_our_kernels_package() -> None:
    code = "from transformers import LlamaForCausalLM, Qwen3ForCausalLM; import kernels; print(kernels.__file__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert str(ROOT) in done.stdout


def test_no_init_files_under_tests() -> None:
    # tests/kernels/__init__.py would shadow the package of that name.
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_every_reason_is_documented_and_no_other() -> None:
    rows = re.findall(r"^\| `([A-Z_]+)` \| ([A-Z_]+) \|", (ROOT / "docs" / "errors.md").read_text(), re.MULTILINE)
    assert dict(rows) == {reason.name: reason.status.value for reason in Reason}
    assert len(rows) == len(Reason), "a reason is listed twice"


def test_generated_code_is_up_to_date(tmp_path: Path) -> None:
    protos = sorted(str(p.relative_to(ROOT / "protos")) for p in (ROOT / "protos").rglob("*.proto"))
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I", "protos"]
    command += [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    subprocess.run([*command, *protos], cwd=ROOT, check=True)
    fresh = {p.relative_to(tmp_path): p.read_text() for p in tmp_path.rglob("*.py*") if p.is_file()}
    committed_root = ROOT / "gen" / "python"
    committed = {
        p.relative_to(committed_root): p.read_text()
        for p in committed_root.rglob("*.py*")
        if p.is_file() and "__pycache__" not in p.parts
    }
    assert fresh == committed, "run `make proto`"


@pytest.mark.parametrize("service", ["gateway", "adapter_store"])
def test_services_without_torch_really_run_without_it(service: str) -> None:
    code = (
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in {'torch', 'transformers', 'triton', 'kernels'}:\n"
        "            raise ImportError(f'{name} must not be imported here')\n"
        "sys.meta_path.insert(0, Refuse())\n"
        f"import services.{service}.__main__, services.{service}.servicer\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


GENERATED_ONLY_IN = re.compile(r"(servicer|codec|\w*_?client|_transport|grpc_\w+)\.py$")


def test_protos_and_grpc_stay_at_the_rim() -> None:
    """Domain code sees neither generated messages nor grpc: only servicers, codecs and client wrappers do."""
    offenders = []
    for path in [*(ROOT / "services").rglob("*.py"), *(ROOT / "clients").rglob("*.py")]:
        relative = path.relative_to(ROOT)
        if relative.parts[1] in {"common", "local"} or path.name == "__main__.py":
            continue
        imports = re.findall(r"^\s*(?:from|import) (slora\.|grpc\b|google\.protobuf)", path.read_text(), re.MULTILINE)
        if imports and not GENERATED_ONLY_IN.search(path.name):
            offenders.append(str(relative))
    assert not offenders, offenders


def test_required_places_exist() -> None:
    for place in ("protos", "services/engine", "services/adapter_store", "services/gateway", "kernels", "tests"):
        assert (ROOT / place).is_dir(), place
    for file in ("Makefile", "docker-compose.yml", "README.md", "CHANGELOG.md", "docs/architecture.md"):
        assert (ROOT / file).is_file(), file


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_no_large_or_binary_weights_are_committed() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    large = [f for f in listed if (ROOT / f).is_file() and (ROOT / f).stat().st_size > 2 * 2**20]
    assert not large, large
