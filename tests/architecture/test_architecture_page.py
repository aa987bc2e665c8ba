"""docs/architecture.md stays true: every module is on it, and what it names exists."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text()

PLACES = ("kernels", "services", "clients/slora_client", "benchmarks", "deploy")

# Words in backticks that are paths: with a slash in them or behind them, or the bare name of a module or proto.
PATH = re.compile(r"`((?:[\w.-]+/)+[\w.-]*|\w+\.(?:py|proto))`")


def modules() -> set[str]:
    python = (path for place in PLACES for path in find(place))
    return {path for path in python if not path.endswith("/__init__.py")} | set(find("protos", "*.proto"))


def find(place: str, pattern: str = "*.py") -> Iterator[str]:
    return (path.relative_to(ROOT).as_posix() for path in (ROOT / place).rglob(pattern))


def listed_modules() -> list[str]:
    """What the tables of section 4 list: a folder in each heading, a file at the head of each row."""
    listed = []
    for section in re.split(r"^### ", PAGE, flags=re.MULTILINE)[1:]:
        heading = re.match(r"`([\w/]+/)`\n", section)
        assert heading, f"this heading is not a folder: {section[:60]!r}"
        # The last table of section 4 ends where the next section begins.
        table = section.partition("\n## ")[0]
        listed += [heading[1] + name for name in re.findall(r"^\| `(\w+\.(?:py|proto))` \|", table, re.MULTILINE)]
    return listed


def blocks() -> Iterator[str]:
    """Paragraphs, list items and the tables' rows outside section 4, in which a path may follow its folder."""
    text = re.sub(r"^## 4\..*?(?=^## )", "", PAGE, flags=re.MULTILINE | re.DOTALL)
    return iter(re.split(r"\n\n|\n(?=- |\d+\. |\| )", text))


def test_every_module_is_listed_once_and_no_other() -> None:
    listed = listed_modules()
    assert len(listed) == len(set(listed)), "a module is listed twice"
    assert modules() - set(listed) == set(), "add a line to section 4 of docs/architecture.md"
    assert set(listed) - modules() == set(), "these are gone; mend section 4 of docs/architecture.md"


def test_every_path_exists() -> None:
    missing = []
    for block in blocks():
        folders = [ROOT]
        for named in PATH.findall(block):
            found = next((folder / named for folder in reversed(folders) if (folder / named).exists()), None)
            if found is None:
                missing.append(f"{named} in: {block.strip()[:60]}")
            elif found.is_dir():
                folders.append(found)
    assert not missing, missing


def test_every_test_that_is_named_exists() -> None:
    text = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    there = set(re.findall(r"^ *(?:async )?def (test_\w+)\(", text, re.MULTILINE))
    named = set(re.findall(r"`(test_\w+)`", PAGE))
    assert len(named) > 30
    assert named - there == set()


def test_every_import_contract_is_told() -> None:
    linter = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    for contract in linter["contracts"]:
        assert f"| {contract['name']} |" in PAGE
    (layers,) = (contract["layers"] for contract in linter["contracts"] if contract["type"] == "layers")
    names = [part.strip().removeprefix("services.engine.") for layer in layers for part in layer.split("|")]
    told = re.search(r"each other: (.*?)\. Where", PAGE, re.DOTALL)
    assert told
    assert [name.removesuffix(".py").removesuffix("/") for name in re.findall(r"`([^`]+)`", told[1])] == names
