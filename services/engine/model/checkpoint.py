"""A checkpoint's tensors, read strictly: every expected one is there with the right shape, and no other.

Files are mapped, not read: a tensor costs memory only between `read` and the end of its use.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open

from services.engine.model.config import CheckpointError

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
# Written by old versions of transformers; computed from config.json here.
_HARMLESS_SUFFIX = ".rotary_emb.inv_freq"


Cut = tuple[slice, ...]
"""The part of a tensor that is wanted: a slice a dimension, all of the dimensions that it does not name."""


class Weights(Protocol):
    """Where a decoder's weights come from: `Checkpoint`, or `RandomWeights`."""

    def __contains__(self, name: str) -> bool: ...

    def read(self, name: str, shape: Sequence[int]) -> torch.Tensor:
        """The tensor `name`."""

    def read_stacked(
        self, names: Sequence[str], shapes: Sequence[Sequence[int]], cuts: Sequence[Cut] | None = None
    ) -> torch.Tensor:
        """Several tensors, or the `cuts` of them, one below the other along their first dimension."""

    def finish(self) -> None:
        """Everything was read."""


class Checkpoint:
    """The tensors of one directory. Read each, then call `finish`."""

    def __init__(self, directory: Path, dtype: torch.dtype) -> None:
        """Opens `model.safetensors` or the shards of its index; tensors are converted to `dtype`."""
        self._directory = directory
        self._dtype = dtype
        self._files: dict[str, safe_open] = {}
        self._file_of: dict[str, str] = {}
        for name in _file_names(directory):
            try:
                file = safe_open(directory / name, framework="pt")
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"cannot read {directory / name}: {error}") from error
            self._files[name] = file
            for tensor in file.keys():  # noqa: SIM118 - not a dict
                if tensor in self._file_of:
                    raise CheckpointError(f"{directory}: {tensor} is in {self._file_of[tensor]} and in {name}")
                self._file_of[tensor] = name
        self._unread = set(self._file_of)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def read(self, name: str, shape: Sequence[int], out: torch.Tensor | None = None, cut: Cut = ()) -> torch.Tensor:
        """The tensor `name`, which must have `shape`, or a `cut` of it; copied into `out` if given.

        Raises CheckpointError.
        """
        file_name = self._file_of.get(name)
        if file_name is None:
            raise CheckpointError(f"{self._directory} lacks the tensor {name} (shape {list(shape)})")
        file = self._files[file_name]
        try:
            stored = file.get_slice(name)
            found = stored.get_shape()
            if list(found) != list(shape):
                raise CheckpointError(
                    f"{self._directory / file_name}: {name} has shape {list(found)}, config.json asks for {list(shape)}"
                )
            whole = cut_shape(shape, cut) == tuple(shape)
            tensor: torch.Tensor = file.get_tensor(name) if whole else stored[cut]
        except SafetensorError as error:
            raise CheckpointError(f"{self._directory / file_name}: {name}: {error}") from error
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise CheckpointError(
                f"{self._directory / file_name}: {name} is {tensor.dtype}; quantization is not served"
            )
        self._unread.discard(name)
        if out is None:
            return tensor.to(self._dtype)
        return out.copy_(tensor)

    def read_stacked(
        self, names: Sequence[str], shapes: Sequence[Sequence[int]], cuts: Sequence[Cut] | None = None
    ) -> torch.Tensor:
        """Several tensors, one below the other along their first dimension, without a second copy of any."""
        cuts = cuts or [()] * len(names)
        parts = [cut_shape(shape, cut) for shape, cut in zip(shapes, cuts, strict=True)]
        stacked = torch.empty((sum(part[0] for part in parts), *parts[0][1:]), dtype=self._dtype)
        begin = 0
        for name, shape, cut, part in zip(names, shapes, cuts, parts, strict=True):
            self.read(name, shape, stacked[begin : begin + part[0]], cut)
            begin += part[0]
        return stacked

    def finish(self) -> None:
        """Raises CheckpointError if a tensor was not read: the model would not be the one that was trained."""
        extra = sorted(name for name in self._unread if not name.endswith(_HARMLESS_SUFFIX))
        if extra:
            more = f" and {len(extra) - 5} more" if len(extra) > 5 else ""
            raise CheckpointError(
                f"{self._directory} has tensors that this model does not: {', '.join(extra[:5])}{more}"
            )
        self._files.clear()


def cut_shape(shape: Sequence[int], cut: Cut) -> tuple[int, ...]:
    """The shape of a `cut` of a tensor of `shape`."""
    lengths = [len(range(*part.indices(size))) for size, part in zip(shape, cut, strict=False)]
    return (*lengths, *shape[len(cut) :])


def _file_names(directory: Path) -> list[str]:
    index = directory / _INDEX
    if not index.exists():
        if not (directory / _SINGLE).exists():
            raise CheckpointError(f"{directory} has neither {_SINGLE} nor {_INDEX}; other formats are not read")
        return [_SINGLE]
    try:
        files: dict[str, str] = json.loads(index.read_text())["weight_map"]
        names = sorted(set(files.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"cannot read {index}: {error!r}") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{index} names {name!r}, which is no safetensors file in this directory")
    return names
