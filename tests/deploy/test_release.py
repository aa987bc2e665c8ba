"""One version everywhere, and a check that would notice another."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy import release_check
from deploy.release_check import PLACES, ROOT, other_versions, package_version


def test_one_version_everywhere() -> None:
    assert list(other_versions(package_version())) == []


@pytest.mark.parametrize("place", PLACES)
def test_another_version_is_noticed(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = package_version()
    for name in PLACES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        text = (ROOT / name).read_text()
        (tmp_path / name).write_text(text.replace(version, "9.9.9") if name == place else text)
    monkeypatch.setattr(release_check, "ROOT", tmp_path)
    told = list(other_versions(version))
    assert told
    assert all(line.startswith(place) and "9.9.9" in line for line in told)
