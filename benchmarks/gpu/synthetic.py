"""Models of a given shape with random weights, and random adapters in host memory: nothing is read from disk."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import mmap
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.adapter_ranks import RANKS, ranks_in_turn
from benchmarks.arena_store import StoredAdapters
from services.adapter_store.base_model import BaseModel
from services.adapter_store.manifest import ElementType, PackedName
from services.adapter_store.manifest import ModulePlacement as StorePlacement
from services.adapter_store.manifest import TargetModule as StoreModule
from services.adapter_store.packing import plan_layout
from services.adapter_store.sharding import plan_shard, shard_geometry
from services.adapter_store.target_resolution import AdaptedModule
from services.common.packed_digest import packed_digest
from services.engine.adapters.device import HostMemory
from services.engine.adapters.layout import AdapterLayout, ModulePlacement, TargetModule
from services.engine.adapters.source import AdapterManifest, Delivery, WeightsLease
from services.engine.config import EngineSettings
from services.engine.execution.gpu.adapter_device import model_tile_elems
from services.engine.execution.gpu.gpu_runner import GpuRunner
from services.engine.execution.model_runner import ModelRunner
from services.engine.execution.open_runner import open_runner
from services.engine.messages import Adapter, Origin
from services.engine.model.config import ModelConfig
from services.engine.model.partition import Partition
from services.engine.model.random_weights import NAME_PREFIX
from services.engine.model.step_ops import module_groups

SHAPES: dict[str, dict[str, object]] = {
    "llama-7b": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
    "llama-3-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "llama-100m": {
        "vocab_size": 16384,
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
    },
    "small": {
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}

WHOLE = Partition()

_T = TargetModule
TARGETS: dict[str, tuple[TargetModule, ...]] = {"attn": (_T.Q, _T.K, _T.V, _T.O), "all": tuple(TargetModule)}


def write_config(directory: Path, model: str, max_len: int, dtype: str) -> Path:
    """A checkpoint directory with a config.json and nothing else."""
    shape = {"model_type": "llama", "max_position_embeddings": max_len, "dtype": dtype, "rms_norm_eps": 1e-5}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(shape | SHAPES[model]))
    return directory


def make_runner(settings: EngineSettings) -> ModelRunner | GpuRunner:
    """The runner of `settings_of`, with random weights."""
    return open_runner(settings)


def settings_of(directory: Path, model: str, max_len: int, dtype: str, **more: object) -> EngineSettings:
    """Settings of an engine of the shape `model` that makes its weights up; `more` are fields of EngineSettings."""
    fields: dict[str, object] = {
        "checkpoint": str(write_config(directory, model, max_len, dtype)),
        "adapter_store": (),
        "base_model": served_name(model),
        "random_weights": True,
        "device": "cuda",
        "max_adapters": 2048,
        # Rounds repeat their prompts: they are to be computed each time.
        "prefix_cache": False,
    }
    return EngineSettings(**(fields | more)).for_device()  # type: ignore[arg-type]


def served_name(model: str) -> str:
    """What a base model with made-up weights is called."""
    return f"{NAME_PREFIX}-{model}"


@dataclass(frozen=True)
class SyntheticAdapters:
    """An AdapterSource of adapters that differ in name; those of one rank share their bytes, in host memory.

    They are lent to the engine as a store on the same host lends them, out of memory that the device's driver pinned.
    """

    manifests: dict[str, AdapterManifest]
    weights: dict[str, memoryview]
    adapters: tuple[Adapter, ...]
    device: HostMemory | None = None

    def __or__(self, other: SyntheticAdapters) -> SyntheticAdapters:
        """The adapters of both."""
        return SyntheticAdapters(
            self.manifests | other.manifests,
            self.weights | other.weights,
            self.adapters + other.adapters,
            self.device or other.device,
        )

    def open(self, digest: str, origin: Origin) -> _Fetch:
        """Begins to fetch."""
        return _Fetch(self.manifests[digest], self.weights[digest])

    def close(self) -> None:
        """Lets the driver unpin the memory."""
        if self.device is not None:
            for memory in {id(memory): memory for memory in self.weights.values()}.values():
                self.device.unregister(memory)


class _Fetch:
    def __init__(self, manifest: AdapterManifest, weights: memoryview) -> None:
        self._manifest, self._weights = manifest, weights
        self.delivery = Delivery()

    def manifest(self, deadline: float) -> AdapterManifest:
        """At once."""
        return self._manifest

    def lease(self, deadline: float) -> WeightsLease:
        """At once, and for ever."""
        return _OwnMemory(self._weights)

    def chunks(self, deadline: float) -> Iterator[memoryview]:
        """All in one."""
        yield self._weights

    def pause(self) -> None:
        """Nothing is held."""

    def cancel(self) -> None:
        """Nothing is held."""


class _OwnMemory(AbstractContextManager["WeightsLease"]):
    """A lease of what this process keeps."""

    def __init__(self, content: memoryview) -> None:
        self.content = content

    def __exit__(self, *_: object) -> None:
        """Nothing ends."""

    def lasts(self) -> bool:
        """Always."""
        return True


def make_adapters(
    config: ModelConfig, setting: str, targets: str, number: int, device: HostMemory, partition: Partition = WHOLE
) -> SyntheticAdapters:
    """`number` adapters, ranks in turn, on the modules of `targets`, packed as the adapter store packs; or shards."""
    base = _as_base_model(config)
    by_rank = {rank: _random_adapter(base, rank, TARGETS[targets], partition) for rank in RANKS[setting]}
    for _, packed, _ in by_rank.values():
        device.register(packed, lambda: True)
    manifests, weights, adapters = {}, {}, []
    for i, rank in enumerate(ranks_in_turn(setting, number)):
        layout, packed, digest_of_bytes = by_rank[rank]
        name = f"{setting}-{targets}-{i}"
        digest = f"sha256:{hashlib.sha256(name.encode()).hexdigest()}"
        own = dataclasses.replace(layout, digest=digest)
        manifests[digest] = AdapterManifest(own, packed.nbytes, digest_of_bytes)
        weights[digest] = packed
        adapters.append(Adapter(f"{name}@1", digest))
    return SyntheticAdapters(manifests, weights, tuple(adapters), device)


def packed_layout(base: BaseModel, rank: int, modules: tuple[TargetModule, ...], partition: Partition) -> AdapterLayout:
    """How the adapter store packs an adapter of one rank for a process, in the engine's words; its digest is empty."""
    targets = [
        AdaptedModule(layer, StoreModule(module), rank, 1.0) for layer in range(base.num_layers) for module in modules
    ]
    layout = plan_layout(targets, base)
    if partition.tp_size > 1:
        layout = plan_shard(layout, shard_geometry(base, PackedName("", partition.tp_rank, partition.tp_size)))
    return AdapterLayout(
        "", layout.element_type.value, layout.tile_elems, layout.num_layers, layout.layer_elems,
        tuple(tuple(map(_as_engine_placement, layer)) for layer in layout.layers),
        partition.tp_rank, partition.tp_size,
    )  # fmt: skip


def _as_engine_placement(place: StorePlacement) -> ModulePlacement:
    return ModulePlacement(
        TargetModule(place.module), place.rank, place.in_features, place.out_features,
        place.lora_a_offset, place.lora_b_offset,
    )  # fmt: skip


def _as_base_model(config: ModelConfig) -> BaseModel:
    dtype = ElementType(str(config.dtype).removeprefix("torch."))
    return BaseModel(
        "", config.family, dtype, config.num_layers, config.hidden_size, config.intermediate_size,
        config.num_heads, config.num_kv_heads, config.head_dim,
    )  # fmt: skip


def stored_adapters(config: ModelConfig, setting: str, targets: str, number: int) -> StoredAdapters:
    """The same shapes, for a store in a process of its own."""
    shapes, tile = _shapes(config), model_tile_elems(module_groups(config))
    modules = tuple((int(module), *shapes[module]) for module in TARGETS[targets])
    dtype = str(config.dtype).removeprefix("torch.")
    return StoredAdapters(config.num_layers, modules, RANKS[setting], number, dtype, tile)


def _shapes(config: ModelConfig) -> dict[TargetModule, tuple[int, int]]:
    return {
        TargetModule(module): (group.in_features, size)
        for group in module_groups(config)
        for module, size in zip(group.modules, group.out_features, strict=True)
    }


def _random_adapter(
    base: BaseModel, rank: int, modules: tuple[TargetModule, ...], partition: Partition
) -> tuple[AdapterLayout, memoryview, str]:
    """Its layout, its bytes, and their digest."""
    layout = packed_layout(base, rank, modules, partition)
    packed = (torch.randn(layout.num_layers, layout.layer_elems) * 0.01).to(getattr(torch, layout.dtype))
    data = packed.view(torch.uint8).numpy().data.cast("B")
    # Whole pages of memory: what a driver pins.
    memory = memoryview(mmap.mmap(-1, data.nbytes))
    memory[:] = data
    return layout, memory, packed_digest(memory)
