"""Draws tokens from logits.

Order: penalties, forbidden ids, temperature, top_k, top_p, min_p. Log-probabilities are of the raw logits. A row's
token depends on its own logits, parameters, seed and place only, never on its neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from services.common.errors import Reason, SloraError
from services.engine.execution.random_numbers import uniforms
from services.engine.messages import SamplingParams
from services.engine.step import SampledToken, SampleRequest

_NO_TOKEN = -1
_NUCLEUS_CANDIDATES = 128
"""Tokens looked at first for top_p; a row whose nucleus is larger is sorted whole (60 ms for 32 x 32000)."""


def sample_tokens(
    logits: torch.Tensor, requests: Sequence[SampleRequest], sequence_ids: Sequence[int]
) -> list[SampledToken]:
    """One token for each row of `logits` `[num_rows, vocab_size]` (float32), in the same order.

    A row that is not finite, or of which nothing is left to draw, gives an error instead of a token.
    """
    params = [request.params for request in requests]
    # A sum is not finite as soon as one summand is not.
    finite = torch.isfinite(logits.sum(-1))
    scores = _penalized(logits, requests)
    best, tokens = scores.max(-1)
    left = torch.isfinite(best)
    drawn = [i for i, p in enumerate(params) if p.temperature > 0]
    if drawn:
        rows = torch.tensor(drawn, device=logits.device)
        picked = scores if len(drawn) == len(params) else scores.index_select(0, rows)
        places = [requests[i].place for i in drawn]
        uniform = torch.from_numpy(uniforms([params[i].seed for i in drawn], places)).to(logits.device)
        tokens = tokens.index_copy(0, rows, _draw(picked, [params[i] for i in drawn], uniform))
    logprobs = _logprobs(logits, params, tokens)
    results = []
    for i, (token, is_finite, is_left) in enumerate(zip(tokens.tolist(), finite.tolist(), left.tolist(), strict=True)):
        if is_finite and is_left:
            logprob, top = logprobs.get(i, (None, ()))
            results.append(SampledToken(sequence_ids[i], token, logprob, top))
        else:
            results.append(
                SampledToken(sequence_ids[i], _NO_TOKEN, error=nothing_left() if is_finite else not_finite())
            )
    return results


def not_finite() -> SloraError:
    """The error for logits with NaN or infinity."""
    message = "the model's logits are not finite: its weights or the adapter's overflow with this prompt"
    return SloraError(Reason.INTERNAL, message)


def nothing_left() -> SloraError:
    """The error for a request that forbids every token."""
    message = "no token can be drawn: penalties, or stop ids that min_tokens forbids, leave no finite logit"
    return SloraError(Reason.SAMPLING_INVALID, message)


def _penalized(logits: torch.Tensor, requests: Sequence[SampleRequest]) -> torch.Tensor:
    """Logits after penalties and with forbidden ids at -inf; the same tensor if no row has any."""
    rows = [i for i, request in enumerate(requests) if request.forbidden_ids or request.params.has_penalty]
    if not rows:
        return logits
    scores = logits.clone()
    for i in rows:
        request, row = requests[i], scores[i]
        if request.params.has_penalty:
            _penalize(row, request)
        if request.forbidden_ids:
            row[list(request.forbidden_ids)] = float("-inf")
    return scores


def _penalize(row: torch.Tensor, request: SampleRequest) -> None:
    params = request.params
    output = np.fromiter(request.output_ids, np.int64, len(request.output_ids))
    if params.repetition_penalty != 1.0:
        prompt = np.fromiter(request.prompt_ids, np.int64, len(request.prompt_ids))
        seen = torch.from_numpy(np.unique(np.concatenate((prompt, output)))).to(row.device)
        values = row[seen]
        row[seen] = torch.where(values < 0, values * params.repetition_penalty, values / params.repetition_penalty)
    if len(output) and (params.presence_penalty or params.frequency_penalty):
        ids, counts = np.unique(output, return_counts=True)
        penalty = params.presence_penalty + params.frequency_penalty * counts
        row[torch.from_numpy(ids).to(row.device)] -= torch.from_numpy(penalty.astype(np.float32)).to(row.device)


def _draw(scores: torch.Tensor, params: Sequence[SamplingParams], uniform: torch.Tensor) -> torch.Tensor:
    """A token id for each row, by inverting the filtered distribution's sum in the order of ids at `uniform`.

    Every filter is a lowest score that is kept, so tokens of equal score are kept or dropped together: what is kept
    does not depend on how a sort breaks ties.
    """
    # From the maximum down: 0 for the best token, whatever the temperature.
    temperature = torch.tensor([p.temperature for p in params], dtype=torch.float32, device=scores.device)
    scores = (scores - scores.amax(-1, keepdim=True)).div_(temperature.unsqueeze(1))
    vocab_size = scores.shape[1]
    top_k = [i for i, p in enumerate(params) if 0 < p.top_k < vocab_size]
    if top_k:
        _keep_top_k(scores, top_k, [params[i].top_k for i in top_k])
    top_p = [i for i, p in enumerate(params) if p.top_p < 1.0]
    if top_p:
        _keep_top_p(scores, top_p, [params[i].top_p for i in top_p])
    if any(p.min_p > 0 for p in params):
        lowest = [math.log(p.min_p) if p.min_p > 0 else float("-inf") for p in params]
        _drop_below(scores, torch.tensor(lowest, device=scores.device))
    sums = scores.exp_().cumsum(-1, dtype=torch.float64)
    total = sums[:, -1:]
    # Below the total even after rounding, so that the place found always has a weight.
    target = torch.minimum(uniform.unsqueeze(1) * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(sums, target, right=True).squeeze(1).clamp_(max=vocab_size - 1)


def _drop_below(scores: torch.Tensor, lowest: torch.Tensor) -> None:
    scores.masked_fill_(scores < lowest.unsqueeze(1), float("-inf"))


def _keep_top_k(scores: torch.Tensor, rows: list[int], top_k: list[int]) -> None:
    """Drops scores below the k-th highest of each of `rows`."""
    picked = scores[rows]
    best = picked.topk(max(top_k), dim=-1).values
    last = torch.tensor(top_k, device=scores.device).unsqueeze(1) - 1
    _drop_below(picked, best.gather(1, last).squeeze(1))
    scores[rows] = picked


def _keep_top_p(scores: torch.Tensor, rows: list[int], top_p: list[float]) -> None:
    """Drops scores outside the smallest set whose probabilities sum to top_p, in each of `rows`."""
    picked = scores[rows]
    wanted = torch.tensor(top_p, dtype=torch.float64, device=scores.device).unsqueeze(1)
    # The best score is 0, so neither the exponentials nor their sum overflow.
    wanted = wanted * picked.exp().sum(-1, dtype=torch.float64, keepdim=True)
    candidates = min(_NUCLEUS_CANDIDATES, picked.shape[1])
    lowest, found = _nucleus(picked, wanted, candidates)
    if not bool(found.all()):
        rest = (~found).nonzero().squeeze(1)
        lowest[rest], _ = _nucleus(picked[rest], wanted[rest], picked.shape[1])
    _drop_below(picked, lowest)
    scores[rows] = picked


def _nucleus(scores: torch.Tensor, wanted: torch.Tensor, candidates: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The lowest score of each nucleus, and whether the best `candidates` tokens contain it."""
    best = scores.topk(candidates, dim=-1).values
    before = best.exp().cumsum(-1, dtype=torch.float64)
    found = (before[:, -1:] >= wanted).squeeze(1) | (candidates == scores.shape[1])
    # A token is in the nucleus while those before it do not reach the wanted sum; the first always is.
    kept = (before[:, :-1] < wanted).sum(-1, keepdim=True)
    return best.gather(1, kept).squeeze(1), found


def _logprobs(
    logits: torch.Tensor, params: Sequence[SamplingParams], tokens: torch.Tensor
) -> dict[int, tuple[float, tuple[tuple[int, float], ...]]]:
    """By row that asks for it: its token's log-probability, and those of the most likely tokens, best first."""
    rows = [i for i, p in enumerate(params) if p.num_logprobs is not None]
    if not rows:
        return {}
    index = torch.tensor(rows, device=logits.device)
    logprobs = torch.log_softmax(logits.index_select(0, index), dim=-1)
    chosen = logprobs.gather(1, tokens.index_select(0, index).unsqueeze(1)).squeeze(1).tolist()
    most = min(max(params[i].num_logprobs or 0 for i in rows), logits.shape[1])
    best = logprobs.topk(most, dim=-1)
    values, ids = best.values.tolist(), best.indices.tolist()
    return {
        row: (chosen[j], tuple(zip(ids[j], values[j], strict=True))[: params[row].num_logprobs])
        for j, row in enumerate(rows)
    }
