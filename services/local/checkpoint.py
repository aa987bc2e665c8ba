"""What has to be known of a checkpoint before anything is started."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

WEIGHTS = "*.safetensors"
SERVED_DTYPES = ("float32", "bfloat16", "float16")


class BadInput(ValueError):  # noqa: N818 - it is what the user gave
    """What the user named cannot be used; the message is one line that says why."""


@dataclass(frozen=True)
class Checkpoint:
    """A Hugging Face checkpoint directory that looks complete."""

    path: Path
    model_type: str
    dtype: str

    @property
    def name(self) -> str:
        """What the base model is called unless told otherwise."""
        return self.path.name


def makes_weights_up(engine_options: Mapping[str, object]) -> bool:
    """Whether engines with these options read no weights."""
    return str(engine_options.get("random_weights", "")).lower() in ("1", "true", "yes", "on")


def open_checkpoint(path: Path, needs_weights: bool = True) -> Checkpoint:
    """Looks at the directory; raises BadInput if it cannot be a checkpoint. The engine checks the rest.

    `needs_weights` is False for engines that make their weights up.
    """
    if not path.is_dir():
        raise BadInput(f"{path} is not a directory; give the directory of a Hugging Face checkpoint")
    for needed, example in (
        ("config.json", "config.json"),
        (WEIGHTS, "model.safetensors"),
        ("tokenizer.json",) * 2,
    ):
        if not any(path.glob(needed)) and (needs_weights or needed != WEIGHTS):
            instead = " (to serve without: --engine-option random_weights=true)" if needed == WEIGHTS else ""
            raise BadInput(f"{path} is not a Hugging Face checkpoint: it has no {example}{instead}")
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        model_type = str(config["model_type"])
        # Newer versions of transformers write `dtype`, older ones `torch_dtype`.
        dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    except OSError as error:
        raise BadInput(f"{path / 'config.json'} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise BadInput(f"{path / 'config.json'} is not the configuration of a model") from None
    return Checkpoint(path.resolve(), model_type, dtype if dtype in SERVED_DTYPES else "float32")
