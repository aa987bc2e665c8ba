"""Sampling against transformers' own logits processors, and what must hold whatever the batch."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from services.common.errors import Reason
from services.engine.execution.random_numbers import uniforms
from services.engine.execution.sampler import sample_tokens
from services.engine.messages import SamplingParams
from services.engine.step import SampledToken, SampleRequest

VOCABULARY = 300


@pytest.fixture
def rng() -> random.Random:
    seed = random.SystemRandom().randrange(2**31)
    print("seed", seed)
    torch.manual_seed(seed)
    return random.Random(seed)


def request(prompt: list[int] | None = None, output: list[int] | None = None, **params: Any) -> SampleRequest:
    return SampleRequest(SamplingParams(**params), prompt or [1], output or [], len(output or []))


def sample(logits: torch.Tensor, requests: list[SampleRequest]) -> list[SampledToken]:
    return sample_tokens(logits, requests, list(range(len(requests))))


def transformers_probabilities(logits: torch.Tensor, one: SampleRequest) -> torch.Tensor:
    """[vocabulary] of one row, as generate would sample from it."""
    p = one.params
    processors = LogitsProcessorList()
    if p.repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(p.repetition_penalty))
    processors.append(TemperatureLogitsWarper(p.temperature))
    if p.top_k:
        processors.append(TopKLogitsWarper(p.top_k))
    if p.top_p < 1.0:
        processors.append(TopPLogitsWarper(p.top_p))
    if p.min_p > 0.0:
        processors.append(MinPLogitsWarper(p.min_p))
    ids = torch.tensor([[*one.prompt_ids, *one.output_ids]])
    return torch.softmax(processors(ids, logits.unsqueeze(0).clone()).double(), dim=-1)[0]


FILTERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.3},
    {"temperature": 2.5},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 10_000},
    {"top_p": 0.2},
    {"top_p": 0.95},
    {"top_p": 1e-6},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"top_k": 20, "top_p": 0.7, "min_p": 0.05, "temperature": 1.7},
    {"repetition_penalty": 1.8},
    {"repetition_penalty": 0.5, "top_p": 0.9},
]


@pytest.mark.parametrize("spread", [1.0, 6.0])
def test_draws_what_transformers_would(rng: random.Random, spread: float) -> None:
    """Every token is the one at which the sum of transformers' probabilities, by id, passes the request's number."""
    num_draws = 60
    for filters in FILTERS:
        logits = torch.randn(VOCABULARY) * spread
        prompt = [rng.randrange(VOCABULARY) for _ in range(30)]
        output = [rng.randrange(VOCABULARY) for _ in range(5)]
        seeds = [rng.randrange(2**64) for _ in range(num_draws)]
        requests = [request(prompt, output, seed=seed, **filters) for seed in seeds]
        sums = transformers_probabilities(logits, requests[0]).cumsum(0)
        numbers = uniforms(seeds, [len(output)] * num_draws)
        for result, number in zip(sample(logits.repeat(num_draws, 1), requests), numbers, strict=True):
            wanted = int(torch.searchsorted(sums, torch.tensor(number), right=True))
            if result.token_id != wanted:
                # Only rounding may choose the neighbour.
                low, high = sorted((result.token_id, wanted))
                assert float((sums[low:high] - number).abs().min()) < 1e-5, (filters, result, wanted)


def test_top_p_over_more_tokens_than_are_looked_at_first(rng: random.Random) -> None:
    logits = torch.randn(2, 5000) * 0.01
    logits[1] *= 1000
    rows = [request(seed=s, top_p=0.9) for s in (1, 2)]
    kept = (transformers_probabilities(logits[0], rows[0]) > 0).sum()
    assert kept > 4000
    drawn = {sample(logits, [request(seed=s, top_p=0.9), rows[1]])[0].token_id for s in range(300)}
    assert len(drawn) > 250


def test_presence_and_frequency_penalties(rng: random.Random) -> None:
    output = [3, 3, 3, 8]
    logits = torch.randn(VOCABULARY)
    expected = logits.clone()
    expected[3] -= 0.5 + 3 * 0.25
    expected[8] -= 0.5 + 0.25
    top = request([8, 9], output, temperature=0.0, presence_penalty=0.5, frequency_penalty=0.25)
    assert sample(logits.unsqueeze(0), [top])[0].token_id == int(expected.argmax())
    boosted = logits.clone()
    boosted[3] = logits.max() + 1.0
    assert sample(boosted.unsqueeze(0), [top])[0].token_id == int(expected.argmax())
    # The prompt alone is penalized by repetition_penalty only.
    boosted[9] = 100.0
    assert sample(boosted.unsqueeze(0), [top])[0].token_id == 9


def test_frequencies_follow_the_distribution() -> None:
    """Chi-square over fixed seeds: the same numbers on every run."""
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0, 0.5, 3.0, 1.5, -2.0]])
    probabilities = torch.softmax(logits[0].double(), dim=-1).numpy()
    num_draws = 20_000
    results = sample(logits.expand(num_draws, -1), [request(seed=seed) for seed in range(num_draws)])
    counts = np.bincount([result.token_id for result in results], minlength=8)
    statistic = float(((counts - num_draws * probabilities) ** 2 / (num_draws * probabilities)).sum())
    assert statistic < 24.3  # the 0.1 % point for 7 degrees of freedom


def test_random_numbers_are_uniform_and_unrelated() -> None:
    by_seed = uniforms(list(range(50_000)), [0] * 50_000)
    by_place = uniforms([12345] * 50_000, list(range(50_000)))
    for numbers in (by_seed, by_place):
        assert numbers.min() >= 0.0
        assert numbers.max() < 1.0
        counts, _ = np.histogram(numbers, bins=100, range=(0, 1))
        assert float(((counts - 500.0) ** 2 / 500.0).sum()) < 149  # the 0.1 % point for 99 degrees of freedom
        assert abs(float(np.corrcoef(numbers[:-1], numbers[1:])[0, 1])) < 4 / math.sqrt(50_000)
    # A seed's second number is not its neighbour's first.
    assert not np.intersect1d(uniforms(list(range(1000)), [1] * 1000), by_seed[:1100]).size
    assert uniforms([2**64 - 1, -1], [0, 0]).tolist() == [uniforms([2**64 - 1], [0])[0]] * 2


def test_a_row_is_drawn_alike_in_any_company(rng: random.Random) -> None:
    requests = []
    for _ in range(40):
        requests.append(
            request(
                [rng.randrange(VOCABULARY) for _ in range(9)],
                [rng.randrange(VOCABULARY) for _ in range(rng.randrange(6))],
                seed=rng.randrange(2**64),
                temperature=rng.choice([0.0, 0.7, 1.0, 1.9]),
                top_k=rng.choice([0, 1, 5, 250]),
                top_p=rng.choice([1.0, 0.9, 0.3]),
                min_p=rng.choice([0.0, 0.2]),
                repetition_penalty=rng.choice([1.0, 1.3]),
                presence_penalty=rng.choice([0.0, 0.4]),
                num_logprobs=rng.choice([None, 0, 3]),
            )
        )
    logits = torch.randn(40, VOCABULARY) * 2
    together = sample(logits, requests)
    for i, one in enumerate(requests):
        alone = sample(logits[i : i + 1], [one])[0]
        assert (alone.token_id, alone.logprob, alone.top) == (
            together[i].token_id,
            together[i].logprob,
            together[i].top,
        )
    some = rng.sample(range(40), 13)
    for place, result in enumerate(sample(logits[some], [requests[i] for i in some])):
        assert result.token_id == together[some[place]].token_id


def test_a_seed_gives_other_numbers_at_other_places() -> None:
    logits = torch.zeros(1, 100_000)
    tokens = [sample(logits, [request(output=[5] * n, seed=9)])[0].token_id for n in range(50)]
    pending = [replace(request(seed=9), place=n) for n in range(50)]
    assert tokens == [sample(logits, [one])[0].token_id for one in pending], "also of tokens that are not known yet"
    assert len(set(tokens)) > 45
    assert tokens == [sample(logits, [request(output=[7] * n, seed=9)])[0].token_id for n in range(50)]


def test_greedy_takes_the_lowest_of_equals() -> None:
    logits = torch.zeros(3, 1000)
    logits[1, [700, 30, 999]] = 2.0
    logits[2, [999]] = 2.0
    greedy = request(temperature=0.0)
    assert [r.token_id for r in sample(logits, [greedy] * 3)] == [0, 30, 999]


def test_tokens_of_equal_score_are_kept_or_dropped_together() -> None:
    logits = torch.full((1, 50), -5.0)
    logits[0, [4, 20, 30]] = 1.0
    drawn = {sample(logits, [request(seed=s, top_k=2)])[0].token_id for s in range(200)}
    assert drawn == {4, 20, 30}


def test_forbidden_ids_are_never_drawn(rng: random.Random) -> None:
    logits = torch.randn(1, 10)
    best = int(logits.argmax())
    for temperature in (0.0, 1.0):
        for seed in range(50):
            params = SamplingParams(temperature=temperature, seed=seed, num_logprobs=10)
            result = sample(logits, [SampleRequest(params, [1], [], 0, forbidden_ids=(best, 0))])[0]
            assert result.token_id not in (best, 0)
            # Log-probabilities are the model's own.
            assert result.top[0][0] == best
            assert result.logprob == pytest.approx(float(torch.log_softmax(logits[0], 0)[result.token_id]), abs=1e-6)


def test_logprobs_are_of_raw_logits(rng: random.Random) -> None:
    logits = torch.randn(4, VOCABULARY) * 3
    requests = [
        request(temperature=0.0),
        request(temperature=0.0, num_logprobs=0),
        request(temperature=3.0, seed=3, num_logprobs=5, repetition_penalty=2.0, top_k=9),
        request(temperature=0.0, num_logprobs=VOCABULARY + 9),
    ]
    results = sample(logits, requests)
    expected = torch.log_softmax(logits.double(), dim=-1)
    assert (results[0].logprob, results[0].top) == (None, ())
    assert results[1].top == ()
    for i in (1, 2, 3):
        assert results[i].logprob == pytest.approx(float(expected[i, results[i].token_id]), abs=1e-5)
    assert [token for token, _ in results[2].top] == expected[2].topk(5).indices.tolist()
    assert len(results[3].top) == VOCABULARY
    assert [value for _, value in results[3].top] == pytest.approx(sorted(expected[3].tolist(), reverse=True), abs=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_give_an_error_for_their_row_only(bad: float, temperature: float) -> None:
    logits = torch.randn(3, 100)
    expected = sample(logits, [request(seed=i, temperature=temperature) for i in range(3)])
    logits[1, 42] = bad
    results = sample(logits, [request(seed=i, temperature=temperature, num_logprobs=1) for i in range(3)])
    assert results[1].error is not None
    assert results[1].error.reason is Reason.INTERNAL
    assert results[1].token_id == -1
    assert results[1].logprob is None
    assert [results[i].token_id for i in (0, 2)] == [expected[i].token_id for i in (0, 2)]
    assert results[0].error is None
    assert results[2].error is None


def test_nothing_left_is_an_error() -> None:
    forbid_all = SampleRequest(SamplingParams(temperature=1.0), [1], [], 0, forbidden_ids=(0, 1, 2))
    error = sample(torch.zeros(1, 3), [forbid_all])[0].error
    assert error is not None
    assert error.reason is Reason.SAMPLING_INVALID, "the caller's doing"
    overflow = request([0], [1], temperature=1.0, repetition_penalty=1e-38)
    result = sample(torch.full((1, 3), 30.0), [overflow])[0]
    assert (result.error is None) == (result.token_id >= 0)


@pytest.mark.parametrize("temperature", [1e-30, 1e-6, 1e30])
def test_extreme_temperatures(temperature: float) -> None:
    logits = torch.tensor([[1.0, 5.0, 3.0, -2.0]])
    drawn = {sample(logits, [request(seed=s, temperature=temperature)])[0].token_id for s in range(200)}
    assert drawn == ({1} if temperature < 1 else {0, 1, 2, 3})
