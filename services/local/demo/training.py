"""Teaches a small model to continue prompts, until it does so without a mistake and without doubt."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

IGNORED = -100
BATCH_SIZE = 32
CHECK_EVERY_STEPS = 15
SURE_MARGIN = 1.0
"""Training may end when the right token's logit is ahead of every other by this much, everywhere."""


@dataclass(frozen=True)
class Example:
    """Token ids: a prompt, and what should follow it. Only what follows is learnt."""

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]


@dataclass(frozen=True)
class Progress:
    """How far training is: how many of the lessons come out right, and by which margin the closest call was won."""

    num_steps: int
    loss: float
    num_right: int
    margin: float


def fit(
    model: Any,
    lessons: Sequence[Example],
    *,
    max_steps: int,
    learning_rate: float,
    reading: Sequence[Example] = (),
    seed: int = 0,
    advance: Callable[[int, Progress], None] = lambda steps, progress: None,
) -> Progress:
    """Trains the parameters of `model` that require gradients.

    Each batch has lessons and, if given, as many texts of `reading`, which are learnt as they are but never checked.
    Ends when every lesson comes out right by SURE_MARGIN, or after `max_steps`. `advance(steps, progress)` is called
    after each check.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=max_steps, pct_start=0.1)
    draw = random.Random(seed)
    progress = Progress(0, float("inf"), 0, 0.0)
    model.train()
    for step in range(1, max_steps + 1):
        batch = draw.sample(list(lessons), k=min(BATCH_SIZE, len(lessons)))
        if reading:
            batch += draw.choices(reading, k=BATCH_SIZE)
        loss = _loss(model, batch)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % CHECK_EVERY_STEPS == 0 or step == max_steps:
            num_right, margin = check(model, lessons)
            advance(step - progress.num_steps, progress := Progress(step, float(loss.detach()), num_right, margin))
            if num_right == len(lessons) and margin >= SURE_MARGIN:
                break
    model.eval()
    return progress


@torch.inference_mode()
def check(model: Any, lessons: Sequence[Example]) -> tuple[int, float]:
    """How many lessons come out right, token by token, and the least margin of a token that should come next."""
    input_ids, labels = _collate(lessons)
    logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1]
    labels = labels[:, 1:]
    learnt = labels != IGNORED
    right_logit = logits.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    others = logits.scatter(-1, labels.clamp(min=0).unsqueeze(-1), float("-inf")).amax(-1)
    margins = torch.where(learnt, right_logit - others, float("inf"))
    return int((margins > 0).all(dim=1).sum()), float(margins.min())


def _loss(model: Any, batch: Sequence[Example]) -> torch.Tensor:
    input_ids, labels = _collate(batch)
    logits = model(input_ids=input_ids, use_cache=False).logits
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)


def _collate(batch: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels, both [num_examples, longest]; padded on the right, where no token looks back from."""
    longest = max(len(example.prompt_ids) + len(example.answer_ids) for example in batch)
    input_ids = torch.zeros((len(batch), longest), dtype=torch.long)
    labels = torch.full((len(batch), longest), IGNORED)
    for row, example in enumerate(batch):
        begin, end = len(example.prompt_ids), len(example.prompt_ids) + len(example.answer_ids)
        input_ids[row, :end] = torch.tensor(example.prompt_ids + example.answer_ids)
        labels[row, begin:end] = torch.tensor(example.answer_ids)
    return input_ids, labels
