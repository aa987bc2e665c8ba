"""Random adapters in random pages, for the LoRA ops' tests. What no adapter owns is NaN: a stray read shows."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field

import torch

from kernels.lora_plan import AdapterTables, ModuleGroup


@dataclass
class AdapterCase:
    """One adapter as plain matrices: by module index, A `[rank, d_in]` and B transposed `[rank, d_out]`."""

    lora_a: dict[int, torch.Tensor] = field(default_factory=dict)
    lora_b: dict[int, torch.Tensor] = field(default_factory=dict)


@dataclass
class LoraCase:
    """Adapters in a pool of one layer: pages `[num_pages, page_elems]`, their tables, and the plain matrices."""

    group: ModuleGroup
    pages: torch.Tensor
    tables: AdapterTables
    adapters: list[AdapterCase]
    tile_elems: int

    @property
    def tiles(self) -> torch.Tensor:
        return self.pages.view(len(self.pages), -1, self.tile_elems)


def random_case(
    rng: random.Random,
    group: ModuleGroup,
    ranks: list[dict[int, int]],
    tiles: list[int],
    page_elems: int,
    dtype: torch.dtype,
) -> LoraCase:
    """Places one adapter for each entry of `ranks` (module: rank), packed in its entry of `tiles`."""
    num_modules = max(group.modules) + 1
    sizes = dict(zip(group.modules, group.out_features, strict=True))
    packed = [_pack(rng, group.in_features, sizes, modules, tile) for modules, tile in zip(ranks, tiles, strict=True)]
    pages_each = [math.ceil(len(flat) / page_elems) for flat, _, _ in packed]
    num_pages = sum(pages_each) + 3
    pages = torch.full((num_pages, page_elems), float("nan"), dtype=dtype)
    free = rng.sample(range(num_pages), num_pages)
    tables = AdapterTables(
        page_table=torch.zeros(len(ranks), max(pages_each), dtype=torch.int64),
        tile_elems=torch.tensor(tiles),
        rank=torch.zeros(len(ranks), 1, num_modules, dtype=torch.int64),
        lora_a_offset=torch.zeros(len(ranks), 1, num_modules, dtype=torch.int64),
        lora_b_offset=torch.zeros(len(ranks), 1, num_modules, dtype=torch.int64),
    )
    adapters = []
    for slot, (flat, places, matrices) in enumerate(packed):
        for i in range(pages_each[slot]):
            page, part = free.pop(), flat[i * page_elems : (i + 1) * page_elems]
            pages[page, : len(part)] = part.to(dtype)
            tables.page_table[slot, i] = page
        for module, (a_offset, b_offset) in places.items():
            tables.rank[slot, 0, module] = ranks[slot][module]
            tables.lora_a_offset[slot, 0, module] = a_offset
            tables.lora_b_offset[slot, 0, module] = b_offset
        for part in (matrices.lora_a, matrices.lora_b):
            part.update({module: matrix.to(dtype) for module, matrix in part.items()})
        adapters.append(matrices)
    return LoraCase(group, pages, tables, adapters, min(tiles))


def _pack(
    rng: random.Random, in_features: int, sizes: dict[int, int], ranks: dict[int, int], tile: int
) -> tuple[torch.Tensor, dict[int, tuple[int, int]], AdapterCase]:
    """One adapter's layer as an array: its matrices in a random order, rows padded to tiles, gaps of NaN between."""
    matrices, places = AdapterCase(), {module: [0, 0] for module in ranks}
    pieces = [(module, side) for module in ranks for side in (0, 1)]
    rng.shuffle(pieces)
    parts, offset = [torch.zeros(0)], 0
    for module, side in pieces:
        size = sizes[module] if side else in_features
        width = math.ceil(size / tile) * tile
        rows = torch.zeros(ranks[module], width)
        rows[:, :size] = torch.randn(ranks[module], size) * (1.0 if side else size**-0.5)
        (matrices.lora_b if side else matrices.lora_a)[module] = rows[:, :size].clone()
        gap = tile * rng.randint(0, 2)
        places[module][side] = offset + gap
        parts += [torch.full((gap,), float("nan")), rows.flatten()]
        offset += gap + rows.numel()
    return torch.cat(parts), {module: (a, b) for module, (a, b) in places.items()}, matrices
