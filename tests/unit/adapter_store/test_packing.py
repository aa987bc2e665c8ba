"""Packing moves runs of tensors at once; the oracle here moves one after the other, as the format is described."""

from __future__ import annotations

import random
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from services.adapter_store import packing
from services.adapter_store.base_model import BaseModel
from services.adapter_store.manifest import ElementType, PackedLayout, TargetModule
from services.adapter_store.packing import as_elements, pack, plan_layout
from services.adapter_store.safetensors_reader import TensorEntry
from services.adapter_store.target_resolution import AdaptedModule
from services.adapter_store.validation import LoraPair
from services.common.errors import Reason, SloraError

BFLOAT16: Any = ml_dtypes.bfloat16
DTYPES: dict[str, Any] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(BFLOAT16)}
PACKED: dict[ElementType, Any] = {
    ElementType.FLOAT32: DTYPES["F32"], ElementType.FLOAT16: DTYPES["F16"], ElementType.BFLOAT16: DTYPES["BF16"],
}  # fmt: skip


def base_model(element_type: ElementType) -> BaseModel:
    # 80 and 48 are no multiples of one another's tiles: rows are padded for some modules.
    return BaseModel("tiny", "llama", element_type, 12, 80, 208, 5, 1, 16)


class Files:
    """Random tensors in a file, in an order of its own."""

    def __init__(self, draw: random.Random, base: BaseModel, targets: list[AdaptedModule], dtype: str) -> None:
        self.values: dict[tuple[int, TargetModule, str], Any] = {}
        wanted = [(target, half) for target in targets for half in "AB"]
        order = draw.choice(["by layer", "by name", "any", "backwards"])
        if order == "any":
            draw.shuffle(wanted)
        elif order == "by name":
            wanted.sort(key=lambda item: (f"{item[0].layer}", item[0].module.path, item[1]))
        elif order == "backwards":
            wanted.reverse()
        numbers = np.random.default_rng(draw.getrandbits(32))
        content, entries = bytearray(b"h" * draw.randrange(1, 9)), {}
        for target, half in wanted:
            width = base.in_features(target.module) if half == "A" else base.out_features(target.module)
            shape = (target.rank, width) if half == "A" else (width, target.rank)
            # Values of all sizes, the smallest that there are among them, and zeros.
            values = numbers.standard_normal(shape) * 2.0 ** numbers.integers(-30, 6, shape)
            values[numbers.random(shape) < 0.2] = 0.0
            kept = values.astype(DTYPES[dtype])
            entries[target, half] = TensorEntry(f"{target} {half}", dtype, shape, len(content), kept.nbytes)
            content += kept.tobytes()
            self.values[target.layer, target.module, half] = kept
        self.content = memoryview(content)
        self.pairs = tuple(LoraPair(target, entries[target, "A"], entries[target, "B"]) for target in targets)

    def packed(self, layout: PackedLayout) -> Any:
        """One tensor after the other."""
        packed = np.zeros((layout.num_layers, layout.layer_elems), PACKED[layout.element_type])
        scaling = {(pair.target.layer, pair.target.module): pair.target.scaling for pair in self.pairs}
        for layer, places in enumerate(layout.layers):
            for place in places:
                a, b = (self.values[layer, place.module, half] for half in "AB")
                scaled = b.T.astype(np.float32) * np.float32(scaling[layer, place.module])
                for rows, offset in ((a, place.lora_a_offset), (scaled, place.lora_b_offset)):
                    width = -(-rows.shape[1] // layout.tile_elems) * layout.tile_elems
                    for number, row in enumerate(rows.astype(packed.dtype)):
                        begin = offset + number * width
                        packed[layer, begin : begin + len(row)] = row
        return packed


def draw_targets(draw: random.Random, base: BaseModel) -> list[AdaptedModule]:
    modules = sorted(draw.sample(list(TargetModule), draw.randint(1, 7)))
    rank, scaling = draw.choice([1, 3, 8]), draw.choice([1.0, 2.0, 0.5, 2.0**-20, 0.75])
    left_out, differs = draw.choice([0.0, 0.3]), draw.choice([0.0, 0.3])
    targets = []
    for layer in range(base.num_layers):
        for module in modules:
            if draw.random() < left_out:
                continue
            other = draw.random() < differs
            targets.append(AdaptedModule(layer, module, rank + other, scaling * draw.choice([1, 3]) ** other))
    return targets or [AdaptedModule(0, modules[0], rank, scaling)]


@pytest.mark.parametrize("run_bytes", [1, 4000, 2**20])
def test_runs_give_what_single_tensors_give(monkeypatch: pytest.MonkeyPatch, run_bytes: int) -> None:
    monkeypatch.setattr(packing, "_RUN_BYTES", run_bytes)
    seed = random.SystemRandom().getrandbits(32)
    draw = random.Random(seed)
    for _ in range(60):
        base = base_model(draw.choice(list(ElementType)))
        targets = draw_targets(draw, base)
        files = Files(draw, base, targets, draw.choice(list(DTYPES)))
        layout = plan_layout(targets, base)
        out = np.full(layout.packed_bytes, 0xA5, np.uint8)
        with np.errstate(all="ignore"):
            pack(files.pairs, layout, files.content, out, check_values=False)
            expected = files.packed(layout)
        assert as_elements(out, layout).tobytes() == expected.tobytes(), f"seed {seed}"


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("half", ["A", "B"])
@pytest.mark.parametrize("element_type", list(ElementType))
def test_a_bad_value_in_a_run_is_found_in_its_tensor(element_type: ElementType, half: str, bad: float) -> None:
    draw = random.Random(7)
    base = base_model(element_type)
    targets = [AdaptedModule(layer, TargetModule.Q, 4, 2.0) for layer in range(base.num_layers)]
    files = Files(draw, base, targets, "F32")
    layout = plan_layout(targets, base)
    out = np.empty(layout.packed_bytes, np.uint8)
    pack(files.pairs, layout, files.content, out)
    pair = files.pairs[7]
    entry = pair.lora_a if half == "A" else pair.lora_b
    np.frombuffer(files.content, "<f4", offset=entry.offset, count=320)[99] = bad
    with pytest.raises(SloraError) as refused:
        pack(files.pairs, layout, files.content, out)
    assert refused.value.reason is Reason.ADAPTER_NOT_FINITE
    assert refused.value.metadata["tensor"] == entry.name
    pack(files.pairs, layout, files.content, out, check_values=False)  # whoever compares digests


def test_layers_that_are_alike_share_one_plan() -> None:
    base = base_model(ElementType.BFLOAT16)
    layers = [layer for layer in range(base.num_layers) if layer != 5]
    layout = plan_layout([AdaptedModule(layer, TargetModule.Q, 4 + (layer == 3), 1.0) for layer in layers], base)
    assert len({id(places) for places in layout.layers if places}) == 2
    assert layout.layers[5] == ()
