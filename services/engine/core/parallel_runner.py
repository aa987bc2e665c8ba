"""Process 0's runner where several processes share the model: what it does, the others are told to do too."""

from __future__ import annotations

from typing import Generic, TypeVar

from services.engine.adapters.device import AdapterDevice
from services.engine.config import PoolConfig
from services.engine.core.engine_core import Runner
from services.engine.core.follower_messages import followed
from services.engine.core.followers import Followers
from services.engine.step import RunnerLost, SampledToken, StepPlan

HandleT = TypeVar("HandleT")


class ParallelRunner(Generic[HandleT]):
    """A `Runner`. A step that fails here may have left the others waiting: there is no step after it."""

    def __init__(self, own: Runner[HandleT], followers: Followers) -> None:
        self._own = own
        self._followers = followers

    @property
    def pool_config(self) -> PoolConfig:
        """One process's pool; all have as many pages."""
        return self._own.pool_config

    @property
    def adapter_device(self) -> AdapterDevice:
        """This process's."""
        return self._own.adapter_device

    @property
    def max_model_len(self) -> int:
        """Longest sequence in tokens."""
        return self._own.max_model_len

    @property
    def vocab_size(self) -> int:
        """Token ids are below it."""
        return self._own.vocab_size

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end a sequence."""
        return self._own.eos_token_ids

    @property
    def max_in_flight(self) -> int:
        """As one process's."""
        return self._own.max_in_flight

    def submit(self, plan: StepPlan) -> HandleT:
        """Begins a step in all processes. Raises RunnerLost."""
        self._followers.step_begins()
        self._followers.send(followed(plan))
        try:
            return self._own.submit(plan)
        except Exception as error:
            raise RunnerLost(f"a step failed in one of {self._followers.tp_size} processes: {error!r}") from error

    def collect(self, handle: HandleT) -> list[SampledToken]:
        """Waits for a step. Raises RunnerLost."""
        try:
            tokens = self._own.collect(handle)
        except Exception as error:
            raise RunnerLost(f"a step failed in one of {self._followers.tp_size} processes: {error!r}") from error
        self._followers.step_ends()
        return tokens
