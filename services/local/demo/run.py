"""The demo, from nothing to the verdict."""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from services.local.demo import report
from services.local.demo.delivery import LEFT_IN_S3, deliver
from services.local.demo.materials import BASE_NAME, Materials, obtain_materials
from services.local.demo.pool_picture import draw_pool
from services.local.demo.pool_watch_client import PoolWatch, watch_pool
from services.local.demo.reference import compare
from services.local.demo.workload import MANY_CLIENTS, Act, Served, acts_for, serve_all
from services.local.narrator import Narrator
from services.local.service_options import check_options
from services.local.stack import LocalStack

STORE_OPTIONS = {"arena_bytes": 128 * 2**20}
ENGINE_OPTIONS = {"num_pages": 512, "max_running": 128}
SETTLE_SECONDS = 10.0


@dataclass(frozen=True)
class _Run:
    served: Served
    watch: PoolWatch
    pool_faults: list[str]
    traffic: report.AdapterTraffic


def run_demo(state_dir: Path, out_dir: Path, narrator: Narrator) -> int:
    """Runs everything; 0 if every stream matched and no page is lost, 1 otherwise."""
    began = time.perf_counter()
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    check_options(STORE_OPTIONS, ENGINE_OPTIONS, {}, os.environ)
    narrator.heading("1. A small Llama and its adapters")
    materials = obtain_materials(state_dir / "demo-cache", narrator)
    adapters = {**materials.manners, **materials.random_adapters}
    acts = acts_for(materials)

    narrator.heading("2. S3 → adapter store → engine → gateway")
    run = _run_stack(state_dir / "demo", materials, adapters, acts, narrator)
    picture = out_dir / "pool.png"
    draw_pool(run.watch.samples, run.watch.num_pages, picture)

    narrator.heading("3. The same with transformers + PEFT")
    with narrator.task("Comparing every stream", total=len(run.served.answers)) as task:
        comparison = compare(materials.checkpoint, adapters, run.served.answers, task.advance)

    narrator.heading("4. What came out")
    report.show_answers(narrator, run.served.answers)
    report.show_figures(narrator, run.served, comparison)
    report.show_traffic(narrator, run.traffic, run.watch.num_evictions, len(adapters))
    narrator.line(f"  the pool over time: {picture}")
    all_well = report.show_verdict(narrator, comparison, run.pool_faults)
    narrator.line(f"  {'all well' if all_well else 'FAILED'}, {time.perf_counter() - began:.0f} s in all")
    return 0 if all_well else 1


def _run_stack(
    state_dir: Path, materials: Materials, adapters: dict[str, Path], acts: tuple[Act, ...], narrator: Narrator
) -> _Run:
    shutil.rmtree(state_dir, ignore_errors=True)
    stack = LocalStack(
        state_dir,
        materials.checkpoint,
        base_model=BASE_NAME,
        store_options=STORE_OPTIONS,
        engine_options=ENGINE_OPTIONS,
        report=narrator.line,
    )
    try:
        with narrator.task("Starting", total=len(stack.process_names)) as task:
            stack.start(lambda name: task.advance(1, name))
            task.note = ", ".join(stack.process_names)
        with narrator.task("Delivering adapters", total=len(adapters)) as task:
            deliver(stack, adapters, task.advance)
            task.note = f"{len(adapters) - len(LEFT_IN_S3)} uploaded, {len(LEFT_IN_S3)} registered from S3"
        num_requests = sum(len(act.requests) for act in acts)
        with narrator.task("Serving", total=num_requests) as task:
            task.note = f"requests by up to {MANY_CLIENTS} clients at once"
            served, watch, faults = asyncio.run(_serve(stack, acts, task.advance))
        return _Run(served, watch, faults, report.read_traffic(stack.metrics_urls["engine-0"]))
    finally:
        with narrator.task("Stopping", total=1):
            stack.stop()


async def _serve(
    stack: LocalStack, acts: tuple[Act, ...], advance: Callable[[int], None]
) -> tuple[Served, PoolWatch, list[str]]:
    (engine,) = stack.engine_addresses
    async with watch_pool(engine) as watch:
        served = await serve_all(stack.gateway_address, acts, advance)
        last = await watch.settled(SETTLE_SECONDS)
    return served, watch, report.pool_faults(last, watch.num_pages)
