"""Carries out steps on an accelerator. The host is at most one step ahead: it submits a step while another computes."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch

from kernels.gpu.compile_ahead import compile_ahead
from kernels.gpu.pick_tokens import pick_tokens
from kernels.gpu.prefill_attention import PrefillPlan
from kernels.gpu.segment_shrink import RUN_BLOCK_M
from services.engine.config import EngineSettings
from services.engine.execution.communicator import Communicator, SoleProcess, Traffic
from services.engine.execution.gpu.adapter_device import GpuAdapterDevice, GroupRanks
from services.engine.execution.gpu.device_state import make_device_state
from services.engine.execution.gpu.parallel_triton_step import ParallelTritonStep
from services.engine.execution.gpu.staging import PinnedRing, StepInputs
from services.engine.execution.gpu.step_arrays import arrange, cut_step, shifted_row
from services.engine.execution.gpu.step_graphs import StepGraphs
from services.engine.execution.gpu.step_shape import StepAdapters, StepArrays, StepShape, most_integers
from services.engine.execution.gpu.step_sizes import CaptureSizes, SizedStep, StepSizes, capture_sizes
from services.engine.execution.gpu.step_tensors import Segments, StepTensors
from services.engine.execution.gpu.token_sampler import NOT_FINITE, Logprobs, SampleRow, TokenSampler
from services.engine.execution.gpu.triton_step import TritonStep
from services.engine.execution.loaded_model import load_model
from services.engine.execution.sampler import not_finite, nothing_left
from services.engine.execution.step_layout import StepLayout, lay_out
from services.engine.model.checkpoint import Weights
from services.engine.model.step_ops import Group, StepOps
from services.engine.step import BASE_SLOT, SampledToken, StepPlan

logger = logging.getLogger(__name__)

T = TypeVar("T")

_LAYERS_OF_WARM_UP = 2
"""All layers launch the same, but that the first has no branch to add."""


@dataclass(slots=True)
class StepHandle:
    """A submitted step: where its tokens arrive, and for whom."""

    rows: list[SampleRow]
    sequence_ids: list[int]
    drawn: torch.Tensor
    logprobs: Logprobs | None
    done: torch.cuda.Event | None


class GpuRunner:
    """The model, the pool and the adapters' tables on one accelerator. Owned by the core's thread.

    Only `adapter_device.write` and `enter` may be called from another thread while a step runs. On a CPU it works too,
    slowly, in triton's interpreter, which is how it is tested without an accelerator.
    """

    max_in_flight = 2

    def __init__(
        self,
        settings: EngineSettings,
        checkpoint: Weights | None = None,
        communicator: Communicator | None = None,
        sizes: CaptureSizes | None = None,
    ) -> None:
        """Loads the checkpoint, allocates the pool, captures steps. Raises CheckpointError or ValueError.

        checkpoint: where the weights come from, if not from the directory that the settings name. communicator: this
        process's end where several share the model; the weights are then a part, and all must be made at once. sizes:
        of the steps that are captured, if not as `capture_sizes` has it.
        """
        self._device = torch.device(settings.device)
        if self._device.index is not None:
            torch.cuda.set_device(self._device)
        self._communicator = communicator or SoleProcess()
        model = load_model(settings, checkpoint, self._communicator)
        self._decoder, self.config = model.decoder, model.config
        self.max_model_len = model.max_model_len
        self.vocab_size = model.config.vocab_size
        self.eos_token_ids = model.config.eos_token_ids
        self.pool_config = model.pool.config
        self.adapter_device = GpuAdapterDevice(model.pool, model.groups, settings.max_adapters, model.partition)
        self._limits = model.step_limits
        max_batch, max_tokens = settings.num_places, settings.max_step_tokens + settings.num_places
        sizes = sizes or capture_sizes(max_batch, settings.max_step_tokens)
        self._state = make_device_state(model, self.adapter_device, max_batch, max_tokens, sizes.max_chunks)
        self._tile_tokens = self._state.cuts.tile_tokens
        max_pages = -(-self.max_model_len // self.pool_config.tokens_per_page)
        most = most_integers(max_tokens, 2 * max_batch + sizes.max_chunks, max_pages, self._tile_tokens)
        self._inputs = StepInputs(most, self._device)
        self._results = PinnedRing(max_tokens, self._device)
        self._sampler = TokenSampler(self._device)
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        tp_size = model.partition.tp_size
        self._make_step: Callable[[StepTensors], StepOps] = partial(TritonStep, self._state)
        if tp_size > 1:
            self._make_step = partial(ParallelTritonStep, self._state, self._communicator)
        self._sizes = StepSizes(sizes, max_pages, self._tile_tokens, tp_size)
        self._graphs = StepGraphs(self._compute_sized, tp_size)
        # By sequence: the row of `drawn` that the last step wrote for it.
        self._rows_drawn: dict[int, int] = {}
        if self._stream is not None:
            # All that was made above is filled on the stream of this thread, which the runner's would not wait for.
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            with self._on_stream():
                self._compile()
                self.warm_up()
                self._graphs.capture(self._sizes.captured_steps())

    def warm_up(self) -> None:
        """Computes a step of every size, and draws, for nothing: no kernel is compiled later.

        A capture cannot wait for the compiler, nor for a library to load what it needs.
        """
        self._compute_every_size()
        with torch.inference_mode():
            self._sampler.warm_up(self.vocab_size, self.config.dtype)

    def _compute_every_size(self) -> None:
        for step in self._sizes.all_steps():
            self._compute_sized(step, _LAYERS_OF_WARM_UP)

    def _compile(self) -> None:
        """Of steps: where a kernel that is left out would have written indices they find zeros; a sampler would not."""
        # The compiler makes good use of some sixteen threads.
        share = len(os.sched_getaffinity(0)) // self._communicator.partition.tp_size
        device, began = torch.cuda.current_device(), time.monotonic()
        number = compile_ahead(self._compute_every_size, max(1, min(16, share)), lambda: torch.cuda.set_device(device))
        logger.info("compiled %d kernels, or found them compiled, in %.1f s", number, time.monotonic() - began)

    def submit(self, plan: StepPlan) -> StepHandle:
        """Begins a step, behind those submitted before; KV of all its tokens will be in the pool.

        Raises ValueError for a plan that leaves the pool, the vocabulary or the model's length.
        """
        return self._begin(plan, self._submit)

    def follow(self, plan: StepPlan) -> None:
        """`submit` in a process that draws no tokens: it is told them."""
        self._begin(plan, self._follow)

    def _begin(self, plan: StepPlan, submit: Callable[[StepLayout], T]) -> T:
        layout = lay_out(plan, self._rows_drawn, self._limits)
        try:
            with torch.inference_mode(), self._on_stream():
                return submit(layout)
        except Exception:
            # What was launched before the failure still writes to the step's pages, which the caller gives away now.
            if self._stream is not None:
                self._stream.synchronize()
            raise

    def collect(self, handle: StepHandle) -> list[SampledToken]:
        """Waits for a step; one token for each chunk with a `sample`, in the plan's order."""
        if handle.done is not None:
            handle.done.synchronize()
        tokens = handle.drawn.tolist()
        logprobs = _logprobs_by_row(handle.logprobs, handle.rows)
        return [
            _sampled_token(sequence_id, tokens[r.row], logprobs.get(r.row))
            for sequence_id, r in zip(handle.sequence_ids, handle.rows, strict=True)
        ]

    def execute(self, plan: StepPlan) -> list[SampledToken]:
        """`submit` and `collect` in one."""
        return self.collect(self.submit(plan))

    def _submit(self, layout: StepLayout) -> StepHandle:
        logits, rows, sequence_ids = self._compute(layout)
        logprobs = self._sampler.draw(logits, rows, self._state.resolved, self._state.drawn)
        num_rows = self._share_drawn(rows, sequence_ids)
        return StepHandle(rows, sequence_ids, *self._fetch(num_rows, logprobs))

    def _follow(self, layout: StepLayout) -> None:
        _, rows, sequence_ids = self._compute(layout)
        self._share_drawn(rows, sequence_ids)

    def _compute(self, layout: StepLayout) -> tuple[torch.Tensor, list[SampleRow], list[int]]:
        """The step's logits, their most likely tokens in `drawn`, and whose they are."""
        decodes = self._ranks(layout.adapter_slots.tolist())
        prompts = self._ranks(slot for _, _, slot in layout.segments)
        may_run = self._sizes.may_run_together(layout.num_decode, _adapters(decodes).max_rank)
        cuts = cut_step(layout, self._tile_tokens, may_run)
        joined = _adapters(map(GroupRanks.join, decodes, prompts), bool(cuts.run_blocks))
        step = self._sizes.find(layout, cuts, joined)
        self._inputs.send(arrange(layout, cuts, step.shape))
        logits = self._graphs.run(step)
        return logits, _sample_rows(layout, step.shape), [chunk.sequence_id for chunk, _ in layout.sampled]

    def _ranks(self, slots: Iterable[int]) -> tuple[GroupRanks, ...]:
        return self.adapter_device.max_ranks(set(slots) - {BASE_SLOT})

    def _share_drawn(self, rows: list[SampleRow], sequence_ids: list[int]) -> int:
        """Notes where the next step finds what was drawn, and tells the other processes, or hears it from process 0.

        Returns how many rows there are.
        """
        self._rows_drawn = {number: r.row for number, r in zip(sequence_ids, rows, strict=True)}
        num_rows = max((r.row for r in rows), default=-1) + 1
        if num_rows and self._communicator.partition.tp_size > 1:
            self._communicator.broadcast(self._state.drawn[:num_rows], Traffic.CONTROL)
        return num_rows

    def _fetch(
        self, num_rows: int, logprobs: Logprobs | None
    ) -> tuple[torch.Tensor, Logprobs | None, torch.cuda.Event | None]:
        """Sends the step's tokens to the host, behind its log-probabilities."""
        if self._stream is None:
            return self._state.drawn[:num_rows].clone(), logprobs, None
        buffer, done = self._results.turn()
        buffer[:num_rows].copy_(self._state.drawn[:num_rows], non_blocking=True)
        if done is not None:
            done.record()
        return buffer[:num_rows], logprobs, done

    def _compute_sized(self, step: SizedStep, num_layers: int | None = None) -> torch.Tensor:
        """Computes what lies in the inputs, for adapters whose ranks are as large as that."""
        ops = self._make_step(self._tensors(step.shape, step.adapters, self._bounded_ranks(step.adapters)))
        with torch.inference_mode():
            logits = self._decoder.forward(ops, num_layers)
            if len(logits):
                pick_tokens(logits, self._state.drawn)
        return logits

    def _bounded_ranks(self, adapters: StepAdapters) -> tuple[GroupRanks, ...]:
        """The most that such adapters have, by group."""
        bound, modules = adapters.max_rank, self.adapter_device.groups
        return tuple(
            GroupRanks(bound * modules[group].num_modules, bound) if group in adapters.groups else GroupRanks()
            for group in Group
        )

    def _tensors(self, shape: StepShape, adapters: StepAdapters, ranks: tuple[GroupRanks, ...]) -> StepTensors:
        arrays: StepArrays[torch.Tensor] = StepArrays(*self._inputs.views(shape.arrays))
        mixed, cuts = shape.num_prefill > 0, self._state.cuts
        prefill_splits = cuts.prefill_splits(shape.num_prefill)
        return StepTensors(
            token_ids=arrays.token_ids,
            source=arrays.source,
            positions=arrays.positions,
            slots=arrays.slots,
            num_decode=shape.num_decode,
            block_tables=arrays.block_tables,
            context_lens=arrays.context_lens,
            num_splits=cuts.decode_splits(max(shape.num_decode, 1)),
            adapter_slots=arrays.adapter_slots,
            row_groups=adapters.groups if shape.num_rows else frozenset(),
            max_row_rank=adapters.max_rank,
            segment_slots=arrays.segment_slots if shape.num_segment_slots else None,
            prefill=PrefillPlan(arrays.tiles, self._tile_tokens, prefill_splits) if mixed else None,
            segments=Segments(arrays.blocks, ranks) if shape.num_blocks else None,
            runs=Segments(arrays.run_blocks, ranks, RUN_BLOCK_M) if shape.num_run_blocks else None,
            logit_rows=arrays.logit_rows if mixed else None,
        )

    def _on_stream(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)


def _adapters(ranks: Iterable[GroupRanks], in_runs: bool = False) -> StepAdapters:
    by_group = dict(zip(Group, ranks, strict=True))
    groups = frozenset(group for group, most in by_group.items() if most.total)
    return StepAdapters(groups, max(most.single for most in by_group.values()), in_runs)


def _sample_rows(layout: StepLayout, shape: StepShape) -> list[SampleRow]:
    """Logits are of every row where there are no prompts, else of the sampled ones in their order."""
    rows = []
    for place, (chunk, token_row) in enumerate(layout.sampled):
        row = shifted_row(token_row, layout, shape)
        if chunk.sample is not None:
            rows.append(SampleRow(place if shape.num_prefill else row, row, chunk.sample))
    return rows


def _sampled_token(
    sequence_id: int, token: int, logprobs: tuple[float, tuple[tuple[int, float], ...]] | None
) -> SampledToken:
    if token < 0:
        error = not_finite() if token == NOT_FINITE else nothing_left()
        return SampledToken(sequence_id, token, error=error)
    logprob, top = logprobs or (None, ())
    return SampledToken(sequence_id, token, logprob, top)


def _logprobs_by_row(
    logprobs: Logprobs | None, rows: Sequence[SampleRow]
) -> dict[int, tuple[float, tuple[tuple[int, float], ...]]]:
    if logprobs is None:
        return {}
    wanted = {r.row: r.request.params.num_logprobs for r in rows}
    chosen, values, ids = logprobs.chosen.tolist(), logprobs.values.tolist(), logprobs.ids.tolist()
    return {
        row: (chosen[i], tuple(zip(ids[i], values[i], strict=True))[: wanted[row]])
        for i, row in enumerate(logprobs.rows)
    }
