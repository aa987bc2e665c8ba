"""The benchmarks of an accelerator run from end to end, with a tiny model on a CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.gpu.bench_model import TINY, keep_rows
from benchmarks.gpu.bench_peft import PeftLoad, measure_engine, measure_peft, ratios
from benchmarks.gpu.bench_services import ServicesLoad, measure


@pytest.mark.slow
def test_services_serve_a_mix_and_a_trace(tmp_path: Path) -> None:
    load = ServicesLoad(num_requests=6, num_adapters=4, rates=(8, 4), seconds=1, num_clients=2)
    rows = [row for part in measure(TINY, load, {"open_loop"}, tmp_path) for row in part]
    metrics = {(row.get("rate"), row["metric"]): row["value"] for row in rows}
    assert (metrics[4, "requests"], metrics[8, "requests"]) == (4, 8)
    assert metrics[4, "failed"] == metrics[8, "failed"] == 0
    assert metrics[None, "knee_requests_per_s"] in (0, 4, 8)
    out = tmp_path / "tiny.json"
    keep_rows(rows, TINY, out, ["bench_services.py", "--tiny"])
    content = json.loads(out.read_text())
    assert content["rows"] == rows
    assert content["command"] == "python -m benchmarks.gpu.bench_services --tiny"


# transformers' and PEFT's own notes to each other.
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_peft_and_the_engine_serve_the_same_requests() -> None:
    load = PeftLoad(num_adapters=2, max_batch=3, num_batches=2)
    rows = [*measure_peft(TINY, load), *measure_engine(TINY, load, num_requests=8)]
    rows += ratios(TINY, load, rows)
    rates = {(row["system"], row["requests"]): row["value"] for row in rows if "requests_per_s" in str(row["metric"])}
    assert rates.keys() == {("peft", 6), ("slora", 6), ("slora", 8), ("slora/peft", 6), ("slora/peft", 8)}
    assert rates["slora/peft", 8] == pytest.approx(
        float(str(rates["slora", 8])) / float(str(rates["peft", 6])), rel=0.01
    )
