"""Weights made up instead of read: a model of some shape without its checkpoint, to size a machine or to measure."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from services.engine.model.checkpoint import Cut

NAME_PREFIX = "random-weights"
"""A base model with such weights is served only under a name that begins so: nobody takes its answers for a model's."""


class RandomWeights:
    """`Weights` of the right shapes, scaled so that activations stay near one; the same for each run on a device."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self._generator = torch.Generator(device).manual_seed(0)

    def __contains__(self, name: str) -> bool:
        # A tied head shares the embedding; a second one would differ from it.
        return name != "lm_head.weight"

    def read(self, name: str, shape: Sequence[int]) -> torch.Tensor:
        """Ones for a norm, zeros for a bias, else normally distributed."""
        if len(shape) == 1:
            fill = torch.zeros if name.endswith(".bias") else torch.ones
            return fill(tuple(shape), dtype=self._dtype, device=self._device)
        weight = torch.empty(tuple(shape), dtype=self._dtype, device=self._device)
        return weight.normal_(0.0, shape[-1] ** -0.5, generator=self._generator)

    def read_stacked(
        self, names: Sequence[str], shapes: Sequence[Sequence[int]], cuts: Sequence[Cut] | None = None
    ) -> torch.Tensor:
        """As one tensor of so many rows, of which cuts are taken: every process draws the same model."""
        whole = self.read(names[0], (sum(shape[0] for shape in shapes), *shapes[0][1:]))
        if cuts is None:
            return whole
        parts = zip(whole.split([shape[0] for shape in shapes]), cuts, strict=True)
        kept = [part[cut] for part, cut in parts]
        return whole if sum(map(torch.numel, kept)) == whole.numel() else torch.cat(kept)

    def finish(self) -> None:
        """Nothing is left over."""
