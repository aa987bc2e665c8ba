"""Norm, gate, KV and adapters into pages, and the picking of tokens: Triton against the float32 references."""

from __future__ import annotations

import random

import pytest
import torch

from kernels import reference
from kernels.gpu.add_rms_norm import add_rms_norm
from kernels.gpu.draw_tokens import draw_tokens
from kernels.gpu.host_read import read_host
from kernels.gpu.pick_tokens import pick_tokens, resolve_tokens
from kernels.gpu.rope_kv_write import rope_kv_write
from kernels.gpu.silu_mul import silu_mul

ROUNDING = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def assert_near(out: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = ROUNDING[out.dtype]
    torch.testing.assert_close(out.float().cpu(), expected, rtol=tolerance, atol=tolerance * expected.abs().max())


@pytest.mark.parametrize("size", [64, 96, 1000])
@pytest.mark.parametrize("with_branch", [True, False])
def test_add_rms_norm(device: torch.device, dtype: torch.dtype, size: int, with_branch: bool) -> None:
    hidden = torch.randn(5, size, device=device).to(dtype) * 3
    branch = torch.randn(5, size + 8, device=device).to(dtype)[:, :size] if with_branch else None
    weight = torch.randn(size, device=device).to(dtype)
    summed = hidden if branch is None else hidden + branch
    out = add_rms_norm(hidden, branch, weight, 1e-5)
    assert torch.equal(hidden, summed)
    assert_near(out, reference.rms_norm(summed.cpu(), weight.cpu(), 1e-5))


@pytest.mark.parametrize("size", [32, 1030])
def test_silu_mul(device: torch.device, dtype: torch.dtype, size: int) -> None:
    gate_up = torch.randn(3, 2 * size, device=device).to(dtype) * 4
    assert_near(silu_mul(gate_up), reference.silu_mul(gate_up.cpu()))


@pytest.mark.parametrize("shape", [(4, 2, 16), (5, 1, 20), (8, 8, 64)])
@pytest.mark.parametrize("qk_norm", [True, False])
def test_rope_kv_write(
    rng: random.Random, device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int], qk_norm: bool
) -> None:
    num_heads, num_kv_heads, head_dim = shape
    num_tokens, tokens_per_page, num_pages = 6, 4, 5
    qkv = torch.randn(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim, device=device).to(dtype)
    before = qkv.clone()
    pages = torch.randn(num_pages, 2, num_kv_heads, tokens_per_page, head_dim, device=device).to(dtype)
    expected_pages = pages.clone().cpu()
    positions = [rng.randrange(50) for _ in range(num_tokens)]
    slots = rng.sample(range(num_pages * tokens_per_page), num_tokens)
    slots[2] = -1
    frequencies = torch.rand(head_dim // 2)
    angles = torch.arange(50).unsqueeze(1) * frequencies
    rope = torch.stack((angles.cos(), angles.sin()), dim=1).to(device)
    norms = [torch.randn(head_dim, device=device).to(dtype) for _ in range(2)]

    def ints(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    rope_kv_write(qkv, pages, ints(positions), ints(slots), rope, (norms[0], norms[1]) if qk_norm else None, 1e-6)

    heads = before.cpu().view(num_tokens, -1, head_dim)
    q, k, v = heads.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    if qk_norm:
        q, k = (reference.rms_norm(x, norm.cpu(), 1e-6) for x, norm in zip((q, k), norms, strict=True))
    q, k = reference.rope(q, positions, frequencies), reference.rope(k, positions, frequencies)
    live = [i for i in range(num_tokens) if slots[i] >= 0]
    assert_near(qkv.view(num_tokens, -1, head_dim)[live, :num_heads], q[live])
    assert torch.equal(qkv[2], before[2])
    kv = torch.stack((k, v.float()), dim=1)
    reference.kv_write(expected_pages, kv[live], [slots[i] for i in live])
    assert_near(pages, expected_pages.float())
    untouched = torch.ones(num_pages * tokens_per_page, dtype=torch.bool)
    untouched[[slots[i] for i in live]] = False
    flat, wanted = (x.cpu().permute(0, 3, 1, 2, 4).flatten(0, 1) for x in (pages, expected_pages))
    assert torch.equal(flat[untouched], wanted[untouched])


@pytest.mark.parametrize("vocab_size", [7, 4096, 5000])
def test_pick_tokens(device: torch.device, dtype: torch.dtype, vocab_size: int) -> None:
    logits = torch.randn(6, vocab_size, device=device).to(dtype)
    logits[1, [3, 5]] = 9.0  # of equals the lowest id
    logits[2, 4] = float("nan")
    logits[3, 0] = float("inf")
    logits[4, vocab_size - 1] = float("-inf")
    out = torch.full((6,), -7, dtype=torch.int32, device=device)
    pick_tokens(logits, out)
    assert out[[0, 5]].tolist() == [int((logits[i] == logits[i].max()).nonzero()[0]) for i in (0, 5)]
    assert out[1:5].tolist() == [3, -1, -1, -1]


def test_resolve_tokens(device: torch.device) -> None:
    def ints(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    out = ints(9, 9, 9, 9)
    resolve_tokens(ints(5, -1, -1, 8), ints(-1, 2, 1, -1), ints(10, -1, 12), out)
    assert out.tolist() == [5, 12, 0, 8]


def expected_draw(
    scores: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float, uniform: float
) -> tuple[int, float]:
    """The token in float64, and how close the decision was."""
    d = ((scores.max() - scores) / temperature).double()
    if top_k:
        d[d > d.sort().values[min(top_k, len(d)) - 1]] = float("inf")
    ordered = d.sort().values
    sums = (-ordered).exp().cumsum(0)
    kept = int((sums < top_p * sums[-1]).sum())
    if top_p < 1:
        d[d > ordered[kept]] = float("inf")
    if min_p > 0:
        d[(-d).exp() < min_p] = float("inf")
    running = (-d).exp().cumsum(0)
    target = uniform * running[-1]
    token = int((running <= target).sum())
    distances = [(running - target).abs() / running[-1]]
    if top_p < 1:
        distances.append((sums - top_p * sums[-1]).abs() / sums[-1])
    if min_p > 0:
        distances.append((((scores.max() - scores) / -temperature).double().exp() - min_p).abs())
    return token, float(torch.cat(distances).min())


@pytest.mark.parametrize("vocab_size", [50, 5000])
def test_draw_tokens(rng: random.Random, device: torch.device, vocab_size: int) -> None:
    num_rows = 12
    scores = torch.randn(num_rows + 1, vocab_size) * 3
    scores[:, rng.sample(range(vocab_size), 5)] = float("-inf")
    rows = rng.sample(range(num_rows + 1), num_rows)
    params = [
        (
            rng.choice([0.01, 0.7, 1.0, 5.0]),
            rng.choice([0, 1, 3, 40, vocab_size]),
            rng.choice([1.0, 0.9, 0.3, 0.001]),
            rng.choice([0.0, 0.05, 0.4]),
        )
        for _ in rows
    ]
    uniform = [rng.random() for _ in rows]
    out = torch.full((num_rows + 1,), -7, dtype=torch.int32, device=device)
    draw_tokens(
        scores.to(device),
        torch.tensor(rows, device=device),
        torch.tensor(params, device=device).t().contiguous(),
        torch.tensor(uniform, dtype=torch.float64, device=device),
        out,
    )
    num_decided = 0
    for row, (temperature, top_k, top_p, min_p), u in zip(rows, params, uniform, strict=True):
        token, distance = expected_draw(scores[row], temperature, top_k, top_p, min_p, u)
        if distance > 1e-6:  # where float32 cannot turn the decision
            assert int(out[row]) == token, (temperature, top_k, top_p, min_p, u)
            num_decided += 1
    assert num_decided > num_rows // 2
    missing = ({*range(num_rows + 1)} - {*rows}).pop()
    assert int(out[missing]) == -7


@pytest.mark.parametrize("num_words", [0, 1, 511, 512, 5000])
@pytest.mark.parametrize("kind", [torch.int32, torch.float32])
def test_read_host(device: torch.device, rng: random.Random, num_words: int, kind: torch.dtype) -> None:
    """Where a buffer begins does not matter; nothing behind the target is written."""
    begin = rng.randrange(8)
    host = torch.randint(-(2**31), 2**31 - 1, (begin + num_words + 8,), dtype=torch.int32).view(kind)
    host = host.pin_memory() if device.type == "cuda" else host
    target = torch.full((num_words + 8,), 7, dtype=torch.int32, device=device).view(kind)
    read_host(host[begin : begin + num_words], target[:num_words])
    out = target.view(torch.int32).cpu()
    assert torch.equal(out[:num_words], host.view(torch.int32)[begin : begin + num_words])
    assert (out[num_words:] == 7).all()
