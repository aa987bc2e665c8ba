"""Compares every answer with transformers + PEFT, and measures what PEFT's mixed batches take for the same requests.

The reference of one answer is PEFT on that request alone, its adapter active the ordinary way. It reads prompt and
answer in one pass; if at every place the most likely next token is the answer's, then greedy decoding with PEFT gives
exactly this answer. Unlike a mixed batch it has no padding and no neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from benchmarks.peft_baseline import BaselineRequest, BaselineRun, PeftBaseline
from services.local.demo.workload import Answer

BATCH_SIZE = 32


@dataclass(frozen=True)
class Comparison:
    """How the answers compare. `mismatches` has a line for each answer that differs from PEFT alone."""

    num_answers: int
    mismatches: tuple[str, ...]
    num_equal_to_mixed_batches: int
    least_margin: float
    """By how much, in logits, the closest of all decisions was made."""
    mixed_batches: BaselineRun

    @property
    def num_matches(self) -> int:
        """Answers that PEFT alone gives token by token."""
        return self.num_answers - len(self.mismatches)


def compare(
    checkpoint: Path,
    adapters: Mapping[str, Path],
    answers: Sequence[Answer],
    advance: Callable[[int], None] = lambda n: None,
) -> Comparison:
    """Runs the answers' requests through PEFT, in mixed batches (timed) and one by one."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    baseline = PeftBaseline(checkpoint, adapters)
    asked = [_as_baseline(tokenizer, answer) for answer in answers]
    baseline.run_batch(asked[:BATCH_SIZE])  # Warms up.
    runs: list[BaselineRun] = []
    mismatches: list[str] = []
    least_margin = float("inf")
    for first in range(0, len(answers), BATCH_SIZE):
        batch = asked[first : first + BATCH_SIZE]
        runs.append(baseline.run_batch(batch))
        model = baseline.model_with({request.adapter for request in batch if request.adapter is not None})
        for request, answer in zip(batch, answers[first:], strict=False):
            difference, margin = _difference(model, tokenizer, request, answer)
            least_margin = min(least_margin, margin)
            if difference:
                mismatches.append(f"{answer.request.adapter or 'base'}, {answer.request.question!r}: {difference}")
        advance(len(batch))
    mixed = BaselineRun(tuple(ids for run in runs for ids in run.token_ids), (), sum(run.seconds for run in runs))
    equal = sum(ids == answer.token_ids for ids, answer in zip(mixed.token_ids, answers, strict=True))
    return Comparison(len(answers), tuple(mismatches), equal, least_margin, mixed)


def _as_baseline(tokenizer: Any, answer: Answer) -> BaselineRequest:
    request = answer.request
    return BaselineRequest(tuple(tokenizer(request.prompt).input_ids), request.max_tokens, request.adapter)


def _difference(model: Any, tokenizer: Any, request: BaselineRequest, answer: Answer) -> tuple[str, float]:
    """What differs from PEFT alone (empty: nothing), and by how much the closest decision was made."""
    if answer.error:
        return answer.error, float("inf")
    if answer.num_prompt_tokens != len(request.prompt_ids):
        return f"the prompt has {answer.num_prompt_tokens} tokens, should have {len(request.prompt_ids)}", float("inf")
    got = answer.token_ids
    end = tokenizer.eos_token_id
    if not got or end in got[:-1] or (got[-1] != end and len(got) != request.max_tokens):
        return f"it does not end where it should: {got}", float("inf")
    logits = _next_token_logits(model, request, got)
    best = logits.topk(2, dim=-1)
    expected = best.indices[:, 0].tolist()
    margin = float((best.values[:, 0] - best.values[:, 1]).min())
    for place, (token, right) in enumerate(zip(got, expected, strict=True)):
        if token != right:
            return f"token {place} is {tokenizer.decode([token])!r}, should be {tokenizer.decode([right])!r}", margin
    text = tokenizer.decode(got, skip_special_tokens=True)
    if text != answer.text:
        return f"its text is {answer.text!r}, should be {text!r}", margin
    return "", margin


@torch.inference_mode()
def _next_token_logits(model: Any, request: BaselineRequest, answer_ids: Sequence[int]) -> torch.Tensor:
    """Logits [num_answer_tokens, vocab] of what follows the prompt, the prompt and one answer token, and so on."""
    if request.adapter is not None:
        model.set_adapter(request.adapter)
    with model.disable_adapter() if request.adapter is None else nullcontext():
        input_ids = torch.tensor([[*request.prompt_ids, *answer_ids[:-1]]])
        logits: torch.Tensor = model(input_ids=input_ids, use_cache=False).logits
    return logits[0, len(request.prompt_ids) - 1 :].float()
