"""Plain values that the store's parts hand each other: modules, layouts, records. No behaviour, no protos."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import NamedTuple


class TargetModule(enum.IntEnum):
    """Linear layers of a decoder layer that an adapter may change, in the fixed order of packing."""

    Q = 0
    K = 1
    V = 2
    O = 3  # noqa: E741
    GATE = 4
    UP = 5
    DOWN = 6

    @property
    def path(self) -> str:
        """Its name inside a decoder layer, such as `self_attn.q_proj`."""
        parent = "self_attn" if self <= TargetModule.O else "mlp"
        return f"{parent}.{self.name.lower()}_proj"


class ElementType(enum.Enum):
    """Types that packed elements can have; the value is the name settings and layouts use."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"

    @property
    def num_bytes(self) -> int:
        """Bytes of an element."""
        return 4 if self is ElementType.FLOAT32 else 2


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
class PackedLayout:
    """Where everything lies in a packed array `[num_layers, layer_elems]`."""

    element_type: ElementType
    tile_elems: int
    num_layers: int
    layer_elems: int
    layers: tuple[tuple[ModulePlacement, ...], ...]

    @property
    def packed_bytes(self) -> int:
        """Bytes of the whole array."""
        return self.num_layers * self.layer_elems * self.element_type.num_bytes

    @property
    def max_rank(self) -> int:
        """Largest LoRA rank over its modules."""
        return max(placement.rank for layer in self.layers for placement in layer)

    @property
    def target_modules(self) -> tuple[TargetModule, ...]:
        """The modules changed in any layer, in the fixed order."""
        return tuple(sorted({placement.module for layer in self.layers for placement in layer}))


class PackedName(NamedTuple):
    """What packed weights are found by: the adapter's digest, and which of how many shards (0 of 1: the whole)."""

    digest: str
    tp_rank: int = 0
    tp_size: int = 1


@dataclass(frozen=True, slots=True)
class PackedManifest:
    """What an engine must know to use packed weights."""

    digest: str
    packed_digest: str
    layout: PackedLayout
    # Which of how many shards; 0 of 1: the whole.
    tp_rank: int = 0
    tp_size: int = 1

    @property
    def name(self) -> PackedName:
        """What it is found by."""
        return PackedName(self.digest, self.tp_rank, self.tp_size)


@dataclass(frozen=True, slots=True)
class SourceLocation:
    """Where an adapter's two files lie. `managed`: the store itself put them there, for an upload."""

    uri: str
    managed: bool = False


@dataclass(frozen=True, slots=True)
class Marks:
    """What an operator may change of a version, and when it was last used. None of it changes what it computes.

    `aliases`: the names, such as prod, that mean this version now; in order. `labels`: keys and values, by key.
    `pinned`: stores keep it in their arenas. `last_use_ms`: milliseconds since the epoch; 0 for never.
    """

    aliases: tuple[str, ...] = ()
    labels: tuple[tuple[str, str], ...] = ()
    pinned: bool = False
    last_use_ms: int = 0


@dataclass(frozen=True, slots=True)
class AdapterRecord:
    """What the catalogue keeps of one immutable version: enough to find its files again and to verify them.

    One that a sync discovered was not read yet: its digest is that of its place and ETags (`source_digest`), and
    `content` is the digest of its files once they were read. Until then rank, modules and sizes of its packed form are
    empty. For all others `content` is the digest.

    `packing` names how its weights were packed (format, element type, tile, base geometry); `packed_digest` is
    comparable only under the same `packing`. ETags identify the files of a discovered one; of the others they are kept
    for people who look for the cause of a change.
    """

    name: str
    version: int
    digest: str
    rank: int
    target_modules: tuple[TargetModule, ...]
    packed_bytes: int
    packed_digest: str
    packing: str
    config_bytes: int
    weights_bytes: int
    config_etag: str
    weights_etag: str
    source: SourceLocation
    tenant: str
    base_model: str
    create_time_ms: int
    content: str
    marks: Marks = Marks()

    @property
    def discovered(self) -> bool:
        """Whether a sync found it; its identity is then its place and ETags, not its content."""
        return self.content != self.digest

    @property
    def adapter_id(self) -> str:
        """`name@version`."""
        return f"{self.name}@{self.version}"

    @property
    def source_bytes(self) -> int:
        """Bytes of both files."""
        return self.config_bytes + self.weights_bytes
