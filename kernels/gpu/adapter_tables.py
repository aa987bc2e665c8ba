"""Where the rows of resident adapters lie in the pool, and how a kernel finds them.

An adapter's layer is an array of elements cut into pages by its page table. For the accelerator every adapter of a
base model is packed in tiles of the same `tile_elems`, and every row is whole tiles, so rows, offsets and pages are
all counted in tiles. Modules that share their input form a *group* (q k v; gate up; o and down alone), packed one
right after the other: the rows of A of a group are one run of rows of `in_features` elements, the rows of B transposed
of each module one run of rows of its `out_features`. In rank space the ranks of a group's modules lie end to end. Where
the rank space of a group is split over processes (kernels.lora_plan), the run holds a part of the rows of A.

What does not change in a model (strides, sizes, blocks) is compiled into kernels, and looked up once for all layers: a
step launches a kernel or two for every group of every layer, and the host's time for each counts.

Source: S-LoRA sections 5 and 6 (arXiv 2311.03285).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

MAX_RANK = 256
MAX_GROUP_MODULES = 3
# Decoded tokens' work is cut differently where no adapter of a step has a larger rank on any module: with larger ranks
# how long a kernel takes is decided by its longest programs, with these by how many it has.
FEW_RANKS = 16


class TableLayout(NamedTuple):
    """How the tables of a model are laid out: the same for all its steps, and for every kernel over its adapters."""

    device: torch.device
    tile_elems: int
    # From one adapter to the next; and in the tables of rank and tiles from one layer to the next.
    page_table_stride: int
    table_stride: int
    layer_stride: int

    def constants(self, group: LoraGroup, page_elems: int) -> dict[str, Any]:
        """What every kernel over the group is compiled for."""
        return {
            "NUM_MODULES": group.num_modules,
            "TILE": self.tile_elems,
            "PAGE_TILES": page_elems // self.tile_elems,
            "TABLE_STRIDE": self.table_stride,
            "PAGE_TABLE_STRIDE": self.page_table_stride,
        }


class Launch(NamedTuple):
    """What the launches of a kernel have in common in all layers: its programs, and what it is compiled for."""

    grid: tuple[int, int]
    constants: dict[str, Any]


@dataclass(frozen=True)
class GpuAdapterTables:
    """What the device knows of resident adapters, by adapter slot. All tensors are int32 and contiguous.

    Modules are 0..6 = q k v o gate up down. A rank of 0 is a module left alone; its offsets mean nothing.
    """

    # [max_adapters, max_adapter_pages]
    page_table: torch.Tensor
    # [max_adapters, num_layers, num_modules] each; offsets from the layer's start, in tiles.
    rank: torch.Tensor
    lora_a_tile: torch.Tensor
    lora_b_tile: torch.Tensor
    # Of every adapter: a power of two, at least 16, that divides pages and rows.
    tile_elems: int

    @functools.cached_property
    def layout(self) -> TableLayout:
        """The tables' strides, looked up once."""
        _, num_layers, num_modules = self.rank.shape
        strides = self.page_table.stride(0), num_layers * num_modules, num_modules
        return TableLayout(self.rank.device, self.tile_elems, *strides)


@dataclass(frozen=True, slots=True)
class LoraGroup:
    """Consecutive modules that share their input; their outputs lie end to end in the base's output."""

    first_module: int
    in_features: int
    # One for each of the group's 1 to 3 modules.
    out_features: tuple[int, ...]
    # Over how many processes the group's rank space is split.
    rank_parts: int = 1

    @property
    def num_modules(self) -> int:
        """How many modules the group has."""
        return len(self.out_features)

    def out_tiles(self, tile_elems: int) -> tuple[int, int, int]:
        """The width of each module's rows of B in tiles, 0 for those beyond the group's."""
        widths = [size // tile_elems for size in self.out_features]
        q, k, v = widths + [0] * (MAX_GROUP_MODULES - len(widths))
        return q, k, v

    def out_constants(self, tile_elems: int) -> dict[str, Any]:
        """`out_tiles` as what kernels are compiled for."""
        return {f"TILES_{module}": width for module, width in enumerate(self.out_tiles(tile_elems))}

    def num_out_blocks(self, tile_elems: int, block_tiles: int) -> int:
        """Blocks of at most `block_tiles` tiles of the output, each within one module."""
        return sum(-(-width // block_tiles) for width in self.out_tiles(tile_elems))


@triton.jit
def group_rows(rank_ptr, tile_ptr, entry, NUM_MODULES: tl.constexpr, RANK_PARTS: tl.constexpr):
    """How many rows of A of the group are held, and the first tile of their run, for the entry of its first module."""
    total = tl.load(rank_ptr + entry)
    first = tl.load(tile_ptr + entry)
    for module in tl.static_range(1, NUM_MODULES):
        tile = tl.load(tile_ptr + entry + module)
        rank = tl.load(rank_ptr + entry + module)
        # The run begins where the first module that the adapter has begins.
        first = tl.where(total > 0, first, tile)
        total += rank
    if RANK_PARTS > 1:
        total = tl.cdiv(total, RANK_PARTS)
    return total, first


@triton.jit
def output_block(
    block, TILES_0: tl.constexpr, TILES_1: tl.constexpr, TILES_2: tl.constexpr,
    NUM_MODULES: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Which module the block-th block of the output belongs to, and where it lies.

    Returns (module, width of its rows in tiles, tile of y where they begin, the block's first tile in the row).
    """
    module = block * 0
    width = module + TILES_0
    column = module
    place = block * BLOCK_T
    if NUM_MODULES > 1:
        end = tl.cdiv(TILES_0, BLOCK_T)
        beyond = block >= end
        module = tl.where(beyond, 1, module)
        width = tl.where(beyond, TILES_1, width)
        column = tl.where(beyond, TILES_0, column)
        place = tl.where(beyond, (block - end) * BLOCK_T, place)
        if NUM_MODULES > 2:
            end += tl.cdiv(TILES_1, BLOCK_T)
            beyond = block >= end
            module = tl.where(beyond, 2, module)
            width = tl.where(beyond, TILES_2, width)
            column = tl.where(beyond, TILES_0 + TILES_1, column)
            place = tl.where(beyond, (block - end) * BLOCK_T, place)
    return module, width, column, place


@triton.jit
def module_rows(rank_ptr, tile_ptr, entry, module, NUM_MODULES: tl.constexpr):
    """A module's rank, where its ranks begin in the group's rank space, and the first tile of its rows."""
    tile = tl.load(tile_ptr + entry + module)
    rank = tl.load(rank_ptr + entry + module)
    start = rank * 0
    # Loaded side by side, not one after the other: none waits for another's value.
    for other in tl.static_range(0, NUM_MODULES - 1):
        start += tl.where(module > other, tl.load(rank_ptr + entry + other), 0)
    return rank, start, tile


@triton.jit
def token_rows(
    rank_ptr, tile_ptr, slot, table_offset, module, TABLE_STRIDE: tl.constexpr, NUM_MODULES: tl.constexpr
):  # fmt: skip
    """`module_rows` of a token's adapter; where it has none (slot -1), no rows: what else there is to do is done."""
    entry = tl.maximum(slot, 0) * TABLE_STRIDE + table_offset
    rank, start, tile = module_rows(rank_ptr, tile_ptr, entry, module, NUM_MODULES)
    return tl.where(slot < 0, 0, rank), start, tile


@triton.jit
def load_pages(page_table_ptr, tile, mask, PAGE_TILES: tl.constexpr):
    """The page in which each of an adapter's tiles lies."""
    # Unsigned: a division by a power of two is one shift.
    return tl.load(page_table_ptr + tile.to(tl.uint32) // PAGE_TILES, mask=mask, other=0)


@triton.jit
def load_tiles(pages_ptr, page, tile, mask, PAGE_TILES: tl.constexpr, TILE: tl.constexpr):
    """Tiles `[m, n]` of known pages as elements `[m, n, TILE]`, zero where masked.

    Threads and warps are laid along TILE, then along n; m is left to each thread, so sums over m need no exchange.
    """
    # The pool of a layer may have more than 2^31 elements, a page has not: the sum of both takes one instruction.
    offset = (tile.to(tl.uint32) % PAGE_TILES) * TILE
    pointers = (pages_ptr + page.to(tl.int64) * (PAGE_TILES * TILE))[:, :, None]
    pointers += offset[:, :, None] + tl.arange(0, TILE)[None, None, :]
    # Said only to order the dimensions for the compiler, which otherwise takes m before n or n before m as it pleases
    # (it differs by version); vectors are along TILE whatever is said of n.
    pointers = tl.max_contiguous(pointers, (1, 2, TILE))
    # Read once, or by neighbours at the same time: first to leave the cache, so that activations stay. 128 tokens with
    # as many adapters, 32 layers of Llama-7B's attention on one H200: 0.696 ms at rank 8 and 2.075 with ranks 64 to 8,
    # else 0.775 and 2.207.
    return tl.load(pointers, mask=mask[:, :, None], other=0.0, eviction_policy="evict_first")
