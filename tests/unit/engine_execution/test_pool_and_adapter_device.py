"""Adapters in the pool: what is copied where, what the tables say, and what is refused."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import numpy as np
import pytest
import torch

from kernels.lora_plan import ModuleGroup
from services.common.errors import Reason, SloraError
from services.engine.adapters.layout import AdapterLayout, ModulePlacement, TargetModule
from services.engine.config import PoolConfig
from services.engine.execution.adapter_device import PagedAdapterDevice
from services.engine.memory.pool import Pool
from tests.fixtures.installing import install

CONFIG = PoolConfig(num_layers=3, num_pages=9, tokens_per_page=4, num_kv_heads=2, head_dim=8)  # pages of 128
GROUPS = (ModuleGroup((0, 1, 2), 32, (32, 16, 16)), ModuleGroup((6,), 48, (32,)))


def make_device(dtype: torch.dtype = torch.float32, max_adapters: int = 4) -> tuple[Pool, PagedAdapterDevice]:
    pool = Pool(CONFIG, dtype, torch.device("cpu"))
    return pool, PagedAdapterDevice(pool, GROUPS, max_adapters)


def make_layout(**changes: Any) -> AdapterLayout:
    q = ModulePlacement(TargetModule.Q, 2, 32, 32, 0, 64)
    down = ModulePlacement(TargetModule.DOWN, 1, 48, 32, 128, 176)
    fields = AdapterLayout("sha256:1", "float32", 16, 3, 208, ((q, down), (), (q,)))
    return dataclasses.replace(fields, **changes)


def packed(layout: AdapterLayout) -> tuple[torch.Tensor, memoryview]:
    array = torch.randn(layout.num_layers, layout.layer_elems)
    return array, memoryview(array.numpy().tobytes())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_land_in_their_pages_and_nowhere_else(dtype: torch.dtype) -> None:
    pool, device = make_device(dtype)
    pool.tensor.fill_(7.0)
    layout = make_layout(dtype=str(dtype).removeprefix("torch."))
    array = torch.randn(3, 208).to(dtype)
    device.check(layout)
    install(device, 2, layout, [5, 3], memoryview(array.view(torch.uint8).numpy().tobytes()))
    expected = torch.full_like(pool.tensor, 7.0)
    expected[:, 5] = array[:, :128]
    expected[:, 3, :80] = array[:, 128:]
    assert torch.equal(pool.tensor, expected)


def test_tables() -> None:
    _, device = make_device()
    layout = make_layout()
    install(device, 2, layout, [5, 3], packed(layout)[1])
    tables = device.tables
    assert tables.page_table[2, :2].tolist() == [5, 3]
    assert tables.rank[2].tolist() == [[2, 0, 0, 0, 0, 0, 1], [0] * 7, [2, 0, 0, 0, 0, 0, 0]]
    assert (tables.lora_a_offset[2, 0, 6], tables.lora_b_offset[2, 0, 6]) == (128, 176)
    assert tables.tile_elems[2] == 16
    assert device.layers_alike(2) == (0, 1, 2)
    same = make_layout(layers=(layout.layers[0], layout.layers[0], layout.layers[2]))
    install(device, 0, same, [1, 2], packed(same)[1])
    assert device.layers_alike(0) == (0, 0, 2)


def test_slots_are_taken_once_and_forgotten() -> None:
    _, device = make_device()
    layout = make_layout()
    install(device, 1, layout, [0, 1], packed(layout)[1])
    before = device.generations([1])
    with pytest.raises(ValueError, match="slot 1 is taken"):
        install(device, 1, layout, [2, 3], packed(layout)[1])
    device.remove(1)
    assert not device.tables.rank[1].any()
    with pytest.raises(ValueError, match="no adapter is installed at slot 1"):
        device.layers_alike(1)
    for slot in (-1, 4):
        with pytest.raises(ValueError, match="no adapter is installed"):
            device.layers_alike(slot)
    install(device, 1, layout, [2, 3], packed(layout)[1])
    assert device.generations([1]) != before


def place(**changes: Any) -> tuple[tuple[ModulePlacement, ...], ...]:
    base = ModulePlacement(TargetModule.Q, 2, 32, 32, 0, 64)
    return ((dataclasses.replace(base, **changes),), (), ())


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"dtype": "bfloat16"}, "packed in bfloat16, this engine computes in float32"),
    ({"num_layers": 2, "layers": ((), ())}, "has 2 layers"),
    ({"layers": ((), ())}, "2 described"),
    ({"tile_elems": 0}, "tiles of 0"),
    ({"tile_elems": 24}, "tiles of 24"),
    ({"tile_elems": 256}, "tiles of 256"),
    ({"layer_elems": 200}, "its own layers of 200"),
    ({"layer_elems": 0}, "0 elements a layer"),
    ({"layer_elems": 16 * 10**6}, "at most"),
    ({"layers": (make_layout().layers[2] * 2, (), ())}, "names a module twice in layer 0"),
    ({"layers": place(in_features=16)}, r"is for \(16, 32\) features in layer 0, q, this model has \(32, 32\)"),
    ({"layers": place(out_features=33)}, "features"),
    ({"layers": place(module=TargetModule.K)}, "features in layer 0, k"),
    ({"layers": place(rank=0)}, "rank 0"),
    ({"layers": place(rank=257)}, "rank 257"),
    ({"layers": place(lora_a_offset=8)}, "places rows at 8"),
    ({"layers": place(lora_b_offset=-16)}, "places rows at -16"),
    ({"layers": place(lora_b_offset=160)}, "places rows at 160 to 224"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_a_layout_that_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    _, device = make_device()
    device.check(make_layout())
    with pytest.raises(SloraError, match=message) as caught:
        device.check(make_layout(**changes))
    assert caught.value.reason is Reason.ADAPTER_INCOMPATIBLE
    assert caught.value.metadata["digest"] == "sha256:1"


@pytest.mark.parametrize(
    ("pages", "num_bytes"), [([1], 2496), ([1, 1], 2496), ([1, 9], 2496), ([1, -1], 2496), ([1, 2], 2495), ([1, 2], 0)]
)
def test_a_copy_out_of_bounds_is_refused(pages: list[int], num_bytes: int) -> None:
    pool, _ = make_device()
    with pytest.raises(ValueError, match=r"pages|bytes"):
        pool.write_adapter(pages, 208, memoryview(bytes(num_bytes)))
    assert not pool.tensor.any()


def test_installing_on_other_threads_disturbs_nobody() -> None:
    """Loader threads install while this thread reads an adapter that is resident: no torn rows, no lost writes."""
    _, device = make_device()
    layout = make_layout()
    array, weights = packed(layout)
    install(device, 0, layout, [0, 1], weights)
    others = {slot: packed(layout) for slot in (1, 2, 3)}
    start = threading.Barrier(4)

    def load(slot: int) -> None:
        start.wait()
        for _ in range(200):
            install(device, slot, layout, [2 * slot, 2 * slot + 1], others[slot][1])
            device.remove(slot)
        install(device, slot, layout, [2 * slot, 2 * slot + 1], others[slot][1])

    threads = [threading.Thread(target=load, args=(slot,)) for slot in others]
    for thread in threads:
        thread.start()
    start.wait()
    pool = device._pool
    while any(thread.is_alive() for thread in threads):
        assert torch.equal(pool.tensor[:, [0, 1]].flatten(1)[:, :208], array)
        assert device.tables.rank[0, 0].tolist() == [2, 0, 0, 0, 0, 0, 1]
    for slot, (own, _) in others.items():
        np.testing.assert_array_equal(pool.tensor[:, [2 * slot, 2 * slot + 1]].flatten(1)[:, :208], own)
        assert device.tables.page_table[slot, :2].tolist() == [2 * slot, 2 * slot + 1]
