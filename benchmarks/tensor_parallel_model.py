"""A model on paper, nothing measured here: what tensor parallelism costs a decode step, and LoRA's part of it.

Llama-7B's shape in bfloat16, adapters of one rank on all seven modules. A collective takes a latency and its bytes over
a link; a product takes its weights over the device's memory. LoRA's small collectives run beside the base product of
the same group, so what they cost is what is left when the product is done. Memory speed is what one H200 streams
weights with in this project's own measurements; links are assumptions, for which you should put in your own.

Run: python -m benchmarks.tensor_parallel_model [--rank 16]
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.command_line import parser_of
from benchmarks.record import say

LAYERS, HIDDEN, INNER, VOCABULARY, BYTES = 32, 4096, 11008, 32000, 2
MEMORY_BYTES_A_SECOND = 3.8e12
CONTEXT = 320


@dataclass(frozen=True)
class Link:
    """`latency_us` by N, of a sum; a gathering takes `gather_share` of that. Bytes a second are a direction's."""

    name: str
    bytes_a_second: float
    latency_us: dict[int, float]
    gather_share: float = 0.7


LINKS = (
    Link("NVLink 4", 360e9, {2: 9.0, 4: 12.0, 8: 16.0}),
    Link("PCIe 5 x16", 40e9, {2: 20.0, 4: 35.0, 8: 60.0}),
)


@dataclass(frozen=True)
class Group:
    """A group of modules: elements of its base weight, modules, and whether its outputs are sums."""

    weight_elems: int
    num_modules: int
    is_summed: bool


GROUPS = (
    Group(3 * HIDDEN * HIDDEN, 3, False),
    Group(HIDDEN * HIDDEN, 1, True),
    Group(2 * HIDDEN * INNER, 2, False),
    Group(INNER * HIDDEN, 1, True),
)


@dataclass(frozen=True)
class Step:
    """Milliseconds of a decode step: without adapters, of which its sums; what adapters' collectives add."""

    base: float
    sums: float
    lora_one_by_one: float
    lora_beside_products: float


def step_times(tp_size: int, link: Link, batch: int, rank: int) -> Step:
    """One step of `batch` tokens on each of `tp_size` devices."""
    latency, share = link.latency_us[tp_size] * 1e-6, (tp_size - 1) / tp_size
    weights = LAYERS * sum(group.weight_elems for group in GROUPS) + VOCABULARY * HIDDEN
    kv = batch * CONTEXT * 2 * HIDDEN * LAYERS
    compute = (weights + kv) * BYTES / tp_size / MEMORY_BYTES_A_SECOND
    sums = 2 * LAYERS * (latency + 2 * share * batch * HIDDEN * BYTES / link.bytes_a_second)
    one_by_one = beside = 0.0
    for group in GROUPS:
        sent = (2 if group.is_summed else 1) * share * batch * rank * group.num_modules * BYTES
        seconds = latency * (1.0 if group.is_summed else link.gather_share) + sent / link.bytes_a_second
        product = group.weight_elems * BYTES / tp_size / MEMORY_BYTES_A_SECOND
        one_by_one += LAYERS * seconds
        beside += LAYERS * max(0.0, seconds - product)
    return Step(*(1000 * part for part in (compute + sums, sums, one_by_one, beside)))


def main() -> None:
    """Prints the table of docs/tensor_parallelism.md."""
    parser = parser_of(__doc__)
    parser.add_argument("--rank", type=int, default=16)
    rank = parser.parse_args().rank
    say("| link | N | tokens | base step, ms | of it sums | LoRA, one by one | LoRA, beside products | tax |")
    say("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for link in LINKS:
        for tp_size in (2, 4, 8):
            for batch in (1, 32, 128):
                step = step_times(tp_size, link, batch, rank)
                tax = 100 * step.lora_beside_products / step.base
                figures = (step.base, step.sums, step.lora_one_by_one, step.lora_beside_products)
                cells = " | ".join(f"{figure:.2f}" for figure in figures)
                say(f"| {link.name} | {tp_size} | {batch} | {cells} | {tax:.0f} % |")


if __name__ == "__main__":
    main()
