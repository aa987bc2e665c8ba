"""An engine of two processes through all services: tokens of transformers + PEFT, and what happens when one dies."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from slora_client import SloraClient, SloraRequestError

from services.local.stack import LocalStack
from tests.e2e.conftest import assert_no_page_lost, metric, upload, wait_until
from tests.fixtures.adapter_kinds import KINDS
from tests.fixtures.peft_reference import PeftReference, assert_same_tokens
from tests.fixtures.tiny_models import make_adapter, make_checkpoint
from tests.fixtures.tiny_tokenizer import write_tokenizer

NAMES = ("all-8", "patterns", "attention-1")


def core_processes(stack: LocalStack) -> tuple[list[psutil.Process], list[psutil.Process]]:
    """Process 0 of each engine's core, and those that follow it."""
    ours = psutil.Process(os.getpid()).children(recursive=True)
    cores = [p for p in ours if "services.engine.core" in " ".join(p.cmdline())]
    followers = [p for p in cores if "--tp-rank" in p.cmdline()]
    return [p for p in cores if p not in followers], followers


def serves(check: Callable[[str | None], None]) -> bool:
    try:
        check(None)
    except SloraRequestError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.usefixtures("stack_logs")
def test_two_processes_serve_as_one_and_end_as_one(tmp_path: Path) -> None:
    seed = random.randrange(2**31)
    print("seed", seed)
    draw = random.Random(seed)
    checkpoint = make_checkpoint(tmp_path / "base", "qwen2", num_hidden_layers=2, vocab_size=320, seed=seed)
    write_tokenizer(checkpoint, 320)
    adapters = {
        name: make_adapter(tmp_path / name, checkpoint, seed=seed + i, **KINDS[name]) for i, name in enumerate(NAMES)
    }
    reference = PeftReference(checkpoint, adapters)
    # Room for two of the adapters beside the KV cache, more or less: they are evicted and loaded again.
    options = {"tp_size": 2, "num_threads": 1, "num_pages": 48, "max_model_len": 200, "step_timeout_seconds": 4.0}
    with (
        LocalStack(tmp_path / "state", checkpoint, engine_options=options) as stack,
        SloraClient(stack.gateway_address) as client,
    ):
        upload(stack, adapters)

        def check(name: str | None) -> None:
            prompt = [draw.randrange(3, 320) for _ in range(draw.randint(1, 60))]
            answer = client.generate(name or stack.base_model, prompt, temperature=0, max_tokens=6, ignore_eos=True)
            assert len(answer.token_ids) == 6
            assert_same_tokens(answer.token_ids, None, reference.judge(prompt, answer.token_ids, name), str(name))

        for name in [*NAMES, None, *draw.choices(NAMES, k=4)]:
            check(name)
        assert_no_page_lost(stack)
        assert metric(stack.metrics_urls["engine-0"], "slora_engine_adapter_load_seconds_count") >= len(NAMES)

        def strike(number: int, signal_number: signal.Signals) -> str | None:
            """How a stream ends that process `number` is lost to; None if the signal came too late for it."""
            leaders, followers = core_processes(stack)
            assert (len(leaders), len(followers)) == (1, 1)
            stream = client.stream(NAMES[0], [5, 6], temperature=0, max_tokens=190, ignore_eos=True)
            next(stream)
            (leaders + followers)[number].send_signal(signal_number)
            reason = None
            try:
                for _ in stream:
                    pass
            except SloraRequestError as error:
                reason = error.reason
            if reason is None:
                serves(check)  # who asks next finds it out
            _, alive = psutil.wait_procs([*leaders, *followers], timeout=40)
            assert not alive, "a process outlived its core"
            return reason

        for victim in ((1, signal.SIGKILL), (1, signal.SIGSTOP), (0, signal.SIGSTOP)):
            reasons = [strike(*victim)]
            while reasons[-1] is None and len(reasons) < 5:  # on a slow machine a stream may be over before that
                wait_until("another core of two processes serves", lambda: serves(check))
                reasons.append(strike(*victim))
            assert reasons[-1] == "ENGINE_CORE_DEAD"
            wait_until("another core of two processes serves", lambda: serves(check))
