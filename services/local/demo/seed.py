"""The demo's model and adapters for services that run elsewhere, such as in containers."""

from __future__ import annotations

from pathlib import Path

from services.local.adapter_sources import AdapterSource, bring_adapters
from services.local.demo.materials import obtain_materials
from services.local.narrator import Narrator


def seed(directory: Path, store_address: str, narrator: Narrator) -> int:
    """Makes `directory` the demo's checkpoint or, given a store, registers the adapters that were made with it there.

    Does again only what is not done yet. 1 if an adapter is refused, otherwise 0.
    """
    materials = obtain_materials(directory / "materials", narrator)
    if not store_address:
        _link(materials.checkpoint, directory)
        return 0
    adapters = {**materials.manners, **materials.random_adapters}
    refusals: list[str] = []
    with narrator.task("Adapters", total=len(adapters)) as task:

        def done(name: str, refusal: str) -> None:
            if refusal:
                refusals.append(f"  refused: {name}: {refusal}")
            task.advance(1, name)

        bring_adapters(AdapterSource(adapters, {}), store_address, done)
    for line in refusals:
        narrator.line(line)
    return 1 if refusals else 0


def _link(checkpoint: Path, directory: Path) -> None:
    """Links the checkpoint's files into `directory`, whose name and place stay when another recipe makes others."""
    for file in checkpoint.iterdir():
        link = directory / file.name
        link.unlink(missing_ok=True)
        link.symlink_to(file.relative_to(directory))
