"""What a checkpoint must have before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.local.checkpoint import BadInput, makes_weights_up, open_checkpoint
from tests.fixtures.hollow_checkpoint import write_hollow_checkpoint


def test_weights_are_needed_unless_they_are_made_up(tmp_path: Path) -> None:
    directory = write_hollow_checkpoint(tmp_path / "random-weights-x")
    (directory / "model.safetensors").unlink()
    with pytest.raises(BadInput, match=r"it has no model\.safetensors"):
        open_checkpoint(directory)
    assert open_checkpoint(directory, needs_weights=False).name == "random-weights-x"
    (directory / "tokenizer.json").unlink()
    with pytest.raises(BadInput, match=r"it has no tokenizer\.json"):
        open_checkpoint(directory, needs_weights=False)


def test_what_the_engine_takes_for_true_is_true_here_too() -> None:
    assert all(makes_weights_up({"random_weights": value}) for value in (True, "true", "1", "Yes"))
    assert not any(makes_weights_up(options) for options in ({}, {"random_weights": False}, {"random_weights": "0"}))


def test_a_configuration_that_cannot_be_read_says_so(tmp_path: Path) -> None:
    checkpoint = write_hollow_checkpoint(tmp_path / "hollow")
    (checkpoint / "config.json").unlink()
    (checkpoint / "config.json").mkdir()
    with pytest.raises(BadInput, match=r"config\.json cannot be read: Is a directory$"):
        open_checkpoint(checkpoint)
