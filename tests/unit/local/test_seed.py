"""What containers are given: a checkpoint whose place stays, and its adapters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from services.local.__main__ import main
from services.local.demo import seed as seeding
from services.local.demo.materials import Materials
from services.local.narrator import Narrator


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Materials without training; a list of recipes, the last of which is in force."""
    recipes = ["first"]

    def obtain(cache: Path, _: Narrator) -> Materials:
        checkpoint = cache / recipes[-1] / "tiny-llama"
        checkpoint.mkdir(parents=True, exist_ok=True)
        (checkpoint / "config.json").write_text(json.dumps(recipes[-1]))
        return Materials(cache / recipes[-1], {"random-001": "?"})

    monkeypatch.setattr(seeding, "obtain_materials", obtain)
    return recipes


def test_the_checkpoint_is_in_the_same_place_whatever_made_it(tmp_path: Path, made: list[str]) -> None:
    for recipe in ("first", "second", "second"):
        made.append(recipe)
        assert main(["seed", "--materials", str(tmp_path)]) == 0
        assert json.loads((tmp_path / "config.json").read_text()) == recipe
        # Within the volume, wherever it is mounted.
        assert not (tmp_path / "config.json").readlink().is_absolute()


def test_adapters_go_to_the_store_and_a_refusal_is_a_failure(
    tmp_path: Path, made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    refusal = ""

    def bring(source, address, on_done):  # type: ignore[no-untyped-def]
        assert address == "store:50052"
        assert {"pirate", "random-001"} <= set(source.names)
        for name in source.names:
            on_done(name, refusal)

    monkeypatch.setattr(seeding, "bring_adapters", bring)
    arguments = ["seed", "--materials", str(tmp_path), "--store", "store:50052"]
    assert main(arguments) == 0
    refusal = "no"
    assert main(arguments) == 1


def test_an_own_checkpoint_needs_no_demo(tmp_path: Path) -> None:
    assert main(["seed", "--materials", str(tmp_path / "no"), "--own-checkpoint", "/mine"]) == 0
    assert not (tmp_path / "no").exists()
