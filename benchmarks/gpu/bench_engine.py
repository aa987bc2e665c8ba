"""Claim: a thousand adapters at the base model's speed. The engine's core alone, in a closed loop, on an accelerator.

*decode*: B sequences with prompts of 256 tokens, 128 outputs; time a decode step once all are prefilled. *prefill*: 128
prompts of 256 tokens. *mixed*: a step of 32 or 128 such sequences in which another prompt is computed. *paper_mix*: all
requests at once, prompts and outputs uniform in [8, 512], adapters uniform, outputs forced to length, at most 256
running. *load*: an adapter in host memory (this process's, or that of a store on this host) until it may be used.
*churn*: 32 sequences without adapters while a thousand adapters are loaded, four at a time, into room for a hundred.
Settings: base (no adapters), S1 (rank 8), S2 (ranks 64, 32, 16, 8).

Run: python -m benchmarks.gpu.bench_engine [--model llama-7b] [--targets attn] [--quick] [--only decode,prefill,...]
Only some mixes: --only paper_mix --mixes base:0,S1:5
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.gpu.bench_model import chosen_model, keep_rows, model_arguments
from benchmarks.gpu.core_bench import Bench
from benchmarks.gpu.core_loads import measure_churn, measure_load, measure_store_load
from benchmarks.gpu.core_mix import MIX_REQUESTS, MIXES, measure_mixes
from benchmarks.gpu.core_steps import (
    DECODE_BATCHES,
    measure_decode,
    measure_idle_adapters,
    measure_mixed,
    measure_prefill,
)
from benchmarks.gpu.device_rates import measure_device
from benchmarks.record import Row
from services.engine.core.launch import SWITCH_SECONDS


def measure(bench: Bench, only: set[str], quick: bool) -> Iterator[list[Row]]:
    """Everything that was asked for but the mixes, base first, part by part."""
    sizes = (1, 32) if quick else DECODE_BATCHES
    if "decode" in only:
        idle = () if quick else measure_idle_adapters(bench)
        yield [*measure_decode(bench, sizes), *idle]
    if "prefill" in only:
        yield list(measure_prefill(bench))
    if "mixed" in only:
        yield list(measure_mixed(bench))
    for setting in ("S1", "S2") if "load" in only else ():
        yield [*measure_load(bench, setting), *measure_store_load(bench, setting)]
    for setting in ("S1", "S2") if "churn" in only else ():
        yield list(measure_churn(bench, setting))


def main() -> None:
    """Measures, prints rows, and merges them into the results, a part as soon as it is measured."""
    parser = model_arguments(__doc__)
    parser.add_argument("--only", default="decode,prefill,mixed,load,churn,paper_mix")
    parser.add_argument("--quick", action="store_true", help="few batches, requests and adapters")
    parser.add_argument("--mixes", default=MIXES, help="of paper_mix: setting:adapters, … (default %(default)s)")
    parser.add_argument("--requests", type=int, default=MIX_REQUESTS, help="of each mix (default %(default)s)")
    arguments = parser.parse_args()
    model, only = chosen_model(arguments), set(arguments.only.split(","))
    sys.setswitchinterval(SWITCH_SECONDS)
    keep_rows(list(measure_device(model)), model, arguments.out)
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench.open(model, Path(scratch))
        for part in measure(bench, only, arguments.quick):
            keep_rows(part, model, arguments.out)
        if "paper_mix" in only:
            mixes, requests = ("base:0,S1:5,S2:5", 64) if arguments.quick else (arguments.mixes, arguments.requests)
            keep_rows(list(measure_mixes(bench, mixes, requests)), model, arguments.out)


if __name__ == "__main__":
    main()
