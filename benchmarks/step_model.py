"""How long an engine's steps and loads take: fitted to rows that were measured on an H200.

The rows are those of `benchmarks/results/h200.json`, Llama-7B's shape in bfloat16, LoRA on q, k, v, o: decode steps of
several batches, without and with adapters; the quiet steps of *churn*, whose sequences are longer; steps with prompts;
prefill; loads. Those of *paper_mix* are left out: they are what `benchmarks.simulate_paper` holds the model to.

A step's time is a sum, as its parts follow one another on the device: the base model's products, each decode, each
token that decodes look back on, what a prompt adds to any step, and what LoRA adds to decodes and prompts. The products
take as long as reading the weights, or as multiplying the step's tokens by them, whichever is longer. What LoRA adds to
decodes goes by the bytes that they read of adapters, but for the first, which are read beside the products: where the
engine computes sequences of one adapter together (ADR 32; the rule is the engine's) each adapter's once, else those of
each sequence's own, shared or not.

Left out, because no row of a step tells it: that sequences that are computed together have kernels of their own; and
that where they are not, bytes that several of them read come out of the cache. Left out to keep it simple: the sizes to
which steps are padded, and a batch of one, which has kernels of its own too.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.adapter_ranks import RANKS, ranks_in_turn
from benchmarks.record import RESULTS
from kernels.gpu.segment_shrink import RUN_BLOCK_M
from services.engine.execution.gpu.step_arrays import most_run_blocks
from services.engine.execution.gpu.step_sizes import may_run_together

RANK_BYTES = 2**21
"""Of an adapter of Llama-7B's q, k, v, o in bfloat16, for each of its ranks."""

PAGE_BYTES = 2**23
"""16 tokens of KV."""

# What `benchmarks.gpu.bench_engine` measures.
DECODE_CONTEXT, CHURN_CONTEXT = 256 + 128 / 2, 256 + 768 / 2
CHURN_BATCH = 32
PREFILL_TOKENS = 128 * 256

Rows = Iterable[Mapping[str, Any]]

WORKLOAD: Mapping[str, object] = {"model": "llama-7b", "targets": "attn"}
"""Of the rows that count here: other models and other adapters are measured too."""


def adapter_bytes(rank: int) -> int:
    """Of packed weights."""
    return rank * RANK_BYTES


def adapter_pages(rank: int) -> int:
    """Of the pool."""
    return -(-adapter_bytes(rank) // PAGE_BYTES)


def lora_bytes_read(num_decodes: int, adapters: Sequence[tuple[int, int]]) -> int:
    """By a step's decodes, of adapters of these sizes in bytes, each with the number of sequences that have it."""
    if runs_together(num_decodes, adapters):
        return sum(size for size, _ in adapters)
    return sum(size * count for size, count in adapters)


def runs_together(num_decodes: int, adapters: Sequence[tuple[int, int]]) -> bool:
    """Whether a runner computes sequences of one adapter together: its rule (ADR 32), by numbers instead of slots."""
    max_rank = max((size for size, _ in adapters), default=0) // RANK_BYTES
    num_blocks = sum(-(-count // RUN_BLOCK_M) for _, count in adapters)
    most_blocks = most_run_blocks(sum(count for _, count in adapters))
    return may_run_together(num_decodes, max_rank) and num_blocks <= most_blocks


@dataclass(frozen=True, slots=True)
class StepWork:
    """What there is to do in a step.

    `num_context` are the tokens that decodes look back on, themselves included; `lora_bytes` is what decodes read of
    adapters (`lora_bytes_read`); `is_loading` says that an adapter is being loaded beside it.
    """

    num_decodes: int
    num_context: int
    num_prompt_tokens: int
    lora_bytes: int = 0
    num_lora_prompt_tokens: int = 0
    is_loading: bool = False


@dataclass(frozen=True)
class StepModel:
    """Seconds of a step for each thing in it, and of a load.

    `token` is what the products cost a token of a prompt, or a decode where there are so many that weights are read in
    less; `prompt_step` is paid by a step with a prompt in it, `lora_step` by one in which any decode has an adapter,
    `lora_prompt_step` by one in which any prompt has; `beside_load` is the share by which a step is longer while an
    adapter is loaded. `lora_step` may be less than nothing: the first bytes are read beside the products (ADR 37).
    """

    weights: float
    decode: float
    context_token: float
    token: float
    prompt_step: float
    lora_step: float
    lora_byte: float
    lora_prompt_step: float
    lora_prompt_token: float
    beside_load: float
    load: float
    load_byte: float

    def step_seconds(self, work: StepWork) -> float:
        """Of one step."""
        seconds = (
            max(self.weights, self.token * (work.num_decodes + work.num_prompt_tokens))
            + self.decode * work.num_decodes
            + self.context_token * work.num_context
            + self.lora_prompt_token * work.num_lora_prompt_tokens
        )
        seconds += self.prompt_step * (work.num_prompt_tokens > 0)
        if work.lora_bytes:
            seconds += max(0.0, self.lora_step + self.lora_byte * work.lora_bytes)
        seconds += self.lora_prompt_step * (work.num_lora_prompt_tokens > 0)
        return seconds * (1 + self.beside_load) if work.is_loading else seconds

    def load_seconds(self, num_bytes: int) -> float:
        """From an adapter's grant of pages until it may be used, one load at a time."""
        return self.load + self.load_byte * num_bytes


@functools.cache
def measured_model(setting: str = "S1", way: str = "lent") -> StepModel:
    """The model of a setting, fitted to the recorded rows; `way` is how adapters come: lent, streamed or memory."""
    return fit(json.loads((RESULTS / "h200.json").read_text())["rows"], setting, way)


def fit(rows: Rows, setting: str, way: str) -> StepModel:
    """Least squares of relative errors. Raises ValueError for rows that are missing, or a setting that is not known.

    A batch of one is left out: no engine that is busy runs it.
    """
    if setting not in RANKS:
        raise ValueError(f"a setting is one of {', '.join(RANKS)}, not {setting!r}")
    rows = list(rows)
    steps = [step for step in base_steps(rows) if step[0] > 1]
    weights, decode, context_token = _least_squares(
        [(1, n, context) for n, context, _ in steps], [s for *_, s in steps]
    )
    prefill = {name: _value(rows, "prefill", name, "seconds") for name in {"base", setting}}
    load, load_byte = _fit_load(rows, way)
    model = StepModel(
        weights=weights,
        decode=decode,
        context_token=context_token,
        token=prefill["base"] / PREFILL_TOKENS,
        prompt_step=0.0,
        **_fit_decode_lora(rows, setting),
        lora_prompt_step=0.0,
        lora_prompt_token=(prefill[setting] - prefill["base"]) / PREFILL_TOKENS,
        # Where it is less than what can be measured, a ratio may be below 1.
        beside_load=0.0 if setting == "base" else max(0.0, _value(rows, "churn", setting, "p50_ratio") - 1),
        load=load,
        load_byte=load_byte,
    )
    return _fit_prompt_steps(model, rows, setting)


def base_steps(rows: Rows) -> list[tuple[int, float, float]]:
    """Decode steps without adapters that were measured: sequences, tokens of context of all together, seconds."""
    rows = list(rows)
    decode = _find(rows, "decode", "base", "tpot_ms")
    churn = [row for setting in ("S1", "S2") for row in _find(rows, "churn", setting, "quiet_p50_ms")]
    return [(row["batch"], row["batch"] * DECODE_CONTEXT, row["value"] / 1e3) for row in decode] + [
        (CHURN_BATCH, CHURN_BATCH * CHURN_CONTEXT, row["value"] / 1e3) for row in churn
    ]


def lora_steps(rows: Rows, setting: str) -> list[tuple[int, int, float]]:
    """The same with adapters, a different one for each sequence: sequences, bytes of their adapters, seconds."""
    return [
        (row["batch"], _bytes_in_turn(setting, row["batch"]), row["value"] / 1e3)
        for row in _find(rows, "decode", setting, "tpot_ms")
    ]


def mixed_steps(rows: Rows, setting: str) -> list[tuple[StepWork, float]]:
    """Steps that were measured with a prompt in them, all with adapters, a different one for each, or none; seconds."""
    return [
        (_mixed_work(setting, row["batch"], row["prompt"]), row["value"] / 1e3)
        for row in _find(rows, "mixed", setting, "step_ms")
    ]


def _mixed_work(setting: str, batch: int, prompt: int) -> StepWork:
    lora_bytes = _bytes_in_turn(setting, batch)
    return StepWork(batch, round(batch * DECODE_CONTEXT), prompt, lora_bytes, prompt if lora_bytes else 0)


def _bytes_in_turn(setting: str, count: int) -> int:
    """Of so many adapters, whose ranks are the setting's in turn."""
    return sum(map(adapter_bytes, ranks_in_turn(setting, count)))


def _fit_prompt_steps(model: StepModel, rows: Sequence[Mapping[str, Any]], setting: str) -> StepModel:
    """What is left of steps with prompts when all else is known, so that the squares of relative errors are least."""

    def left(model: StepModel, setting: str) -> float:
        steps = mixed_steps(rows, setting)
        lefts = [seconds - model.step_seconds(work) for work, seconds in steps]
        return float(np.average(lefts, weights=[seconds**-2 for _, seconds in steps]))

    model = dataclasses.replace(model, prompt_step=left(model, "base"))
    return model if setting == "base" else dataclasses.replace(model, lora_prompt_step=left(model, setting))


def _fit_decode_lora(rows: Sequence[Mapping[str, Any]], setting: str) -> dict[str, float]:
    if setting == "base":
        return {"lora_step": 0.0, "lora_byte": 0.0}
    base = {
        row["batch"]: row["value"] / 1e3 for row in _find(rows, "decode", "base", "tpot_ms") if "adapters" not in row
    }
    steps = [step for step in lora_steps(rows, setting) if step[0] > 1]
    added = [seconds - base[batch] for batch, _, seconds in steps]
    lora_step, lora_byte = _least_squares([(1, num_bytes) for _, num_bytes, _ in steps], added)
    return {"lora_step": lora_step, "lora_byte": lora_byte}


def _fit_load(rows: Sequence[Mapping[str, Any]], way: str) -> tuple[float, float]:
    """Seconds of a load and of its bytes; adapters' sizes are known, as those of all that were ever loaded are."""
    found = [row for setting in ("S1", "S2") for row in _find(rows, "load", setting, "usable_ms", way=way)]
    loads = [(row["packed_bytes"], row["value"] / 1e3) for row in found if row.get("known_size", True)]
    load, load_byte = _least_squares([(1, num_bytes) for num_bytes, _ in loads], [seconds for _, seconds in loads])
    return load, load_byte


def _least_squares(parts: Sequence[Sequence[float]], seconds: Sequence[float]) -> tuple[float, ...]:
    """What each part costs, so that the squares of the sums' relative errors are least."""
    if len(parts) < (num_parts := max(map(len, parts), default=1)):
        raise ValueError(f"{num_parts} costs cannot be told from {len(parts)} rows")
    measured = np.asarray(seconds, dtype=np.float64)
    # Columns of like size: bytes and ones differ by nine orders of magnitude.
    relative = np.asarray(parts, dtype=np.float64) / measured[:, None]
    scale = np.abs(relative).max(axis=0)
    costs, _, rank, _ = np.linalg.lstsq(relative / scale, np.ones_like(measured), rcond=None)
    if rank < len(scale):
        raise ValueError(f"{len(scale)} costs cannot be told apart from these {len(parts)} rows")
    return tuple(float(cost) for cost in costs / scale)


def _value(rows: Rows, bench: str, setting: str, metric: str) -> float:
    return float(_find(rows, bench, setting, metric)[0]["value"])


def _find(rows: Rows, bench: str, setting: str, metric: str, **labels: object) -> list[Mapping[str, Any]]:
    wanted = {"bench": bench, "setting": setting, "metric": metric, **labels}
    if not (found := [row for row in rows if ({**WORKLOAD, **wanted}).items() <= row.items()]):
        raise ValueError(f"no row has {', '.join(f'{name} {value}' for name, value in wanted.items())}")
    return found
