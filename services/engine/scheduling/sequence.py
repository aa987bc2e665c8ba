"""A request's state inside the engine: its tokens, its pages, how far it is computed, and when it ends."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from services.common.errors import Reason, SloraError
from services.engine.messages import Generate
from services.engine.step import BASE_SLOT, PENDING_TOKEN, SampleRequest, ScheduledChunk

_PENDING = (PENDING_TOKEN,)


class SequenceState(enum.Enum):
    """Waiting sequences hold no KV pages and pin nothing; running ones do.

    Those that have ended are forgotten; one that a step in flight names holds pages and pin until that is settled.
    """

    WAITING = enum.auto()
    RUNNING = enum.auto()
    ENDED = enum.auto()


@dataclass(frozen=True, slots=True)
class Finish:
    """Why a sequence ended: `stop` (with the token that did it) or `length`."""

    reason: str
    stop_token_id: int | None = None


def check_request(request: Generate, max_model_len: int) -> None:
    """Raises SloraError unless the request has a prompt, wants output, and the model's length has room for both."""
    num_prompt_tokens = len(request.prompt_ids)
    if num_prompt_tokens == 0:
        raise SloraError(Reason.PROMPT_EMPTY, "the prompt has no tokens; send at least one", field="prompt")
    if num_prompt_tokens >= max_model_len:
        raise SloraError(
            Reason.PROMPT_TOO_LONG,
            f"a prompt of {num_prompt_tokens} tokens leaves no room for output within {max_model_len} tokens",
            field="prompt",
            num_prompt_tokens=num_prompt_tokens,
            max_model_len=max_model_len,
        )
    if request.stop.max_tokens < 1:
        message = f"at least 1 token is to be made, not {request.stop.max_tokens}"
        raise SloraError(Reason.STOPPING_INVALID, message, field="stopping.max_tokens")


@dataclass(slots=True, eq=False)
class Sequence:
    """`arrival` numbers requests in the order in which they came; it stays through preemption."""

    request: Generate
    # Names the sequence everywhere; the request's.
    request_id: int
    arrival: int
    # Its place in the order in which memory is granted, the lowest first; no two have the same. The policy's to choose
    # while the sequence waits, else its arrival.
    turn: int
    max_tokens: int
    stop_ids: frozenset[int]
    # Prompt and output; what has to be computed again after a preemption.
    token_ids: list[int]
    output_ids: list[int] = field(default_factory=list)
    state: SequenceState = SequenceState.WAITING
    # Whether it was ever admitted: one that waits nevertheless was preempted.
    has_run: bool = False
    block_table: list[int] = field(default_factory=list)
    # So many of the first pages of the block table are the prefix cache's: full, computed, and not to be written to.
    num_shared_pages: int = 0
    # Of its first full pages, as far as anybody asked (`memory/prefix_keys.py`).
    page_keys: list[bytes] = field(default_factory=list)
    # KV of so many tokens is in the pages, or will be when the steps in flight are done.
    num_computed: int = 0
    # Steps in flight (submitted, and neither committed nor abandoned) that name it, and those that draw its next token.
    num_in_flight: int = 0
    num_pending: int = 0
    adapter_slot: int = BASE_SLOT

    @classmethod
    def of(cls, request: Generate, arrival: int, max_model_len: int, eos_token_ids: frozenset[int]) -> Sequence:
        """A waiting sequence for a `request` that `check_request` lets pass."""
        stop_ids = frozenset(request.stop.stop_token_ids)
        if not request.stop.ignore_eos:
            stop_ids |= eos_token_ids
        max_tokens = min(request.stop.max_tokens, max_model_len - len(request.prompt_ids))
        return cls(request, request.request_id, arrival, arrival, max_tokens, stop_ids, list(request.prompt_ids))

    @property
    def digest(self) -> str | None:
        """The adapter's digest; None without one."""
        return None if self.request.adapter is None else self.request.adapter.digest

    @property
    def num_uncomputed(self) -> int:
        """Tokens to compute before the next one can be drawn; 1 in decode, 0 if the last one is pending."""
        if self.num_pending and len(self.output_ids) + self.num_pending >= self.max_tokens:
            return 0
        return len(self.token_ids) + self.num_pending - self.num_computed

    def num_pages(self, tokens_per_page: int) -> int:
        """Pages that let a waiting sequence run: those of its tokens and of one more."""
        return -(-(len(self.token_ids) + 1) // tokens_per_page)

    def max_pages(self, tokens_per_page: int) -> int:
        """Pages it takes at most in its life."""
        return -(-(len(self.request.prompt_ids) + self.max_tokens) // tokens_per_page)

    def hold(self, block_table: list[int], num_shared_pages: int, num_computed: int) -> None:
        """Has these pages from now on; the first are shared and hold KV of `num_computed` tokens."""
        self.block_table = block_table
        self.num_shared_pages = num_shared_pages
        self.num_computed = num_computed

    def run(self, adapter_slot: int) -> None:
        """Begins to run in the pages that it holds."""
        self.state = SequenceState.RUNNING
        self.has_run = True
        self.adapter_slot = adapter_slot

    def chunk(self, max_tokens: int) -> ScheduledChunk:
        """Its next tokens, at most so many; from here on they count as computed, and what they draw as pending."""
        start, num_known = self.num_computed, len(self.token_ids)
        end = min(start + max_tokens, num_known + self.num_pending)
        # A token is pending only when all that are known are computed: then it is the one to compute.
        token_ids = self.token_ids[start:end] if start < num_known else _PENDING
        sample = None if end < num_known else self.sample_request()
        self.num_computed = end
        self.num_in_flight += 1
        self.num_pending += sample is not None
        return ScheduledChunk(self.request_id, token_ids, start, self.block_table, self.adapter_slot, sample)

    def leave(self) -> tuple[list[int], list[int]]:
        """Gives up its pages, shared ones and its own, which no step in flight names. Its tokens stay."""
        pages, num_shared = self.block_table, self.num_shared_pages
        self.block_table = []
        self.num_shared_pages = self.num_computed = 0
        self.adapter_slot = BASE_SLOT
        return pages[:num_shared], pages[num_shared:]

    def sample_request(self) -> SampleRequest:
        """How to draw its next token; it refers to the lists that grow."""
        request, num_pending = self.request, self.num_pending
        place = len(self.output_ids) + num_pending
        forbidden_ids = tuple(sorted(self.stop_ids)) if place < request.stop.min_tokens else ()
        return SampleRequest(request.sampling, request.prompt_ids, self.output_ids, place, num_pending, forbidden_ids)

    def append(self, token_id: int) -> Finish | None:
        """Takes the token that was drawn; how the sequence ends with it, None if it goes on."""
        self.token_ids.append(token_id)
        self.output_ids.append(token_id)
        num_output, min_tokens = len(self.output_ids), self.request.stop.min_tokens
        if token_id in self.stop_ids and num_output > min_tokens:
            return Finish("stop", token_id)
        if num_output >= self.max_tokens:
            return Finish("length")
        return None
