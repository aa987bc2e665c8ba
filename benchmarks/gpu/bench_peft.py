"""Claim: with 5 adapters the engine serves the paper's mix at least 40 times as fast as transformers + PEFT.

Both in one run, on one accelerator, in one type, with random weights of one shape and random adapters of rank 8. PEFT
gets the first requests of the mix's list in its own mixed batches (`adapter_names`), an adapter a row, outputs forced
to length; a batch ends when its longest output does. A batch of 32 takes it a minute or two, and the first two are a
fair sample: they take 507 and 500 steps, the list's batches 500 on average. More can be asked for. The engine serves
the whole list, and PEFT's requests alone.

Run: python -m benchmarks.gpu.bench_peft [--batch 32] [--batches 2] [--adapters 5] [--tiny]
"""

from __future__ import annotations

import gc
import itertools
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.adapter_ranks import RANKS
from benchmarks.gpu.bench_model import BenchModel, chosen_model, keep_rows, model_arguments
from benchmarks.gpu.core_bench import Bench
from benchmarks.gpu.core_mix import MIX_REQUESTS, measure_mix
from benchmarks.gpu.synthetic import SHAPES, TARGETS
from benchmarks.peft_baseline import BaselineRequest, run_mixed_batch
from benchmarks.record import Row, say
from benchmarks.trace import draw_mix
from services.engine.core.launch import SWITCH_SECONDS

SETTING = "S1"


@dataclass(frozen=True)
class PeftLoad:
    """What PEFT is given: so many adapters, and the first `num_batches` batches of the mix."""

    num_adapters: int = 5
    max_batch: int = 32
    num_batches: int = 2

    @property
    def num_requests(self) -> int:
        """Requests in all batches."""
        return self.max_batch * self.num_batches


def make_peft_model(model: BenchModel, num_adapters: int) -> Any:
    """A PEFT model of the shape on its device, with random weights and adapters named `0`, `1`, …

    Adapters keep the model's type: PEFT would hold them in float32, and be slower.
    """
    config = LlamaConfig.from_dict(SHAPES[model.shape] | {"max_position_embeddings": model.max_len})
    dtype = getattr(torch, model.dtype)
    lora = LoraConfig(
        r=RANKS[SETTING][0],
        target_modules=[f"{module.name.lower()}_proj" for module in TARGETS[model.targets]],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    with torch.device(model.device):
        base = AutoModelForCausalLM.from_config(config, dtype=dtype)
        peft: Any = get_peft_model(base, lora, adapter_name="0", autocast_adapter_dtype=False)
        for number in range(1, num_adapters):
            peft.add_adapter(str(number), lora, autocast_adapter_dtype=False)
    return peft.eval()


def measure_peft(model: BenchModel, load: PeftLoad) -> Iterator[Row]:
    """PEFT's batches, one after the other, after a short one that warms it up."""
    peft = make_peft_model(model, load.num_adapters)
    mix = draw_mix(load.num_requests, load.num_adapters, peft.config.vocab_size, model.lengths)
    requests = [BaselineRequest(one.prompt_ids, one.num_outputs, str(one.adapter)) for one in mix]
    run_mixed_batch(peft, [BaselineRequest(r.prompt_ids, 4, r.adapter) for r in requests[: load.max_batch]], True)
    runs = [run_mixed_batch(peft, list(batch), ignore_eos=True) for batch in _batches(requests, load.max_batch)]
    seconds = sum(run.seconds for run in runs)
    labels = {"system": "peft", "adapters": load.num_adapters, "batch": load.max_batch, "requests": load.num_requests}
    yield model.row("peft", SETTING, "requests_per_s", load.num_requests / seconds, **labels)
    yield model.row("peft", SETTING, "tokens_per_s", sum(run.num_tokens for run in runs) / seconds, **labels)


def measure_engine(model: BenchModel, load: PeftLoad, num_requests: int) -> Iterator[Row]:
    """The engine's core: the whole list, and PEFT's part of it, all at once each time."""
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench.open(model, Path(scratch))
        for _ in measure_mix(bench, SETTING, load.num_adapters, num_requests // 2):
            pass  # kernels are compiled, clocks rise
        for number in (load.num_requests, num_requests):
            for row in measure_mix(bench, SETTING, load.num_adapters, number):
                yield {**row, "bench": "peft", "system": "slora"}


def ratios(model: BenchModel, load: PeftLoad, rows: Sequence[Row]) -> Iterator[Row]:
    """The engine's requests a second over PEFT's."""
    rates = [row for row in rows if row["metric"] == "requests_per_s"]
    (theirs,) = (row["value"] for row in rates if row["system"] == "peft")
    for row in rates:
        if row["system"] == "slora":
            labels = {"adapters": load.num_adapters, "batch": load.max_batch, "requests": row["requests"]}
            ratio = float(str(row["value"])) / float(str(theirs))
            yield model.row("peft", SETTING, "requests_per_s_ratio", ratio, system="slora/peft", **labels)


def free_device_memory(device: str) -> None:
    """What is no longer referred to goes back to the device: the next model takes what is free."""
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(device)
        say(f"# {free / 2**30:.0f} of {total / 2**30:.0f} GiB are free")


def _batches(requests: Sequence[BaselineRequest], size: int) -> Iterator[tuple[BaselineRequest, ...]]:
    iterator = iter(requests)
    while batch := tuple(itertools.islice(iterator, size)):
        yield batch


def main() -> None:
    """PEFT, then the engine, then the ratio."""
    parser = model_arguments(__doc__)
    parser.add_argument("--adapters", type=int, default=PeftLoad.num_adapters)
    parser.add_argument("--batch", type=int, default=PeftLoad.max_batch, help="rows of a PEFT batch")
    parser.add_argument("--batches", type=int, default=PeftLoad.num_batches, help="how many batches PEFT gets")
    parser.add_argument("--requests", type=int, default=MIX_REQUESTS, help="of the engine's mix (default %(default)s)")
    arguments = parser.parse_args()
    model = chosen_model(arguments)
    load = PeftLoad(arguments.adapters, arguments.batch, arguments.batches)
    sys.setswitchinterval(SWITCH_SECONDS)
    rows = list(measure_peft(model, load))
    free_device_memory(model.device)
    rows += measure_engine(model, load, arguments.requests)
    rows += ratios(model, load, rows)
    keep_rows(rows, model, arguments.out)


if __name__ == "__main__":
    main()
