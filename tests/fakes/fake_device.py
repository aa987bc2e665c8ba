"""A stand-in for the engine's device, strict enough that faults show as failures: it keeps what every page holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from services.common.errors import Reason, SloraError
from services.engine.adapters.layout import AdapterLayout
from services.engine.step import BASE_SLOT, ScheduledChunk


@dataclass
class SubmittedStep:
    """A step in flight, as it was when it was submitted."""

    chunks: list[ScheduledChunk]
    # Sequences of which a step before was not computed: what comes of them is void.
    spoiled: set[int] = field(default_factory=set)


class FakeDevice:
    """An `AdapterDevice` that knows which adapter's block each page holds, and what steps in flight read."""

    def __init__(self, num_pages: int) -> None:
        self.contents: list[object] = [None] * num_pages
        self.installed: dict[int, tuple[str, tuple[int, ...]]] = {}
        self.weights: dict[str, bytes] = {}
        self.num_installs = 0
        self.is_direct = True
        self.on_install: object = None
        self.in_flight: list[SubmittedStep] = []

    def check(self, layout: AdapterLayout) -> None:
        if layout.dtype != "float32":
            raise SloraError(Reason.ADAPTER_INCOMPATIBLE, f"dtype {layout.dtype} is not float32", dtype=layout.dtype)

    def host_buffer(self, num_bytes: int) -> memoryview:
        return memoryview(bytearray(num_bytes))

    def register(self, memory: memoryview, wanted: object) -> None:
        pass

    def unregister(self, memory: memoryview) -> None:
        pass

    def reads_directly(self, weights: memoryview) -> bool:
        return self.is_direct

    def write(self, layout: AdapterLayout, pages: Sequence[int], weights: memoryview) -> None:
        assert not self.pages_in_flight() & set(pages), "a step in flight has a page that an adapter was given"
        if callable(self.on_install):
            self.on_install(layout.digest)
        self.weights[layout.digest] = bytes(weights)
        for index, page in enumerate(pages):
            self.contents[page] = (layout.digest, index)

    def enter(self, slot: int, layout: AdapterLayout, pages: Sequence[int]) -> None:
        assert slot not in self.installed, f"slot {slot} is taken"
        self.installed[slot] = (layout.digest, tuple(pages))
        self.num_installs += 1

    def remove(self, slot: int) -> None:
        used = {chunk.adapter_slot for step in self.in_flight for chunk in step.chunks}
        assert slot not in used, f"a step in flight uses slot {slot}"
        del self.installed[slot]

    def pages_in_flight(self) -> set[int]:
        """The KV pages that steps in flight name."""
        return {page for step in self.in_flight for chunk in step.chunks for page in chunk.block_table}

    def digest_at(self, slot: int) -> str | None:
        """The adapter at `slot`, all of whose pages must be as they were installed."""
        if slot == BASE_SLOT:
            return None
        digest, pages = self.installed[slot]
        assert [self.contents[page] for page in pages] == [(digest, i) for i in range(len(pages))], (
            "weights overwritten"
        )
        return digest
