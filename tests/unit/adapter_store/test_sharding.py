"""Shards cut from packed adapters are, byte by byte, what the layout's definition says of PEFT's own tensors."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from services.adapter_store.base_model import BaseModel, load_base_model
from services.adapter_store.manifest import PackedName
from services.adapter_store.preparation import AdapterFiles, pack_into, prepare
from services.adapter_store.sharding import cut_shard, plan_shard, shard_geometry
from services.common.errors import Reason, SloraError
from services.common.packed_digest import packed_digest
from tests.fixtures.adapter_kinds import KINDS, peft_model
from tests.fixtures.shard_packer import pack_shard
from tests.fixtures.tiny_models import make_checkpoint, quiet

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def packed_whole(directory: Path, base: BaseModel) -> Any:
    parts = [memoryview((directory / f"adapter_{n}").read_bytes()) for n in ("config.json", "model.safetensors")]
    prepared = prepare(AdapterFiles(*parts, "0" * 64, "1" * 64), base)
    out = np.full(prepared.layout.packed_bytes, 0xA5, np.uint8)
    return pack_into(prepared, out), out


@pytest.mark.parametrize(("kv_heads", "dtype"), [(2, "float32"), (8, "bfloat16")])
def test_shards_of_every_kind(tmp_path: Path, kv_heads: int, dtype: str) -> None:
    seed = random.SystemRandom().randrange(2**31)
    print("seed", seed)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8, "num_key_value_heads": kv_heads}
    checkpoint = make_checkpoint(tmp_path / "base", num_hidden_layers=2, seed=seed, **sizes)
    base = load_base_model(str(checkpoint), dtype=dtype)
    model = peft_model(checkpoint, KINDS, seed)
    with quiet():
        model.save_pretrained(tmp_path / "adapters")
    for name in KINDS:
        manifest, whole = packed_whole(tmp_path / "adapters" / name, base)
        for tp_size in (2, 4, 8):
            geometry = shard_geometry(base, PackedName("", 0, tp_size))
            layout = plan_shard(manifest.layout, geometry)
            for tp_rank in range(tp_size):
                out = np.full(layout.packed_bytes, 0xA5, np.uint8)  # an arena's memory is never clean
                wanted = PackedName(manifest.digest, tp_rank, tp_size)
                shard = cut_shard(manifest, whole.data.toreadonly(), wanted, base, out)
                assert shard.name == wanted
                assert shard.packed_digest == packed_digest(out.data)
                places, weights = pack_shard(model, name, geometry.tile_elems, tp_rank, tp_size, DTYPES[dtype])
                ours = [[(p.module.name, p.rank, *_numbers(p)) for p in layer] for layer in shard.layout.layers]
                assert ours == [[(p.module.name, p.rank, *_numbers(p)) for p in layer] for layer in places.layers]
                assert shard.layout.layer_elems == places.layer_elems
                assert out.tobytes() == bytes(weights), (name, tp_rank, tp_size)


def _numbers(place: Any) -> tuple[int, ...]:
    return (place.in_features, place.out_features, place.lora_a_offset, place.lora_b_offset)


@pytest.mark.parametrize(
    ("tp_rank", "tp_size", "message"),
    [
        (2, 2, "shard 2 of 2"),
        (1, 1, "shard 1 of 1"),
        (0, 128, "tp_size is 1 to 64"),
        (0, 5, "8 attention heads of base cannot be shared by tp_size 5"),
        (0, 8, "60 intermediate features"),
    ],
)
def test_shards_that_there_are_not(tmp_path: Path, tp_rank: int, tp_size: int, message: str) -> None:
    sizes = {
        "model_type": "llama", "num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 60,
        "num_attention_heads": 8, "num_key_value_heads": 2,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    base = load_base_model(str(tmp_path), "base")
    with pytest.raises(SloraError, match=message) as raised:
        shard_geometry(base, PackedName("sha256:0", tp_rank, tp_size))
    assert raised.value.reason is Reason.REQUEST_INVALID
