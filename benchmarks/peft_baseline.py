"""What transformers + PEFT do with the same requests: greedy, in mixed batches, an adapter a row (`adapter_names`).

PEFT runs the base layers once for the whole batch and each adapter on its own rows. Rows are padded on the left and
a batch ends when its last row does; the next one begins only then.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.utils import logging as transformers_logging

BASE_ROW = "__base__"
"""PEFT's name for a row without an adapter."""


@dataclass(frozen=True)
class BaselineRequest:
    """A request: prompt token ids, most new tokens, and the adapter's name (None for the base model)."""

    prompt_ids: tuple[int, ...]
    max_tokens: int
    adapter: str | None = None


@dataclass(frozen=True)
class BaselineRun:
    """What came back. `margins` is, for each request, how far the chosen token's logit was ahead of the second best at
    the closest of its tokens: where it is tiny, rounding decides."""

    token_ids: tuple[tuple[int, ...], ...]
    margins: tuple[float, ...]
    seconds: float

    @property
    def num_tokens(self) -> int:
        """Tokens generated for all requests together."""
        return sum(len(ids) for ids in self.token_ids)


class PeftBaseline:
    """A checkpoint and adapters (name to directory; at least one) in PEFT, float32, ready to generate.

    PEFT's time to load an adapter grows with the number already loaded, so of many adapters only those of the batch
    at hand are in the model: `max_loaded` at most. Loading is never part of a measured time.
    """

    def __init__(self, checkpoint: Path, adapters: Mapping[str, Path], max_loaded: int = 32) -> None:
        if not adapters:
            raise ValueError("the baseline needs at least one adapter")
        # Loading needs no bars of its own.
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        self._checkpoint = checkpoint
        self._adapters = dict(adapters)
        self._max_loaded = max_loaded
        self._loaded: frozenset[str] = frozenset()
        self._model: Any = None

    def model_with(self, names: Collection[str]) -> Any:
        """The PEFT model with (at least) these adapters loaded; one given out before may be gone from memory."""
        if self._model is None or not self._loaded.issuperset(names):
            everything = len(self._adapters) <= self._max_loaded
            # A model needs some adapter, also for a batch that uses none.
            chosen = sorted(self._adapters if everything else names) or [next(iter(self._adapters))]
            self._model = load_peft_model(self._checkpoint, {name: self._adapters[name] for name in chosen})
            self._loaded = frozenset(chosen)
        return self._model

    def run(
        self,
        requests: Sequence[BaselineRequest],
        max_batch: int = 32,
        ignore_eos: bool = False,
        measure_margins: bool = False,
        advance: Callable[[int], None] = lambda n: None,
    ) -> BaselineRun:
        """Runs `requests` in their order, at most `max_batch` at a time; `seconds` is the time of all batches.

        With `ignore_eos` every request yields exactly its max_tokens, otherwise it ends after an end-of-sequence
        token (which it keeps). `measure_margins` keeps all logits to fill `margins`, which costs some time.
        `advance(n)` is called with the size of each finished batch.
        """
        runs = []
        for first in range(0, len(requests), max_batch):
            runs.append(self.run_batch(requests[first : first + max_batch], ignore_eos, measure_margins))
            advance(len(runs[-1].token_ids))
        return BaselineRun(
            tuple(ids for run in runs for ids in run.token_ids),
            tuple(margin for run in runs for margin in run.margins),
            sum(run.seconds for run in runs),
        )

    def run_batch(
        self, batch: Sequence[BaselineRequest], ignore_eos: bool = False, measure_margins: bool = False
    ) -> BaselineRun:
        """Runs one batch; as `run`."""
        model = self.model_with({request.adapter for request in batch if request.adapter is not None})
        return run_mixed_batch(model, batch, ignore_eos, measure_margins)


def run_mixed_batch(
    model: Any, batch: Sequence[BaselineRequest], ignore_eos: bool = False, measure_margins: bool = False
) -> BaselineRun:
    """Runs one batch on a PEFT model that has its adapters loaded, where that model is; as `PeftBaseline.run`."""
    began = time.perf_counter()
    output = _generate(model, batch, ignore_eos, measure_margins)
    seconds = time.perf_counter() - began
    ends = frozenset() if ignore_eos else _eos_ids(model)
    rows = [_cut(row, request.max_tokens, ends) for row, request in zip(output.tokens, batch, strict=True)]
    margins = [_least_margin(output.logits[i], len(row)) for i, row in enumerate(rows)] if measure_margins else []
    return BaselineRun(tuple(rows), tuple(margins), seconds)


def run_peft_baseline(
    checkpoint: Path,
    adapters: Mapping[str, Path],
    requests: Sequence[BaselineRequest],
    max_batch: int = 32,
    ignore_eos: bool = False,
) -> BaselineRun:
    """Loads model and adapters (not timed), warms up with one short batch, and runs `requests`."""
    baseline = PeftBaseline(checkpoint, adapters)
    baseline.run_batch([BaselineRequest(r.prompt_ids, 2, r.adapter) for r in requests[:max_batch]], ignore_eos)
    return baseline.run(requests, max_batch, ignore_eos)


def load_peft_model(checkpoint: Path, adapters: Mapping[str, Path]) -> Any:
    """A PEFT model in float32 for inference with all of `adapters` loaded; at least one."""
    base = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    model: Any = None
    for name, directory in adapters.items():
        if model is None:
            model = PeftModel.from_pretrained(base, str(directory), adapter_name=name, low_cpu_mem_usage=True)
        else:
            model.load_adapter(str(directory), adapter_name=name, low_cpu_mem_usage=True)
    return model.eval()


@dataclass(frozen=True)
class _Output:
    tokens: list[list[int]]
    logits: torch.Tensor
    """[batch, new_tokens, vocab], or empty."""


@torch.inference_mode()
def _generate(model: Any, batch: Sequence[BaselineRequest], ignore_eos: bool, keep_logits: bool) -> _Output:
    longest = max(len(request.prompt_ids) for request in batch)
    pad = _pad_id(model)
    input_ids = torch.full((len(batch), longest), pad)
    attention_mask = torch.zeros((len(batch), longest), dtype=torch.long)
    for i, request in enumerate(batch):
        input_ids[i, longest - len(request.prompt_ids) :] = torch.tensor(request.prompt_ids)
        attention_mask[i, longest - len(request.prompt_ids) :] = 1
    configuration = GenerationConfig(
        max_new_tokens=max(request.max_tokens for request in batch),
        do_sample=False,
        pad_token_id=pad,
        output_logits=keep_logits,
        return_dict_in_generate=True,
    )
    with _eos_ignored(model) if ignore_eos else nullcontext():
        output = model.generate(
            input_ids=input_ids.to(model.device),
            attention_mask=attention_mask.to(model.device),
            adapter_names=[request.adapter or BASE_ROW for request in batch],
            generation_config=configuration,
        )
    logits = torch.stack(output.logits, dim=1) if keep_logits else torch.empty(0)
    # Waits for the device, so that the time of a batch is that of its work.
    return _Output(output.sequences[:, longest:].tolist(), logits)


@contextmanager
def _eos_ignored(model: Any) -> Iterator[None]:
    # A configuration without end-of-sequence token is filled from the model's own, so that one has to lose it.
    kept = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = None
    try:
        yield
    finally:
        model.generation_config.eos_token_id = kept


def _cut(row: Sequence[int], max_tokens: int, ends: frozenset[int]) -> tuple[int, ...]:
    for i, token in enumerate(row[:max_tokens]):
        if token in ends:
            return tuple(row[: i + 1])
    return tuple(row[:max_tokens])


def _least_margin(logits: torch.Tensor, num_tokens: int) -> float:
    best = logits[:num_tokens].topk(2, dim=-1).values
    return float((best[:, 0] - best[:, 1]).min())


def _eos_ids(model: Any) -> frozenset[int]:
    eos = model.generation_config.eos_token_id
    return frozenset() if eos is None else frozenset([eos] if isinstance(eos, int) else eos)


def _pad_id(model: Any) -> int:
    pad = model.generation_config.pad_token_id
    return int(pad) if pad is not None else min(_eos_ids(model), default=0)
