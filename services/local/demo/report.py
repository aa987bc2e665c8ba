"""What the demo says at its end: the answers, the figures, the verdict."""

from __future__ import annotations

import statistics
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families
from rich.table import Table
from rich.text import Text

from services.local.demo import corpus
from services.local.demo.adapters import RECIPES
from services.local.demo.pool_watch_client import PoolSample
from services.local.demo.reference import Comparison
from services.local.demo.workload import Answer, Served
from services.local.narrator import Narrator

MOST_MISMATCHES_SHOWN = 10


@dataclass(frozen=True)
class AdapterTraffic:
    """What the engine counted: sequences that found their adapter in the pool or had to wait for it, and loads."""

    num_hits: int
    num_misses: int
    num_loads: int
    mean_load_seconds: float


def read_traffic(metrics_url: str) -> AdapterTraffic:
    """Reads the engine's counters from its Prometheus metrics."""
    with urllib.request.urlopen(metrics_url, timeout=10) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    totals: dict[str, float] = {}
    for sample in (sample for family in families for sample in family.samples):
        totals[sample.name] = totals.get(sample.name, 0.0) + sample.value
    loads = totals.get("slora_engine_adapter_load_seconds_count", 0.0)
    return AdapterTraffic(
        num_hits=int(totals["slora_engine_adapter_hits_total"]),
        num_misses=int(totals["slora_engine_adapter_misses_total"]),
        num_loads=int(loads),
        mean_load_seconds=totals.get("slora_engine_adapter_load_seconds_sum", 0.0) / max(loads, 1.0),
    )


def show_answers(narrator: Narrator, answers: Sequence[Answer]) -> None:
    """Questions × adapters: what each said to each question."""
    said = {(answer.request.question, answer.request.adapter): answer.text.strip() for answer in answers}
    table = Table(title="The same questions, ten ways", title_justify="left", expand=False)
    table.add_column("question")
    table.add_column("adapter")
    table.add_column("rank, targets")
    table.add_column("answer", overflow="fold")
    for question in corpus.SHOWN_QUESTIONS:
        for adapter in (None, *RECIPES):
            last = adapter == list(RECIPES)[-1]
            table.add_row(
                question if adapter is None else "",
                adapter or "base model",
                RECIPES[adapter].describe() if adapter else "",
                Text(said.get((question, adapter), "(no answer)")),
                end_section=last,
            )
    narrator.console.print(table)


def show_figures(narrator: Narrator, served: Served, comparison: Comparison) -> None:
    """Throughput beside PEFT's, and the times to the first token."""
    mixed = comparison.mixed_batches
    table = Table(title="The same requests, same run, same CPU", title_justify="left")
    for column in ("", "slora", "transformers + PEFT"):
        table.add_column(column, justify="left" if not column else "right")
    num_requests = len(served.answers)
    table.add_row("requests/s", f"{num_requests / served.seconds:.1f}", f"{num_requests / mixed.seconds:.1f}")
    table.add_row("tokens/s", f"{served.num_tokens / served.seconds:.0f}", f"{mixed.num_tokens / mixed.seconds:.0f}")
    waits = sorted(answer.first_token_seconds for answer in served.answers if not answer.error)
    if len(waits) > 1:
        centiles = statistics.quantiles(waits, n=100, method="inclusive")
        table.add_row("first token, p50", f"{centiles[49] * 1000:.0f} ms", "")
        table.add_row("first token, p99", f"{centiles[98] * 1000:.0f} ms", "")
    narrator.console.print(table)
    narrator.line("  slora: through gateway and streams, adapters loaded on demand from the adapter store.")
    narrator.line(
        "  PEFT: in process, mixed batches of 32 (adapter_names), each batch's adapters loaded before the clock starts."
    )


def show_traffic(narrator: Narrator, traffic: AdapterTraffic, num_evictions: int, num_adapters: int) -> None:
    """Loads, hits and evictions."""
    narrator.line(
        f"  {num_adapters} adapters: {traffic.num_loads} loads ({traffic.mean_load_seconds * 1000:.1f} ms on average) "
        f"and {num_evictions} evictions"
    )
    narrator.line(
        f"  sequences: {traffic.num_hits} found their adapter in the pool, {traffic.num_misses} waited for it"
    )


def pool_faults(last: PoolSample, num_pages: int) -> list[str]:
    """What is wrong with the pool when nothing runs any more; empty if every page is accounted for."""
    faults = []
    counted = last.num_free_pages + last.num_kv_pages + last.num_cached_pages + last.num_adapter_pages
    if counted != num_pages:
        faults.append(f"free, KV and adapter pages are {counted} together, the pool has {num_pages}")
    if last.num_kv_pages != 0:
        faults.append(f"{last.num_kv_pages} KV pages are still in use though nothing runs")
    return faults


def show_verdict(narrator: Narrator, comparison: Comparison, faults: Sequence[str]) -> bool:
    """Says how many streams matched and whether the pool is whole; True if all is well."""
    for mismatch in comparison.mismatches[:MOST_MISMATCHES_SHOWN]:
        narrator.line(f"  differs: {mismatch}")
    narrator.line(
        f"  {comparison.num_matches} of {comparison.num_answers} streams match transformers + PEFT token by token, "
        f"each request alone"
    )
    narrator.line(
        f"  {comparison.num_equal_to_mixed_batches} of {comparison.num_answers} also match PEFT's mixed batches; "
        f"the closest decision of all was made by {comparison.least_margin:.2g} logits"
    )
    for fault in faults:
        narrator.line(f"  the pool is not whole: {fault}")
    if not faults:
        narrator.line("  the pool: every page accounted for, no KV in use")
    return not comparison.mismatches and not faults
