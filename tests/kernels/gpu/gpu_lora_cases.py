"""Random adapters in random pages for the accelerator's LoRA ops. What no adapter owns is NaN: a stray read shows."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field

import torch

from kernels import reference
from kernels.gpu.adapter_tables import GpuAdapterTables, LoraGroup

NUM_MODULES = 7
NUM_LAYERS = 3
LAYER = 1
POPULARITIES = ["distinct", "uniform", "zipf", "identical"]


@dataclass
class AdapterCase:
    """One adapter as plain float32 matrices: by module index, A `[rank, d_in]` and B transposed `[rank, d_out]`."""

    lora_a: dict[int, torch.Tensor] = field(default_factory=dict)
    lora_b: dict[int, torch.Tensor] = field(default_factory=dict)


@dataclass
class LoraCase:
    """Adapters for one group in layer `LAYER`, the pages `[num_pages, page_elems]` of which are `pages`."""

    group: LoraGroup
    pages: torch.Tensor
    tables: GpuAdapterTables
    adapters: list[AdapterCase]

    def max_total_rank(self) -> int:
        return max(sum(len(a) for a in adapter.lora_a.values()) for adapter in self.adapters)

    def max_rank(self) -> int:
        return max((len(a) for adapter in self.adapters for a in adapter.lora_a.values()), default=0)

    def deltas(self, x: torch.Tensor, slots: list[int]) -> torch.Tensor:
        """What the adapters add in float32, token by token: `[num_tokens, sum of out_features]`."""
        out = torch.zeros(len(slots), sum(self.group.out_features))
        rows = x.float().cpu()
        for token, module, columns, adapter in self._changes(slots):
            out[token, columns] = reference.lora(rows[token], adapter.lora_a[module], adapter.lora_b[module])
        return out

    def torch_result(self, x: torch.Tensor, y: torch.Tensor, slots: list[int]) -> torch.Tensor:
        """y plus the adapters by torch's own products, every step in x's type and on its device."""
        out = y.clone()
        for token, module, columns, adapter in self._changes(slots):
            lora_a, lora_b = (side[module].to(x) for side in (adapter.lora_a, adapter.lora_b))
            out[token : token + 1, columns] += (x[token : token + 1] @ lora_a.t()) @ lora_b
        return out

    def _changes(self, slots: list[int]) -> list[tuple[int, int, slice, AdapterCase]]:
        """Token, module, its columns of the output, and adapter, wherever one changes the other."""
        changes = []
        for token, slot in enumerate(slots):
            begin = 0
            for number, size in enumerate(self.group.out_features):
                module = self.group.first_module + number
                if slot >= 0 and module in self.adapters[slot].lora_a:
                    changes.append((token, module, slice(begin, begin + size), self.adapters[slot]))
                begin += size
        return changes


def random_case(
    rng: random.Random,
    group: LoraGroup,
    ranks: list[dict[int, int]],
    tile: int,
    page_tiles: int,
    dtype: torch.dtype,
    device: torch.device,
) -> LoraCase:
    """Places one adapter for each entry of `ranks` (module: rank, only modules of the group)."""
    packed = [_pack(rng, group, modules, tile, dtype) for modules in ranks]
    page_elems = tile * page_tiles
    pages_each = [math.ceil(len(flat) / page_elems) for flat, _, _ in packed]
    num_pages = sum(pages_each) + 3
    pages = torch.full((num_pages, page_elems), float("nan"), dtype=dtype)
    free = rng.sample(range(num_pages), num_pages)
    page_table = torch.full((len(ranks), max(pages_each) + 1), -(2**30), dtype=torch.int32)
    rank, a_tile, b_tile = torch.zeros(3, len(ranks), NUM_LAYERS, NUM_MODULES, dtype=torch.int32).unbind()
    for slot, (flat, places, _) in enumerate(packed):
        for i in range(pages_each[slot]):
            page, part = free.pop(), flat[i * page_elems : (i + 1) * page_elems]
            pages[page, : len(part)] = part
            page_table[slot, i] = page
        for module, (a_begin, b_begin) in places.items():
            rank[slot, LAYER, module] = ranks[slot][module]
            a_tile[slot, LAYER, module], b_tile[slot, LAYER, module] = a_begin, b_begin
    tensors = (tensor.to(device) for tensor in (page_table, rank, a_tile, b_tile))
    tables = GpuAdapterTables(*tensors, tile_elems=tile)
    return LoraCase(group, pages.to(device), tables, [matrices for _, _, matrices in packed])


def random_slots(rng: random.Random, num_adapters: int, batch: int, popularity: str) -> list[int]:
    """A slot for each token, some of them -1."""
    if popularity == "distinct":
        slots = [i % num_adapters for i in range(batch)]
    elif popularity == "uniform":
        slots = [rng.randrange(num_adapters) for _ in range(batch)]
    elif popularity == "zipf":
        slots = rng.choices(range(num_adapters), [1 / (1 + i) for i in range(num_adapters)], k=batch)
    else:
        slots = [rng.randrange(num_adapters)] * batch
    return [-1 if rng.random() < 0.2 else slot for slot in slots]


def random_ranks(rng: random.Random, group: LoraGroup, choices: list[int]) -> dict[int, int]:
    """A random subset of the group's modules, with a rank for each; none is legal."""
    modules = range(group.first_module, group.first_module + group.num_modules)
    return {module: rng.choice(choices) for module in modules if rng.random() < 0.75}


def assert_as_good_as_torch(case: LoraCase, x: torch.Tensor, y: torch.Tensor, slots: list[int], out: torch.Tensor):
    """out is y plus the adapters: no further from float32 than twice torch's own, and other tokens' bits are kept."""
    tokens = [token for token, slot in enumerate(slots) if slot >= 0]
    others = [token for token, slot in enumerate(slots) if slot < 0]
    assert torch.equal(bits(out)[others], bits(y)[others]), "a token without adapter changed"
    exact = (y.float().cpu() + case.deltas(x, slots))[tokens]
    own = (out.float().cpu()[tokens] - exact).abs()
    theirs = (case.torch_result(x, y, slots).float().cpu()[tokens] - exact).abs()
    scale = exact.abs().max() if tokens else torch.tensor(0.0)
    tiny = scale * torch.finfo(torch.float32).eps * 64
    if tokens:
        assert own.norm() <= 2 * theirs.norm() + tiny * own.numel() ** 0.5
        assert own.max() <= 2 * theirs.max() + tiny + (torch.finfo(x.dtype).eps * scale if x.dtype.itemsize == 2 else 0)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int16 if tensor.dtype.itemsize == 2 else torch.int32)


def poisoned(shape: tuple[int, ...], slots: list[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Random numbers; NaN in rows without an adapter, which nothing may touch."""
    y = torch.randn(shape).to(dtype)
    y[torch.tensor(slots) < 0] = float("nan")
    return y.to(device)


def _pack(
    rng: random.Random, group: LoraGroup, ranks: dict[int, int], tile: int, dtype: torch.dtype
) -> tuple[torch.Tensor, dict[int, tuple[int, int]], AdapterCase]:
    """One adapter's layer as an array, where its modules begin (in tiles), and its matrices.

    Before the group's A and between A and B lie other groups' rows, which nobody here owns: NaN.
    """
    matrices, places = AdapterCase(), {module: [0, 0] for module in ranks}
    parts: list[torch.Tensor] = [torch.zeros(0, dtype=dtype)]
    sizes = {group.first_module + number: size for number, size in enumerate(group.out_features)}
    for side in (0, 1):
        parts.append(torch.full((tile * rng.randint(0, 5),), float("nan"), dtype=dtype))
        for module, rank in sorted(ranks.items()):
            size = sizes[module] if side else group.in_features
            rows = (torch.randn(rank, size) * (rank**-0.5 if side else size**-0.5)).to(dtype)
            (matrices.lora_b if side else matrices.lora_a)[module] = rows.float()
            places[module][side] = sum(map(len, parts)) // tile
            parts.append(rows.flatten())
    return torch.cat(parts), {module: (a, b) for module, (a, b) in places.items()}, matrices
