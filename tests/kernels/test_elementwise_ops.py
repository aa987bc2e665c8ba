"""Norm, rotary embedding, gate and linear against the reference."""

from __future__ import annotations

import random

import pytest
import torch

from kernels import reference
from kernels.linear import linear, linear_into, pack_weight
from kernels.rms_norm import rms_norm
from kernels.rope import apply_rope
from kernels.silu_mul import silu_mul
from services.engine.model.config import RopeConfig
from services.engine.model.rope import rope_frequencies, signed_rope_table

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


@pytest.fixture
def rng() -> random.Random:
    seed = random.SystemRandom().randrange(2**31)
    print("seed", seed)
    torch.manual_seed(seed)
    return random.Random(seed)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_rms_norm(rng: random.Random, dtype: torch.dtype) -> None:
    for shape in [(1, 1), (3, 48), (5, 4, 12), (2, 1000)]:
        x, weight = (torch.randn(shape) * 3).to(dtype), torch.randn(shape[-1]).to(dtype)
        expected = reference.rms_norm(x, weight, 1e-5)
        torch.testing.assert_close(
            rms_norm(x, weight, 1e-5).float(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
        )


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_silu_mul(rng: random.Random, dtype: torch.dtype) -> None:
    gate_up = (torch.randn(5, 74) * 4).to(dtype)
    expected = reference.silu_mul(gate_up)
    torch.testing.assert_close(
        silu_mul(gate_up).float(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * expected.abs().max()
    )


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("head_dim", [2, 12, 20, 64])
def test_rope(rng: random.Random, head_dim: int, dtype: torch.dtype) -> None:
    config = RopeConfig(theta=500.0)
    positions = [0, 1, 2, 63, rng.randrange(64)]
    # A strided part of a larger tensor, as in the decoder.
    heads = torch.randn(5, 7, head_dim).to(dtype)
    expected = reference.rope(heads[:, :4], positions, rope_frequencies(config, head_dim)[0])
    untouched = heads[:, 4:].clone()
    cos, sin = signed_rope_table(config, head_dim, 64, dtype)[positions].unsqueeze(2).unbind(1)
    apply_rope(heads[:, :4], cos, sin)
    tolerance = TOLERANCE[dtype] * 2
    torch.testing.assert_close(heads[:, :4].float(), expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(heads[:, 4:], untouched)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("packed", [False, True])
def test_linear(rng: random.Random, packed: bool, dtype: torch.dtype) -> None:
    for tokens, inputs, outputs in [(1, 1, 1), (1, 48, 96), (3, 37, 19), (33, 80, 211), (100, 17, 64)]:
        x, weight, bias = (torch.randn(*shape).to(dtype) for shape in [(tokens, inputs), (outputs, inputs), (outputs,)])
        expected = x.double() @ weight.double().T
        given = pack_weight(weight) if packed else weight
        room = torch.full((tokens, outputs), torch.nan, dtype=dtype)
        assert linear_into(room, x, given) is room
        torch.testing.assert_close(room, linear(x, given), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
        for b in (None, bias):
            out = linear(x, given, b).double()
            wanted = expected if b is None else expected + b.double()
            torch.testing.assert_close(out, wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * inputs**0.5)


def test_packed_linear_gives_a_row_the_same_bits_in_any_company(rng: random.Random) -> None:
    weight = pack_weight(torch.randn(256, 192))
    x = torch.randn(70, 192)
    together = linear(x, weight)
    for _ in range(10):
        begin = rng.randrange(70)
        end = rng.randint(begin + 1, 70)
        assert torch.equal(linear(x[begin:end], weight), together[begin:end])
