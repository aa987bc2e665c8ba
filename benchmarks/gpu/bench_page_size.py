"""Claim: pages of 16 tokens cost kernels nothing against larger ones, and waste the least memory among those that do.

For pages of 8 to 64 tokens: decode attention (a layer), LoRA of 128 decoded tokens with as many adapters (32 layers,
S1 and S2), of Llama-7B (every head its own keys and values) and Llama-3-8B (4 heads share them), each page at a random
place. And what is allotted and not used: on average half a page a sequence and the rest of an adapter's last page, as a
share of what the paper's mix keeps of them (256 sequences of 388 tokens; adapters of rank 8 on q k v o).

Run: python -m benchmarks.gpu.bench_page_size
"""

from __future__ import annotations

import dataclasses
import gc

import torch

from benchmarks.command_line import take_no_options
from benchmarks.gpu.bench_attention import DTYPE, HEAD_DIM, MAX_POOL_BYTES, Pool, Shape, bench_decode
from benchmarks.gpu.lora_steps import LLAMA_3_8B, LLAMA_7B, AdapterPool, DecodeCase, DecodeStep, ModelShape, pool_elems

TOKENS_PER_PAGE = (8, 16, 32, 64)
HEADS = {LLAMA_7B.name: (32, 32), LLAMA_3_8B.name: (32, 8)}
MIX_TOKENS = 388


def page_elems(model: ModelShape, tokens_per_page: int) -> int:
    """Elements of a page of one layer."""
    return 2 * HEADS[model.name][1] * tokens_per_page * HEAD_DIM


def run_attention(memory: torch.Tensor) -> None:
    """Decode attention, by model, batch and page."""
    for heads, (batch, context) in ((h, b) for h in HEADS.values() for b in ((32, 320), (128, 320), (256, 512))):
        for tokens in TOKENS_PER_PAGE:
            shape = Shape(batch, context, *heads, tokens_per_page=tokens)
            seconds = bench_decode(Pool(memory, shape), None, 1)
            print(f"page size {tokens:3} tokens  {shape}  {seconds * 1e6:.1f} us", flush=True)


def run_lora() -> None:
    """LoRA of decoded tokens, by model, setting and page."""
    for model in (LLAMA_7B, LLAMA_3_8B):
        shapes = [dataclasses.replace(model, page_elems=page_elems(model, tokens)) for tokens in TOKENS_PER_PAGE]
        cases = [DecodeCase(shape, "attn", mix, 128) for mix in ("S1", "S2") for shape in shapes]
        pool = AdapterPool(max(pool_elems(case) for case in cases))
        for case in cases:
            tokens = case.shape.page_elems // page_elems(model, 1)
            print(f"page size {tokens:3} tokens  {case.name}  {DecodeStep(pool, case).time():.3f} ms", flush=True)
        del pool
        gc.collect()
        torch.cuda.empty_cache()


def print_waste() -> None:
    """Half a page each, against what is used."""
    for model in (LLAMA_7B, LLAMA_3_8B):
        adapter = 8 * sum(g.num_modules * g.in_features + sum(g.out_features) for g in model.take("attn"))
        for tokens in TOKENS_PER_PAGE:
            kv = tokens / 2 / MIX_TOKENS
            rest = -adapter % page_elems(model, tokens) / adapter
            print(f"page size {tokens:3} tokens  {model.name:5} unused: KV {kv:.1%}, an adapter of rank 8 {rest:.1%}")


def main() -> None:
    """Runs it all."""
    take_no_options(__doc__)
    torch.manual_seed(0)
    print(torch.cuda.get_device_name(), torch.__version__)
    print_waste()
    free_bytes, _ = torch.cuda.mem_get_info()
    memory = torch.empty(min(MAX_POOL_BYTES, free_bytes // 2) // DTYPE.itemsize, dtype=DTYPE, device="cuda").normal_()
    run_attention(memory)
    del memory
    torch.cuda.empty_cache()
    run_lora()


if __name__ == "__main__":
    main()
