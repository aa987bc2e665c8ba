"""Where the rows of a batch's adapters lie in the pool: worked out once a step, used by shrink and expand.

An adapter's layer is an array of elements cut into pages by its page table. A module's rank rows of A (d_in elements
each) and of B transposed (d_out each) begin at offsets of that array; a row is padded to whole *tiles*, and a tile
never straddles a page. So the pool of a layer is a matrix of tiles `[num_tiles, tile_elems]`, and everything here is
numbers of such rows. They hold for every layer in which an adapter has the same ranks and offsets.

Modules that share their input form a *group* (q k v; gate up) and are planned together: their ranks lie end to end in
rank space, their outputs side by side in the output.

Tokens come in two kinds. *Rows*: tokens `[0, num_rows)` read their adapters' rows one by one (few tokens an adapter:
decode; BGMV in Punica, MBGMV in S-LoRA). *Segments*: runs of tokens of one adapter gather its rows once and multiply
(many tokens an adapter: prefill; SGMV, MBGMM). Ranks are padded nowhere.

Where the rank space of a group is split over N processes, each holds `ceil(R / N)` of an adapter's R rows of A in the
group, the last ones zeros if N does not divide R, and all rows of B, with the columns of its own outputs. Shrink then
gives a part, kernels.lora_join puts the parts together.

Source: S-LoRA section 6 (arXiv 2311.03285), Punica (arXiv 2310.18547).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kernels.ragged import ragged_arange
from kernels.sparse import empty_pattern


@dataclass(frozen=True, slots=True)
class AdapterTables:
    """What the device knows of resident adapters, by adapter slot. All int64."""

    # [max_adapters, max_adapter_pages]
    page_table: torch.Tensor
    # [max_adapters]
    tile_elems: torch.Tensor
    # [max_adapters, num_layers, num_modules]; rank 0 where an adapter leaves a module alone, offsets in elements.
    rank: torch.Tensor
    lora_a_offset: torch.Tensor
    lora_b_offset: torch.Tensor


@dataclass(frozen=True, slots=True)
class ModuleGroup:
    """Modules that share their input. `modules` index AdapterTables; outputs lie end to end in the base's output.

    rank_parts: over how many processes the group's rank space is split. If over several, the rows of A that are held
    here are one run, which begins at the lora_a_offset that all modules of an adapter have in common.
    """

    modules: tuple[int, ...]
    in_features: int
    out_features: tuple[int, ...]
    rank_parts: int = 1


@dataclass(frozen=True, slots=True)
class OutputSlice:
    """Columns `[begin, begin + size)` of the base's output are tiles from `first_tile` on of a bag's output."""

    begin: int
    size: int
    first_tile: int


@dataclass(frozen=True, slots=True)
class RowsPlan:
    """Tokens `[0, num_tokens)`, each with its own adapter's rows (none for a token without an adapter)."""

    num_tokens: int
    tile_elems: int
    num_in_tiles: int
    # [num_in_tiles, num_rows]: tiles of the rows of A that are held; owner [num_rows]: the token a row is for.
    a_tiles: torch.Tensor
    owner: torch.Tensor
    # [total_rank]: where each rank lies among the parts of all processes; empty where the rank space is not split.
    places: torch.Tensor
    # The rows of A as a sparsity pattern [num_in_tiles * num_tokens, num_tiles]; None where it is not used.
    pattern: torch.Tensor | None
    # A bag for each token and tile of the output, [num_tokens * num_out_tiles] starts; entries [num_entries]: a tile of
    # B's rows and the place in rank space that weights it.
    bag_starts: torch.Tensor
    b_tiles: torch.Tensor
    b_ranks: torch.Tensor
    slices: tuple[OutputSlice, ...]


@dataclass(frozen=True, slots=True)
class SegmentPlan:
    """Tokens `[begin, end)` of one adapter of total rank `rank` over the group's modules; num_rows of A are held."""

    begin: int
    end: int
    rank: int
    num_rows: int
    # [num_rows * num_in_tiles]: tiles of A, row after row.
    a_tiles: torch.Tensor
    # For each module that the adapter changes.
    outputs: tuple[SegmentOutput, ...]


@dataclass(frozen=True, slots=True)
class SegmentOutput:
    """Ranks `[rank_begin, rank_end)` of a segment give columns `[begin, begin + size)` of the output."""

    rank_begin: int
    rank_end: int
    begin: int
    size: int
    # [(rank_end - rank_begin) * tiles of a row]: tiles of B, row after row.
    b_tiles: torch.Tensor


@dataclass(frozen=True, slots=True)
class LoraPlan:
    """One group's plan: what lora_shrink and lora_expand need. At least one of rows and segments is there."""

    tile_elems: int
    in_features: int
    rows: RowsPlan | None
    segments: tuple[SegmentPlan, ...]


@dataclass(frozen=True, slots=True)
class _RowsOfA:
    """The rows of A that are held, owner after owner."""

    # [num_owners], and where each owner's begin ([num_owners + 1]).
    counts: torch.Tensor
    starts: torch.Tensor
    # [num_rows]
    owner: torch.Tensor
    # [num_in_tiles, num_rows]
    tiles: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Lists:
    """Rows of A and B for a list of owners (tokens or segments), each with one adapter."""

    # [num_owners, num_modules] ranks, and where each begins in rank space ([num_owners * num_modules + 1]).
    ranks: torch.Tensor
    rank_starts: torch.Tensor
    a: _RowsOfA
    # [num_owners * num_out_tiles + 1]; [num_entries] twice.
    bag_starts: torch.Tensor
    b_tiles: torch.Tensor
    b_ranks: torch.Tensor


def plan_rows(
    tables: AdapterTables, layer: int, group: ModuleGroup, slots: Sequence[int], tiles: torch.Tensor
) -> RowsPlan | None:
    """Plans one group in one layer for tokens `[0, len(slots))`, each with the adapter at its slot.

    None where no adapter changes the group. tiles: any layer's pool `[num_pages, tiles a page, tile_elems]`, tile_elems
    at most that of any adapter of the batch.
    """
    narrowed = _narrow(tables, layer, group, slots, tiles.shape[2])
    if narrowed is None:
        return None
    group, slices = narrowed
    lists = _list_rows(tables, layer, group, slots, tiles)
    num_in_tiles = lists.a.tiles.shape[0]
    pattern = None
    if tiles.device.type == "cpu" and tiles.dtype == torch.float32:
        starts, _, _ = ragged_arange(lists.a.counts.repeat(num_in_tiles))
        pattern = empty_pattern(starts, lists.a.tiles.flatten(), tiles.shape[0] * tiles.shape[1])
    return RowsPlan(
        num_tokens=len(slots),
        tile_elems=tiles.shape[2],
        num_in_tiles=num_in_tiles,
        a_tiles=lists.a.tiles,
        owner=lists.a.owner,
        places=_places(lists) if group.rank_parts > 1 else lists.a.owner[:0],
        pattern=pattern,
        bag_starts=lists.bag_starts,
        b_tiles=lists.b_tiles,
        b_ranks=lists.b_ranks,
        slices=_merge(slices, tiles.shape[2]),
    )


def plan_segments(
    tables: AdapterTables,
    layer: int,
    group: ModuleGroup,
    segments: Sequence[tuple[int, int, int]],
    tiles: torch.Tensor,
) -> tuple[SegmentPlan, ...]:
    """Plans one group in one layer for the runs of tokens `segments` `(begin, end, slot)`; as `plan_rows`."""
    slots = [slot for _, _, slot in segments]
    narrowed = _narrow(tables, layer, group, slots, tiles.shape[2])
    if narrowed is None:
        return ()
    group, slices = narrowed
    return _cut_segments(_list_rows(tables, layer, group, slots, tiles), segments, slices, tiles.shape[2])


def _narrow(
    tables: AdapterTables, layer: int, group: ModuleGroup, slots: Sequence[int], tile_elems: int
) -> tuple[ModuleGroup, list[OutputSlice]] | None:
    """The part of `group` that some adapter at `slots` changes, and where its outputs lie; None if there is none."""
    present = (tables.rank[slots, layer][:, list(group.modules)] > 0).any(0)
    used = [i for i, keep in enumerate(present.tolist()) if keep]
    if not used:
        return None
    begins = list(itertools.accumulate(group.out_features, initial=0))
    slices, first_tile = [], 0
    for i in used:
        slices.append(OutputSlice(begins[i], group.out_features[i], first_tile))
        first_tile += -(-group.out_features[i] // tile_elems)
    modules = tuple(group.modules[i] for i in used)
    out_features = tuple(group.out_features[i] for i in used)
    return ModuleGroup(modules, group.in_features, out_features, group.rank_parts), slices


def _list_rows(
    tables: AdapterTables, layer: int, group: ModuleGroup, owner_slots: Sequence[int], tiles: torch.Tensor
) -> _Lists:
    """The rows of every owner's adapter."""
    device = tables.rank.device
    slots = torch.tensor(owner_slots, device=device)
    _, page_tiles, tile_elems = tiles.shape
    modules = list(group.modules)
    ranks = tables.rank[slots, layer][:, modules]
    a_offset = tables.lora_a_offset[slots, layer][:, modules]
    b_offset = tables.lora_b_offset[slots, layer][:, modules].flatten()
    # An adapter may be packed in larger tiles than the batch's: its rows are padded to its own.
    own_tile = tables.tile_elems[slots].unsqueeze(1)
    out_features = torch.tensor(group.out_features, device=device)
    a_stride = -(-group.in_features // own_tile) * own_tile
    b_stride = (-(-out_features // own_tile) * own_tile).flatten()

    def locate(owner: torch.Tensor, element: torch.Tensor) -> torch.Tensor:
        tile = element // tile_elems
        return tables.page_table[slots[owner], tile // page_tiles] * page_tiles + tile % page_tiles

    # Runs of rows of A: one a module, or, where the rank space is split, one for all of an owner's.
    rank_starts, run, row = ragged_arange(ranks.flatten())
    starts, run_rows = rank_starts[:: len(modules)], ranks
    if group.rank_parts > 1:
        run_rows = -(-ranks.sum(1, keepdim=True) // group.rank_parts)
        a_offset = (a_offset * (ranks > 0)).amax(1, keepdim=True)
        starts, run, row = ragged_arange(run_rows.flatten())
    owner = run // run_rows.shape[1]
    in_tiles = torch.arange(-(-group.in_features // tile_elems), device=device).unsqueeze(1)
    a_tiles = locate(owner, a_offset.flatten()[run] + row * a_stride.flatten()[owner] + in_tiles * tile_elems)

    module_tiles = -(-out_features // tile_elems)
    _, tile_module, tile_place = ragged_arange(module_tiles)
    bag_starts, bag, row = ragged_arange(ranks[:, tile_module].flatten())
    bag_owner, bag_tile = bag // tile_module.numel(), bag % tile_module.numel()
    pair = bag_owner * len(modules) + tile_module[bag_tile]
    b_tiles = locate(bag_owner, b_offset[pair] + row * b_stride[pair] + tile_place[bag_tile] * tile_elems)
    rows_of_a = _RowsOfA(run_rows.sum(1), starts, owner, a_tiles)
    return _Lists(ranks, rank_starts, rows_of_a, bag_starts, b_tiles, rank_starts[pair] + row)


def _places(lists: _Lists) -> torch.Tensor:
    """Of every rank of every owner, its place among the processes' parts, which lie one behind the other."""
    counts, starts = lists.a.counts, lists.a.starts
    _, owner, rank = ragged_arange(lists.ranks.sum(1))
    return rank // counts[owner] * lists.a.owner.numel() + starts[owner] + rank % counts[owner]


def _merge(slices: Sequence[OutputSlice], tile_elems: int) -> tuple[OutputSlice, ...]:
    """Joins slices that follow each other in the output and in the bags: they are added in one go."""
    merged: list[OutputSlice] = []
    for part in slices:
        before = merged[-1] if merged else None
        if (
            before is not None
            and before.begin + before.size == part.begin
            and before.first_tile * tile_elems + before.size == part.first_tile * tile_elems
        ):
            merged[-1] = OutputSlice(before.begin, before.size + part.size, before.first_tile)
        else:
            merged.append(part)
    return tuple(merged)


def _cut_segments(
    lists: _Lists, segments: Sequence[tuple[int, int, int]], slices: Sequence[OutputSlice], tile_elems: int
) -> tuple[SegmentPlan, ...]:
    num_modules = len(slices)
    num_out_tiles = (lists.bag_starts.numel() - 1) // len(segments)
    ranks, rank_starts, bag_starts = lists.ranks.tolist(), lists.rank_starts.tolist(), lists.bag_starts.tolist()
    row_starts = lists.a.starts.tolist()
    planned = []
    for i, (begin, end, _) in enumerate(segments):
        first, last = rank_starts[i * num_modules], rank_starts[(i + 1) * num_modules]
        if first == last:
            continue
        outputs = []
        for m, part in enumerate(slices):
            rank = ranks[i][m]
            if rank == 0:
                continue
            row_tiles = -(-part.size // tile_elems)
            entry = bag_starts[i * num_out_tiles + part.first_tile]
            by_tile = lists.b_tiles[entry : entry + rank * row_tiles].view(row_tiles, rank)
            rank_begin = rank_starts[i * num_modules + m] - first
            outputs.append(SegmentOutput(rank_begin, rank_begin + rank, part.begin, part.size, by_tile.t().flatten()))
        a_tiles = lists.a.tiles[:, row_starts[i] : row_starts[i + 1]].t().flatten()
        num_rows = row_starts[i + 1] - row_starts[i]
        planned.append(SegmentPlan(begin, end, last - first, num_rows, a_tiles, tuple(outputs)))
    return tuple(planned)
