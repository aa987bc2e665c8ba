"""What comes first when a model is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from services.engine.config import EngineSettings, PoolConfig
from services.engine.execution import loaded_model
from services.engine.execution.communicator import SoleProcess
from services.engine.execution.loaded_model import load_model
from services.engine.execution.pool_size import pool_config
from services.engine.model.checkpoint import Checkpoint
from tests.fixtures.tiny_models import make_checkpoint


def test_the_pool_is_sized_by_what_all_weights_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []

    class Watched(Checkpoint):
        def finish(self) -> None:
            super().finish()
            happened.append("weights")

    def sized(*arguments: Any) -> PoolConfig:
        happened.append("pool")
        return pool_config(*arguments)

    monkeypatch.setattr(loaded_model, "pool_config", sized)
    directory = make_checkpoint(tmp_path / "base", "llama", seed=5)
    settings = EngineSettings(str(directory), (), num_pages=7).for_device()
    model = load_model(settings, Watched(directory, torch.float32), SoleProcess())
    assert happened == ["weights", "pool"]
    assert model.step_limits.num_pages == model.pool.config.num_pages == 7


def test_pages_that_hold_no_adapter_are_refused_at_the_start(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "base", "llama", seed=5, num_key_value_heads=1)

    def load(tokens_per_page: int) -> None:
        settings = EngineSettings(str(directory), (), num_pages=7, tokens_per_page=tokens_per_page).for_device()
        load_model(settings, None, SoleProcess())

    with pytest.raises(ValueError, match=r"tokens_per_page is 3: .* holds no whole tiles of 16, .*; 4 is right$"):
        load(3)
    load(4)
