"""Decode and prefill attention over paged keys and values: time a layer, and the memory or arithmetic rate it means.

Launches lie in a CUDA graph and go through layer after layer of a large pool, so that no launch finds its keys and
values in a cache; pages are scattered. Each result is checked against torch's own attention first.

Run: python -m benchmarks.gpu.bench_attention [--quick]   (--quick: the kernels as they are tuned, no sweep)
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from benchmarks.command_line import parser_of
from kernels.gpu import decode_attention as decode
from kernels.gpu import prefill_attention as prefill
from kernels.gpu.attention_parts import AttentionParts

DTYPE = torch.bfloat16
HEAD_DIM = 128
MAX_LAYERS = 32
MAX_POOL_BYTES = 32 << 30
SCALE = HEAD_DIM**-0.5


@dataclass(frozen=True)
class Shape:
    """Sequences of one length; num_new tokens of each are new (decode: one)."""

    batch: int
    context: int
    num_heads: int
    num_kv_heads: int
    num_new: int = 1
    tokens_per_page: int = 16

    def __str__(self) -> str:
        new = f" new {self.num_new}" if self.num_new > 1 else ""
        return f"{self.num_heads}/{self.num_kv_heads} heads, {self.batch} x {self.context}{new}"

    @property
    def num_pages(self) -> int:
        """Pages of a layer."""
        return self.batch * -(-self.context // self.tokens_per_page)

    @property
    def layer_elems(self) -> int:
        """Elements of a layer of the pool."""
        return self.num_pages * 2 * self.num_kv_heads * self.tokens_per_page * HEAD_DIM

    @property
    def kv_bytes(self) -> int:
        """What a layer's attention must read."""
        return self.batch * self.context * 2 * self.num_kv_heads * HEAD_DIM * DTYPE.itemsize

    @property
    def flops(self) -> int:
        """Of the products that a causal mask leaves."""
        before = self.context - self.num_new
        pairs = self.num_new * before + self.num_new * (self.num_new + 1) // 2
        return 4 * HEAD_DIM * self.num_heads * self.batch * pairs


class Pool:
    """Layers of keys and values for one shape, in memory that all shapes share."""

    def __init__(self, memory: torch.Tensor, shape: Shape) -> None:
        self.shape = shape
        num_layers = max(1, min(MAX_LAYERS, memory.numel() // shape.layer_elems))
        self.layers = memory[: num_layers * shape.layer_elems].view(
            num_layers, shape.num_pages, 2, shape.num_kv_heads, shape.tokens_per_page, HEAD_DIM
        )
        pages = torch.randperm(shape.num_pages, device=memory.device).to(torch.int32).view(shape.batch, -1)
        # One stride for all shapes: the kernels are compiled for what it is a multiple of.
        self.tables = torch.zeros(shape.batch, -(-pages.shape[1] // 64) * 64, dtype=torch.int32, device=memory.device)
        self.tables[:, : pages.shape[1]] = pages
        num_rows = shape.batch * shape.num_new
        fused = torch.randn(num_rows, shape.num_heads + 2 * shape.num_kv_heads, HEAD_DIM, device=memory.device)
        self.q = fused.to(DTYPE)[:, : shape.num_heads]
        self.out = torch.empty(self.q.shape, dtype=DTYPE, device=memory.device)

    def check(self, layer: int) -> None:
        """Compares the rows of the first and the last sequence in `out` with torch's attention in float32."""
        shape = self.shape
        for sequence in {0, shape.batch - 1}:
            used = self.tables[sequence, : -(-shape.context // shape.tokens_per_page)].long()
            kv = self.layers[layer, used].permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, : shape.context].float()
            rows = slice(sequence * shape.num_new, (sequence + 1) * shape.num_new)
            keys, values = kv.repeat_interleave(shape.num_heads // shape.num_kv_heads, 1)
            for head in range(shape.num_heads):
                scores = self.q[rows, head].float() @ keys[head].T * SCALE
                unseen = torch.ones_like(scores, dtype=torch.bool).triu(shape.context - shape.num_new + 1)
                expected = scores.masked_fill(unseen, float("-inf")).softmax(1) @ values[head]
                torch.testing.assert_close(self.out[rows, head].float(), expected, rtol=2e-2, atol=1e-2)


def seconds_per_layer(launch: Callable[[int], None], num_layers: int, num_launches: int, num_replays: int) -> float:
    """Median over replays of a graph of launches, which take the layers in turn."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(num_launches):
            launch(i % num_layers)
    graph.replay()
    times: list[float] = []
    for _ in range(num_replays):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times) / num_launches


def bench_decode(pool: Pool, tuning: decode.DecodeTuning | None, num_splits: int, context: int | None = None) -> float:
    """Prints a line, and returns seconds a layer; context: another length than the shape's (0: only launches)."""
    shape = pool.shape
    length = shape.context if context is None else context
    device = pool.q.device
    context_lens = torch.full((shape.batch,), length, dtype=torch.int32, device=device)
    rows = (shape.batch if num_splits > 1 else 1) * shape.num_heads
    parts = AttentionParts.make(rows * num_splits, rows, HEAD_DIM, device)

    def launch(layer: int) -> None:
        decode.decode_attention(
            pool.q, pool.layers[layer], pool.tables, context_lens, SCALE, pool.out, parts, num_splits, tuning
        )

    last = len(pool.layers) - 1
    pool.out.fill_(float("nan"))
    launch(last)
    if length:
        pool.check(last)
    seconds = seconds_per_layer(launch, len(pool.layers), 32, 9)
    used = tuning or decode.default_tuning(shape.num_heads // shape.num_kv_heads, DTYPE)
    form = "dot" if used.dot else "multiply"
    words = f"{form} n{used.block_n} w{used.num_warps} s{used.num_stages} splits {num_splits}"
    rate = f"{shape.kv_bytes / seconds / 1e12:6.2f} TB/s" if length else "  launch only"
    mark = " (default)" if tuning is None else ""
    print(f"decode  {shape!s:36} {words:30} {seconds * 1e6:9.2f} us  {rate}{mark}", flush=True)
    return seconds


def bench_prefill(pool: Pool, tuning: prefill.PrefillTuning | None) -> None:
    """Prints a line."""
    shape = pool.shape
    used = tuning or prefill.default_tuning(DTYPE)
    block_m = max(1, used.rows // (shape.num_heads // shape.num_kv_heads))
    spans = [(i * shape.num_new, (i + 1) * shape.num_new, shape.context - shape.num_new, i) for i in range(shape.batch)]
    begin = time.perf_counter()
    plan = prefill.plan_prefill(spans, block_m, pool.q.device)
    plan_seconds = time.perf_counter() - begin

    def launch(layer: int) -> None:
        prefill.prefill_attention(pool.q, pool.layers[layer], pool.tables, plan, SCALE, pool.out, tuning)

    last = len(pool.layers) - 1
    pool.out.fill_(float("nan"))
    launch(last)
    pool.check(last)
    seconds = seconds_per_layer(launch, len(pool.layers), 8, 5)
    words = f"m{used.rows} n{used.block_n} w{used.num_warps} s{used.num_stages} u{used.min_unmasked}"
    rate = f"{shape.flops / seconds / 1e12:6.0f} TFLOP/s"
    mark = f" (default; plan {plan_seconds * 1e3:.2f} ms)" if tuning is None else ""
    print(f"prefill {shape!s:36} {words:30} {seconds * 1e6:9.1f} us  {rate}{mark}", flush=True)


def bench_torch_prefill(shape: Shape) -> None:
    """Torch's attention of dense prompts, as a yardstick."""
    sizes = (4, shape.batch, shape.num_heads, shape.num_new, HEAD_DIM)
    q, keys, values = (torch.randn(sizes, dtype=DTYPE, device="cuda") for _ in range(3))

    def launch(layer: int) -> None:
        functional.scaled_dot_product_attention(q[layer], keys[layer], values[layer], is_causal=True)

    launch(0)
    seconds = seconds_per_layer(launch, 4, 8, 5)
    rate = f"{shape.flops / seconds / 1e12:6.0f} TFLOP/s"
    print(f"prefill {shape!s:36} {'torch, dense':30} {seconds * 1e6:9.1f} us  {rate}", flush=True)


def decode_tunings(shape: Shape) -> Iterator[decode.DecodeTuning]:
    """What a sweep tries; the query heads of a group are better off together."""
    if shape.num_heads == shape.num_kv_heads:
        for sizes in [(64, 4, 1), (64, 4, 2), (64, 4, 3), (32, 4, 3), (32, 2, 2), (32, 2, 3), (32, 1, 2), (128, 4, 2)]:
            yield decode.DecodeTuning(*sizes, dot=False)
    for sizes in [(64, 4, 2), (64, 4, 3), (32, 2, 3), (32, 2, 4), (128, 4, 2)]:
        yield decode.DecodeTuning(*sizes, dot=True)


PREFILL_TUNINGS = [
    prefill.PrefillTuning(128, 64, 8, 2),
    prefill.PrefillTuning(128, 64, 8, 3),
    prefill.PrefillTuning(128, 64, 8, 3, min_unmasked=0),
    prefill.PrefillTuning(128, 128, 8, 2),
    prefill.PrefillTuning(64, 64, 4, 2),
    prefill.PrefillTuning(64, 64, 4, 2, min_unmasked=0),
    prefill.PrefillTuning(64, 64, 4, 3),
    prefill.PrefillTuning(64, 32, 4, 3),
]
DECODE_SHAPES = [
    Shape(batch, context, 32, kv) for kv in (32, 8) for batch, context in [(32, 320), (128, 320), (256, 512)]
]
SMALL_SHAPES = [Shape(1, 320, 32, 32), Shape(8, 320, 32, 32), Shape(1, 320, 32, 8), Shape(1, 8192, 32, 8)]
PREFILL_SHAPES = [Shape(128, 256, 32, 32, 256), Shape(1, 8192, 32, 32, 8192)]
MORE_PREFILL_SHAPES = [Shape(128, 256, 32, 8, 256), Shape(1, 8192, 32, 8, 8192), Shape(16, 2304, 32, 8, 256)]


def splits_to_try(shape: Shape, quick: bool) -> Sequence[int]:
    """The default first."""
    num_sms = torch.cuda.get_device_properties(0).multi_processor_count
    default = decode.num_splits_for(shape.batch, shape.num_kv_heads, num_sms)
    return [default] if quick else [default, *(splits for splits in (1, 2, 3, 5, 10, 32) if splits != default)]


def run_decode(memory: torch.Tensor, quick: bool) -> None:
    """Large batches unsplit, in every form; small ones in several splits."""
    for shape in DECODE_SHAPES:
        pool = Pool(memory, shape)
        bench_decode(pool, None, 1)
        for tuning in [] if quick else decode_tunings(shape):
            bench_decode(pool, tuning, 1)
    bench_decode(Pool(memory, SMALL_SHAPES[0]), None, 1, context=0)
    for shape in SMALL_SHAPES:
        pool = Pool(memory, shape)
        for num_splits in splits_to_try(shape, quick):
            bench_decode(pool, None, num_splits)
            if not quick:
                bench_decode(pool, decode.DecodeTuning(64, 4, 2, dot=True), num_splits)
                bench_decode(pool, decode.DecodeTuning(32, 2, 3, dot=True), num_splits)


def run_prefill(memory: torch.Tensor, quick: bool) -> None:
    """Prompts whole, and chunks behind a prefix."""
    for shape in PREFILL_SHAPES:
        bench_torch_prefill(shape)
        pool = Pool(memory, shape)
        bench_prefill(pool, None)
        for tuning in [] if quick else PREFILL_TUNINGS:
            bench_prefill(pool, tuning)
    for shape in MORE_PREFILL_SHAPES:
        pool = Pool(memory, shape)
        bench_prefill(pool, None)
        if not quick:
            bench_prefill(pool, PREFILL_TUNINGS[4])


def main() -> None:
    """Runs it all."""
    parser = parser_of(__doc__)
    parser.add_argument("--quick", action="store_true", help="the kernels as they are tuned only")
    parser.add_argument("--only", choices=["decode", "prefill"], help="one of the two")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    begin = time.perf_counter()
    free_bytes, _ = torch.cuda.mem_get_info()
    memory = torch.empty(min(MAX_POOL_BYTES, free_bytes // 2) // DTYPE.itemsize, dtype=DTYPE, device="cuda").normal_()
    print(torch.cuda.get_device_name(), torch.__version__)
    if arguments.only != "prefill":
        run_decode(memory, arguments.quick)
    if arguments.only != "decode":
        run_prefill(memory, arguments.quick)
    print(f"{time.perf_counter() - begin:.0f} s in all")


if __name__ == "__main__":
    main()
