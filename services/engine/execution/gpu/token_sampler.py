"""Draws tokens on the device, without a word from the host: same order and meaning as the CPU's sampler.

`pick_tokens` has written each row's most likely token already, as part of the step; what is here treats only the rows
that ask for more: penalties, forbidden ids, temperature and its filters, log-probabilities.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kernels.gpu.draw_tokens import draw_tokens
from services.engine.execution.gpu.staging import SmallSends
from services.engine.execution.random_numbers import uniforms
from services.engine.messages import SamplingParams
from services.engine.step import SampleRequest

NOT_FINITE = -1
"""Drawn for a row whose logits are not finite."""

NOTHING_LEFT = -2
"""Drawn for a row of which penalties and forbidden ids leave nothing finite."""


@dataclass(frozen=True, slots=True)
class SampleRow:
    """A row of the logits, who wants a token of it, and the row of the step's tokens that it follows."""

    row: int
    token_row: int
    request: SampleRequest


@dataclass(frozen=True, slots=True)
class Logprobs:
    """On their way to the host: by place in `rows`, the chosen token's log-probability and the most likely ones'."""

    rows: list[int]
    chosen: torch.Tensor
    values: torch.Tensor
    ids: torch.Tensor


class TokenSampler:
    """Lives with the runner; everything happens on the current stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sends = SmallSends(device)

    def warm_up(self, vocab_size: int, dtype: torch.dtype) -> None:
        """Draws once, so that its kernels are compiled."""
        logits = torch.zeros((1, vocab_size), dtype=dtype, device=self._device)
        tokens = torch.zeros(1, dtype=torch.int32, device=self._device)
        params = SamplingParams(temperature=1.0, repetition_penalty=1.1, seed=0, num_logprobs=1)
        self.draw(logits, [SampleRow(0, 0, SampleRequest(params, [0], [], 0))], tokens, tokens.clone())

    def draw(
        self, logits: torch.Tensor, rows: Sequence[SampleRow], tokens: torch.Tensor, drawn: torch.Tensor
    ) -> Logprobs | None:
        """Overwrites `drawn[row]` where a request wants something else than the most likely token.

        logits `[num_rows, vocab_size]` raw; tokens: the ids that the step computed, of which a pending one is needed
        for penalties. Returns log-probabilities if any row asks for them.
        """
        changed = [r for r in rows if _changes_scores(r.request) or r.request.params.temperature > 0]
        if changed:
            self._draw_changed(logits, changed, tokens, drawn)
        logprobs = self._logprobs(logits, [r for r in rows if r.request.params.num_logprobs is not None], drawn)
        self._sends.end_step()
        return logprobs

    def _draw_changed(
        self, logits: torch.Tensor, rows: list[SampleRow], tokens: torch.Tensor, drawn: torch.Tensor
    ) -> None:
        index = self._ints([r.row for r in rows])
        scores = logits.index_select(0, index).float()
        finite = drawn.index_select(0, index) != NOT_FINITE
        self._penalize(scores, rows, tokens)
        left = torch.isfinite(scores.amax(-1))
        picked = scores.argmax(-1).int()
        stochastic = [i for i, r in enumerate(rows) if r.request.params.temperature > 0]
        if stochastic:
            # A row of which nothing is left is drawn from all the same, and the outcome thrown away below.
            safe = torch.where((left & finite).unsqueeze(1), scores, 0.0)
            self._draw_rows(safe, stochastic, [rows[i].request for i in stochastic], picked)
        picked = torch.where(finite, torch.where(left, picked, NOTHING_LEFT), NOT_FINITE)
        drawn.index_copy_(0, index, picked.int())

    def _draw_rows(
        self, scores: torch.Tensor, rows: list[int], requests: list[SampleRequest], picked: torch.Tensor
    ) -> None:
        params = [r.params for r in requests]
        table = torch.tensor(
            [
                [p.temperature for p in params],
                [float(p.top_k) for p in params],
                [p.top_p for p in params],
                [p.min_p for p in params],
            ],
            dtype=torch.float32,
        )
        uniform = torch.from_numpy(uniforms([p.seed for p in params], [r.place for r in requests]))
        draw_tokens(scores, self._ints(rows), self._sends.send(table), self._sends.send(uniform), picked)

    def _penalize(self, scores: torch.Tensor, rows: list[SampleRow], tokens: torch.Tensor) -> None:
        """Penalties, then forbidden ids, on the rows that have them."""
        penalized = [(i, r) for i, r in enumerate(rows) if r.request.params.has_penalty]
        if penalized:
            index = self._ints([i for i, _ in penalized])
            picked = self._penalties([r for _, r in penalized], scores.index_select(0, index), tokens)
            scores.index_copy_(0, index, picked)
        forbidden = [(i, token) for i, r in enumerate(rows) for token in r.request.forbidden_ids]
        if forbidden:
            places = self._ints([i for i, _ in forbidden]), self._ints([token for _, token in forbidden])
            scores.index_put_(places, torch.full((), -math.inf, device=scores.device))

    def _penalties(self, rows: list[SampleRow], scores: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        params = [r.request.params for r in rows]
        counts = self._counts([r.request.output_ids for r in rows], scores.shape[1])
        pending = [i for i, r in enumerate(rows) if r.request.num_pending]
        if pending:
            # The host does not know these tokens yet: they are the ones that this step computed.
            drawn = tokens.index_select(0, self._ints([rows[i].token_row for i in pending]))
            one = torch.ones(len(pending), dtype=counts.dtype, device=counts.device)
            counts.index_put_((self._ints(pending), drawn.long()), one, accumulate=True)
        seen = (counts > 0) | (self._counts([r.request.prompt_ids for r in rows], scores.shape[1]) > 0)
        repetition = self._floats([p.repetition_penalty for p in params])
        scores = torch.where(seen, torch.where(scores < 0, scores * repetition, scores / repetition), scores)
        presence = self._floats([p.presence_penalty for p in params])
        frequency = self._floats([p.frequency_penalty for p in params])
        return scores - (counts > 0) * presence - counts * frequency

    def _counts(self, id_lists: list[Sequence[int]], vocab_size: int) -> torch.Tensor:
        """How often each id stands in each list, float32 `[len(id_lists), vocab_size]`."""
        owners = np.repeat(np.arange(len(id_lists)), [len(ids) for ids in id_lists])
        ids = np.concatenate([np.asarray(ids, dtype=np.int64) for ids in id_lists])
        counts = torch.zeros((len(id_lists), vocab_size), dtype=torch.float32, device=self._device)
        places = self._sends.send(torch.from_numpy(owners)), self._sends.send(torch.from_numpy(ids))
        return counts.index_put_(places, torch.ones((), device=self._device), accumulate=True)

    def _logprobs(self, logits: torch.Tensor, rows: list[SampleRow], drawn: torch.Tensor) -> Logprobs | None:
        if not rows:
            return None
        index = self._ints([r.row for r in rows])
        logprobs = torch.log_softmax(logits.index_select(0, index).float(), dim=-1)
        tokens = drawn.index_select(0, index).clamp(min=0).long()
        most = min(max(r.request.params.num_logprobs or 0 for r in rows), logits.shape[1])
        best = logprobs.topk(most, dim=-1)
        return Logprobs(
            [r.row for r in rows],
            self._fetch(logprobs.gather(1, tokens.unsqueeze(1)).squeeze(1)),
            self._fetch(best.values),
            self._fetch(best.indices),
        )

    def _ints(self, values: list[int]) -> torch.Tensor:
        return self._sends.send(torch.tensor(values, dtype=torch.int64))

    def _floats(self, values: list[float]) -> torch.Tensor:
        return self._sends.send(torch.tensor(values, dtype=torch.float32)).unsqueeze(1)

    def _fetch(self, values: torch.Tensor) -> torch.Tensor:
        if self._device.type == "cpu":
            return values
        return torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)


def _changes_scores(request: SampleRequest) -> bool:
    return bool(request.forbidden_ids) or request.params.has_penalty
