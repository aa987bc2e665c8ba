"""How an adapter's packed weights are laid out: the engine's own view of the store's manifest (no protos here).

The packed array is `[num_layers, layer_elems]`. In each layer a module has `rank` rows of A (d_in elements each) and
`rank` rows of B transposed (d_out each, scaling folded in); a row is padded to a multiple of `tile_elems`. Cut at
multiples of the pool's page_elems, column block p of the array becomes page p of the adapter in every layer at once.
S-LoRA section 5 (Unified Paging).

A process of several has a *shard*, laid out the same way, and alike in all processes: of a group of modules that share
their input (q k v; gate up) it holds `ceil(R / tp_size)` of the group's R rows of A, one run at the offset that the
modules have in common; of o and down all rows of A, with its own inputs; of all modules all rows of B, with its own
outputs. Features are then those of the shard, ranks the adapter's. S-LoRA section 6.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

MAX_RANK = 256
"""Of a module. Kernels and their scratch memory are made for it."""


class PackedShard(NamedTuple):
    """What packed weights are asked for by: the adapter's digest, and which of how many shards (0 of 1: the whole)."""

    digest: str
    tp_rank: int = 0
    tp_size: int = 1


class TargetModule(enum.IntEnum):
    """Linear layers that an adapter may change, in the fixed order of packing; the value indexes device tables."""

    Q = 0
    K = 1
    V = 2
    O = 3  # noqa: E741
    GATE = 4
    UP = 5
    DOWN = 6


INPUT_GROUPS: tuple[tuple[TargetModule, ...], ...] = (
    (TargetModule.Q, TargetModule.K, TargetModule.V),
    (TargetModule.GATE, TargetModule.UP),
)
"""Modules that share their input and are split by output: in a shard, their rows of A are one run."""


@dataclass(frozen=True, slots=True)
class ModulePlacement:
    """One module's rows in one layer. Offsets are elements from the layer's start, multiples of tile_elems."""

    module: TargetModule
    rank: int
    in_features: int
    out_features: int
    lora_a_offset: int
    lora_b_offset: int


@dataclass(frozen=True, slots=True)
class AdapterLayout:
    """Where everything lies in an adapter's packed array. `dtype` is float32, float16 or bfloat16."""

    digest: str
    dtype: str
    tile_elems: int
    num_layers: int
    layer_elems: int
    layers: tuple[tuple[ModulePlacement, ...], ...]
    tp_rank: int = 0
    tp_size: int = 1

    def num_pages(self, page_elems: int) -> int:
        """Pages that the adapter takes; at most the last one is partly filled."""
        return -(-self.layer_elems // page_elems)

    def runs(self) -> Iterator[LayerRun]:
        """Runs of layers that are laid out alike, in order; mostly a single one. All that looks at rows looks here."""
        begin = 0
        for end in range(1, len(self.layers) + 1):
            if end == len(self.layers) or self.layers[end] != self.layers[begin]:
                yield LayerRun(begin, end, self.layers[begin])
                begin = end


@dataclass(frozen=True, slots=True)
class LayerRun:
    """Layers from `begin` to before `end`, each with these placements."""

    begin: int
    end: int
    placements: tuple[ModulePlacement, ...]
