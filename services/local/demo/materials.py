"""What the demo serves: the base model and its adapters, made once and kept for the next run."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from benchmarks.peft_baseline import BaselineRequest, PeftBaseline
from services.local.demo import corpus
from services.local.demo.adapters import RECIPES, train_adapters
from services.local.demo.base_model import make_base_model
from services.local.demo.random_adapters import make_random_adapter
from services.local.demo.training import Progress
from services.local.narrator import Narrator, Task

BASE_NAME = "tiny-llama"
NUM_RANDOM = 200
RANDOM_MAX_TOKENS = 24
CLEAR_MARGIN = 0.01
_CANDIDATES_AT_ONCE = 32
_MANIFEST = "materials.json"
_RECIPE_FILES = ("corpus", "training", "base_model", "adapters", "random_adapters", "materials")
_RECIPE_PACKAGES = ("torch", "transformers", "peft", "tokenizers", "safetensors")


@dataclass(frozen=True)
class Materials:
    """Where everything lies; `random_questions` says what each random adapter (by name) is asked."""

    directory: Path
    random_questions: Mapping[str, str]

    @property
    def checkpoint(self) -> Path:
        """The base model."""
        return self.directory / BASE_NAME

    @property
    def manners(self) -> dict[str, Path]:
        """The adapters that speak in a manner."""
        return {name: self.directory / "manners" / name for name in RECIPES}

    @property
    def random_adapters(self) -> dict[str, Path]:
        """The adapters for scale."""
        return {name: self.directory / "random" / name for name in self.random_questions}


def recipe_hash() -> str:
    """Changes with anything that the materials are made from: the code of their recipe, and the libraries."""
    digest = hashlib.sha256()
    for file in _RECIPE_FILES:
        digest.update(Path(__file__).with_name(f"{file}.py").read_bytes())
    for package in _RECIPE_PACKAGES:
        digest.update(f"{package}=={version(package)};".encode())
    return digest.hexdigest()[:16]


def obtain_materials(cache: Path, narrator: Narrator) -> Materials:
    """Takes the materials from `cache` or makes them there; those of other recipes are removed."""
    place = cache / recipe_hash()
    if not (place / _MANIFEST).exists():
        cache.mkdir(parents=True, exist_ok=True)
        making = Path(tempfile.mkdtemp(dir=cache, prefix="making-"))
        try:
            _make(making, narrator)
            shutil.rmtree(place, ignore_errors=True)
            making.replace(place)  # At once, so that an interrupted run leaves nothing that looks complete.
        finally:
            shutil.rmtree(making, ignore_errors=True)
        for other in cache.iterdir():
            if other != place:
                shutil.rmtree(other, ignore_errors=True)
    else:
        narrator.line(f"  kept from an earlier run: {place}")
    return Materials(place, json.loads((place / _MANIFEST).read_text())["random_questions"])


def _make(directory: Path, narrator: Narrator) -> None:
    with narrator.task("Training the base model", total=1) as task:
        base, tokenizer = make_base_model(directory / BASE_NAME, lambda _, progress: _show(task, BASE_NAME, progress))
        base.name_or_path = BASE_NAME
        task.advance(1, f"{base.num_parameters():,} parameters")
    with narrator.task("Training adapters", total=len(RECIPES)) as task:
        trained: set[str] = set()

        def show(name: str, progress: Progress) -> None:
            _show(task, name, progress)
            task.advance(0 if name in trained or not trained else 1)
            trained.add(name)

        train_adapters(base, tokenizer, directory / "manners", lambda name, _, progress: show(name, progress))
        task.advance(1, f"{len(RECIPES)}, with peft {version('peft')}")
    with narrator.task("Making random adapters", total=NUM_RANDOM) as task:
        questions = _choose_random_adapters(base, tokenizer, directory, task)
    (directory / _MANIFEST).write_text(json.dumps({"random_questions": questions}, indent=1))


def _show(task: Task, name: str, progress: Progress) -> None:
    task.advance(0, f"{name}: step {progress.num_steps}, loss {progress.loss:.3f}, {progress.num_right} right")


def _choose_random_adapters(
    base: Any, tokenizer: PreTrainedTokenizerFast, directory: Path, task: Task
) -> dict[str, str]:
    """Makes random adapters until there are enough that say something of their own, and say it clearly.

    Random weights now and then put two tokens so close together that rounding decides between them; then two right
    programs may differ. Such adapters are of no use to compare programs by, nor are those that change no answer.
    """
    plain_answers = _plain_answers(directory, tokenizer)
    chosen: dict[str, str] = {}
    seed = 0
    while len(chosen) < NUM_RANDOM:
        candidates: dict[str, Path] = {}
        for _ in range(_CANDIDATES_AT_ONCE):
            name = f"random-{seed:03d}"
            candidates[name] = directory / "random" / name
            make_random_adapter(base, candidates[name], seed, BASE_NAME)
            seed += 1
        questions = {name: corpus.SHOWN_QUESTIONS[i % len(corpus.SHOWN_QUESTIONS)] for i, name in enumerate(candidates)}
        requests = [_request(tokenizer, questions[name], name) for name in candidates]
        run = PeftBaseline(directory / BASE_NAME, candidates).run(requests, measure_margins=True)
        for (name, path), token_ids, margin in zip(candidates.items(), run.token_ids, run.margins, strict=True):
            if len(chosen) < NUM_RANDOM and margin >= CLEAR_MARGIN and token_ids != plain_answers[questions[name]]:
                chosen[name] = questions[name]
                task.advance(1)
            else:
                shutil.rmtree(path)
    return chosen


def _plain_answers(directory: Path, tokenizer: PreTrainedTokenizerFast) -> dict[str, tuple[int, ...]]:
    some_adapter = next(iter(RECIPES))
    baseline = PeftBaseline(directory / BASE_NAME, {some_adapter: directory / "manners" / some_adapter})
    requests = [_request(tokenizer, question, None) for question in corpus.SHOWN_QUESTIONS]
    return dict(zip(corpus.SHOWN_QUESTIONS, baseline.run(requests).token_ids, strict=True))


def _request(tokenizer: PreTrainedTokenizerFast, question: str, adapter: str | None) -> BaselineRequest:
    return BaselineRequest(tuple(tokenizer(corpus.prompt_of(question)).input_ids), RANDOM_MAX_TOKENS, adapter)
