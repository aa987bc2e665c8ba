"""Compiles the accelerator's kernels where there is none, as an engine of a model of 7 or 8 billion parameters does.

The interpreter, which tests use without an accelerator, takes what the compiler would refuse. Here the ops are called
with Triton's own compiler and a driver that launches nothing, ahead as an engine does and once more: nothing may be
left to compile then. Prints a line of JSON for each kernel: its name, the
registers of a thread, and how many bytes of its stack a thread needs, which is where registers go that do not fit.

Run: TRITON_INTERPRET=0 python -m tests.kernels.gpu.compile_kernels [--arch 90]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from kernels.gpu import early_launch
from kernels.gpu.compile_ahead import compile_ahead

DEVICE, DTYPE, TILE = torch.device("cpu"), torch.bfloat16, 128
RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)")
HIDDEN, INNER, NUM_HEADS, HEAD_DIM, NUM_LAYERS, MAX_ADAPTERS, VOCAB = 4096, 11008, 32, 128, 2, 4, 32000
TOKENS_PER_PAGE, NUM_PAGES, MAX_LEN = 16, 2, 64


class Compiler:
    """Stands for a driver of a device of compute capability `arch`; keeps what it is given to load."""

    launcher_cls = staticmethod(lambda source, metadata: lambda *arguments: None)

    def __init__(self, arch: int) -> None:
        self.arch = arch
        self.loaded: dict[str, bytes] = {}

    @property
    def utils(self) -> Compiler:
        """Itself."""
        return self

    def get_current_device(self) -> int:
        """The only one."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """The only one."""
        return 0

    def get_current_target(self) -> GPUTarget:
        """What is compiled for."""
        return GPUTarget("cuda", self.arch, 32)

    def get_device_properties(self, device: int) -> dict[str, int]:
        """As an H200 has them."""
        return {"max_shared_mem": 232448}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[str, None, int, int, int]:
        """Keeps it."""
        self.loaded[f"{name} {len(self.loaded)}"] = binary
        # Without a module it would be loaded at each launch.
        return name, None, 0, 0, 1024


class Model:
    """What ops are called with: tensors of a model's shapes, all zero."""

    def __init__(self, num_kv_heads: int) -> None:
        from kernels.gpu.adapter_tables import GpuAdapterTables, LoraGroup

        kv = num_kv_heads * HEAD_DIM
        self.num_kv_heads = num_kv_heads
        self.qkv = LoraGroup(0, HIDDEN, (HIDDEN, kv, kv))
        self.qkv_of_two = LoraGroup(0, HIDDEN, (HIDDEN // 2, kv // 2, kv // 2), rank_parts=2)
        self.gate_up = LoraGroup(4, HIDDEN, (INNER, INNER))
        self.groups = [self.qkv, LoraGroup(3, HIDDEN, (HIDDEN,)), self.gate_up, LoraGroup(6, INNER, (HIDDEN,))]
        ints = torch.zeros(3, MAX_ADAPTERS, NUM_LAYERS, 7, dtype=torch.int32)
        self.tables = GpuAdapterTables(torch.zeros(MAX_ADAPTERS, 64, dtype=torch.int32), *ints, tile_elems=TILE)
        self.kv_pages = empty(NUM_PAGES, 2, num_kv_heads, TOKENS_PER_PAGE, HEAD_DIM)
        self.pages = self.kv_pages.view(NUM_PAGES, -1)
        self.rope = torch.zeros(MAX_LEN, 2, HEAD_DIM // 2)
        self.norm_weight = empty(HIDDEN)
        self.qk_norm = empty(HEAD_DIM), empty(HEAD_DIM)
        self.num_qkv_columns = HIDDEN + 2 * kv


def empty(*shape: int, dtype: torch.dtype = DTYPE) -> torch.Tensor:
    """Zeros."""
    return torch.zeros(shape, dtype=dtype)


def call_row_lora(model: Model, batch: int, rank: int) -> None:
    """The LoRA of decoded tokens, of few or many, of small or large ranks."""
    from kernels.gpu.adapter_tables import FEW_RANKS
    from kernels.gpu.expand_add_rms_norm import expand_add_rms_norm
    from kernels.gpu.expand_rope_kv_write import Rotation, expand_rope_kv_write
    from kernels.gpu.planned_shrink import planned_shrink
    from kernels.gpu.row_expand import planned_expand, row_expand
    from kernels.gpu.row_plan import RowPlanner, as_they_come
    from kernels.gpu.row_product import row_product
    from kernels.gpu.row_shrink import num_splits_for, row_shrink, shrink_work

    slots, tables, pages = empty(batch, dtype=torch.int32), model.tables, model.pages
    u = [
        empty(num_splits_for(batch, group, TILE), batch, 256 * group.num_modules, dtype=torch.float32)
        for group in model.groups
    ]
    x = [empty(batch, group.in_features) for group in model.groups]
    y = [empty(batch, sum(group.out_features)) for group in model.groups]
    planner = RowPlanner(tables, model.groups, batch)
    rotation = Rotation(slots, slots, model.rope, None, 1e-5)
    if planner.needs_plan(batch):
        plan = planner.plan(slots)
        for number in range(4):
            planned_shrink(x[number], plan, 0, number, pages, u[number])
            planned_expand(u[number], plan, 0, number, pages, y[number], rank)
        tokens = plan.token_order(0, 0)
        expand_rope_kv_write(u[0], tokens, 0, model.kv_pages, tables, model.qkv, y[0], rotation, rank)
        for number in (1, 3):
            branch, group = y[number], model.groups[number]
            expand_add_rms_norm(u[number], slots, 0, pages, tables, group, y[1], branch, model.norm_weight, 1e-5, x[1])
        return
    for number, group in enumerate(model.groups):
        row_shrink(x[number], shrink_work(slots, 0, pages, tables, group, u[number], rank))
        row_expand(u[number], slots, 0, pages, tables, group, y[number], rank)
    if rank <= FEW_RANKS:
        for number, group in enumerate(model.groups):
            work = shrink_work(slots, 0, pages, tables, group, u[number], rank)
            row_product(x[number], empty(y[number].shape[1], group.in_features), None, work)
    for one in (rotation, rotation._replace(qk_norm=model.qk_norm)):
        expand_rope_kv_write(u[0], as_they_come(slots), 0, model.kv_pages, tables, model.qkv, y[0], one, rank)


def call_segment_lora(model: Model) -> None:
    """The LoRA of prompts, and of decoded tokens in runs; and what joins that of several processes."""
    from kernels.gpu.rank_join import rank_join
    from kernels.gpu.segment_expand import segment_expand
    from kernels.gpu.segment_shrink import RUN_BLOCK_M, num_segment_splits, plan_segments, segment_shrink

    for total, block_m in ((24, 64), (192, 64), (192, RUN_BLOCK_M)):
        plan = plan_segments([(0, 200, 0)], block_m, DEVICE)
        u = empty(num_segment_splits(plan.shape[1], block_m), 200, -(-total // 16) * 16, dtype=torch.float32)
        x, y = empty(200, HIDDEN), empty(200, model.num_qkv_columns)
        segment_shrink(x, plan, 0, model.pages, model.tables, model.qkv, u, total, block_m)
        segment_expand(u, plan, 0, model.pages, model.tables, model.qkv, y, total, block_m, max_rank=total // 3)
    slots = empty(8, dtype=torch.int32)
    rank_join(empty(2, 8, 96), slots, 0, model.tables, model.qkv_of_two, empty(8, 192))


def call_attention(model: Model) -> None:
    """What lies between the projections of a layer's attention."""
    from kernels.gpu.attention_parts import AttentionParts
    from kernels.gpu.decode_attention import decode_attention
    from kernels.gpu.prefill_attention import plan_prefill, prefill_attention, tile_tokens
    from kernels.gpu.rope_kv_write import rope_kv_write

    slots, qkv = empty(8, dtype=torch.int32), empty(8, model.num_qkv_columns)
    q, out = qkv.view(8, -1, HEAD_DIM)[:, :NUM_HEADS], empty(8, NUM_HEADS, HEAD_DIM)
    block_tables, parts = empty(8, 4, dtype=torch.int32), AttentionParts.make(1024, 256, HEAD_DIM, DEVICE)
    for qk_norm in (None, model.qk_norm):
        rope_kv_write(qkv, model.kv_pages, slots, slots, model.rope, qk_norm, 1e-5)
    for splits in (1, 4):
        decode_attention(q, model.kv_pages, block_tables, slots, 0.1, out, parts, splits)
    chunks = plan_prefill([(0, 8, 0, 0)], tile_tokens(NUM_HEADS, model.num_kv_heads, DTYPE), DEVICE)
    for splits in (1, 4):
        prefill_attention(q, model.kv_pages, block_tables, replace(chunks, num_splits=splits), 0.1, out, None, parts)


def call_the_rest(model: Model) -> None:
    """Norms, gates, products of few rows, and tokens."""
    from kernels.gpu.add_rms_norm import add_rms_norm
    from kernels.gpu.draw_tokens import draw_tokens
    from kernels.gpu.host_read import read_host
    from kernels.gpu.pick_tokens import pick_tokens, resolve_tokens
    from kernels.gpu.row_product import row_product
    from kernels.gpu.silu_mul import silu_mul

    slots, floats = empty(8, dtype=torch.int32), torch.float32
    for branch in (None, empty(8, HIDDEN)):
        add_rms_norm(empty(8, HIDDEN), branch, model.norm_weight, 1e-5)
    silu_mul(empty(8, 2 * INNER))
    for rows, size in ((1, HIDDEN), (8, HIDDEN), (32, HIDDEN), (32, INNER)):
        row_product(empty(rows, size), empty(HIDDEN, size), empty(HIDDEN))
    read_host(slots, slots)
    pick_tokens(empty(8, VOCAB), slots)
    resolve_tokens(slots, slots, slots, slots)
    rows, filters, uniform = empty(8, dtype=torch.int64), empty(4, 8, dtype=floats), empty(8, dtype=torch.float64)
    draw_tokens(empty(8, VOCAB, dtype=floats), rows, filters, uniform, slots)


def resources(name: str, binary: bytes) -> dict[str, Any]:
    """Of a compiled kernel."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        said = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = RESOURCES.search(said.stdout)
    assert found is not None, said.stdout + said.stderr
    registers, stack, shared = map(int, found.groups())
    return {"kernel": name.split()[0], "registers": registers, "stack": stack, "shared": shared}


def main() -> None:
    """Compiles all of them and prints what they need."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, default=90, help="compute capability, such as 80 or 90 (default)")
    arch = parser.parse_args().arch
    assert os.environ.get("TRITON_INTERPRET") != "1", "the interpreter compiles nothing"
    compiler = Compiler(arch)
    driver.set_active(compiler)  # type: ignore[arg-type]
    # Before the ops are imported, which take it by its name.
    early_launch.has_early_launch = lambda device: arch >= 90  # type: ignore[assignment]
    model, other = Model(num_kv_heads=8), Model(num_kv_heads=NUM_HEADS)

    def call_all() -> None:
        for one in (model, other):
            call_attention(one)
        call_segment_lora(model)
        call_the_rest(model)
        for batch, rank in ((1, 8), (1, 64), (8, 8), (32, 8), (128, 64)):
            call_row_lora(model, batch, rank)

    number = compile_ahead(call_all, 2, lambda: None)
    assert compiler.loaded == {}, "something was launched"
    late: list[str] = []
    knobs.runtime.jit_post_compile_hook = lambda **what: late.append(what["repr"])
    call_all()
    assert (len(compiler.loaded), late) == (number, [])
    with ThreadPoolExecutor(2) as threads:
        for line in threads.map(lambda item: resources(*item), compiler.loaded.items()):
            print(json.dumps(line))


if __name__ == "__main__":
    main()
