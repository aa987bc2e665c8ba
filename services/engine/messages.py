"""What frontend and core say to each other, over one socket pair, as length-prefixed MessagePack.

The frontend sends `Generate`, `Abort` and `Prefetch`; the core sends `CoreReady` once and then one `StepReport` a
step (all tokens of the step together), also when something other than tokens changed. Between steps it answers each
`Ping` with a `Pong`. End of file means that the other process is gone.
"""

from __future__ import annotations

import secrets
import struct
from typing import TypeAlias

import msgspec


class Adapter(msgspec.Struct, frozen=True):
    """One immutable version of an adapter; memory is keyed by the digest, never by the name."""

    adapter_id: str
    digest: str


class Origin(msgspec.Struct, frozen=True):
    """For whom something is done: what the core says of it in its log, to the store, and to whoever sees its traces."""

    # The request's id outside.
    request_id: str = ""
    # W3C traceparent of the work that this is a part of; empty where nobody will see it.
    traceparent: str = ""

    def part(self) -> Origin:
        """A part of that work, as the origin of what is done for it: the same trace, an id of its own."""
        if not self.traceparent:
            return self
        version, trace_id, _, flags = self.traceparent.split("-")
        return Origin(self.request_id, "-".join((version, trace_id, secrets.token_hex(8), flags)))


NOBODY = Origin()


class SamplingParams(msgspec.Struct, frozen=True):
    """How tokens are drawn; validated by the frontend. `seed` is always set (at random if the caller gave none)."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    # None: no log-probabilities; 0: the chosen token's only; n: the n most likely ones too.
    num_logprobs: int | None = None

    @property
    def has_penalty(self) -> bool:
        """Whether scores depend on what was said before."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


class StopParams(msgspec.Struct, frozen=True):
    """When a sequence ends, as far as token ids tell; stop strings are the frontend's."""

    max_tokens: int
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False


class Generate(msgspec.Struct, frozen=True, tag=True):
    """Frontend to core: a new request. `request_id` is unique in the frontend's life."""

    request_id: int
    prompt_ids: list[int]
    sampling: SamplingParams
    stop: StopParams
    adapter: Adapter | None = None
    # See `services.common.priorities`, higher is sooner; and who asks, empty if unsaid. For policies that heed them.
    priority: int = 0
    tenant: str = ""
    origin: Origin = NOBODY


class Abort(msgspec.Struct, frozen=True, tag=True):
    """Frontend to core: forget a request and free what it holds. Unknown ids are ignored: it may just have ended."""

    request_id: int


class Prefetch(msgspec.Struct, frozen=True, tag=True):
    """Frontend to core: load an adapter; answered in `StepReport.prefetched` or as a failure with this id."""

    request_id: int
    adapter: Adapter
    origin: Origin = NOBODY


class Ping(msgspec.Struct, frozen=True, tag=True):
    """Frontend to core: is it still there?"""


Request: TypeAlias = Generate | Abort | Prefetch
ToCore: TypeAlias = Request | Ping


class CoreReady(msgspec.Struct, frozen=True, tag=True):
    """Core to frontend: the model is loaded and requests may come."""

    num_pages: int
    max_model_len: int
    max_running: int
    vocab_size: int


class TokenEvent(msgspec.Struct, frozen=True):
    """A request's next token. `finish` is set on its last one: `stop` or `length`."""

    request_id: int
    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    finish: str | None = None
    # Set with finish == "stop": the end-of-sequence or stop id that did it.
    stop_token_id: int | None = None


class RequestFailed(msgspec.Struct, frozen=True):
    """A request (or prefetch) ended in an error; `reason` names a `services.common.errors.Reason`."""

    request_id: int
    reason: str
    message: str
    metadata: dict[str, str] = {}


class AdapterLoaded(msgspec.Struct, frozen=True):
    """An adapter became resident. `lent`: its bytes were copied out of the store's memory, not streamed. `replica`: of
    the store, which gave it; others that were asked before failed `num_failovers` times."""

    adapter: Adapter
    load_seconds: float
    packed_bytes: int
    lent: bool = False
    replica: str = ""
    num_failovers: int = 0


class TracedLoad(msgspec.Struct, frozen=True):
    """A load that somebody sees in a trace, when it is over. Times are seconds since the epoch."""

    adapter: Adapter
    # Of the request that it was begun for, and the load's own, which the store was told.
    parent: Origin
    own: Origin
    began: float
    ended: float
    packed_bytes: int = 0
    lent: bool = False
    # Why it failed; empty if it did not, or was given up.
    reason: str = ""


class CoreLoad(msgspec.Struct, frozen=True):
    """How busy the core is, at the end of a step. Counts since the core's start end in `_total`."""

    num_running: int = 0
    num_waiting: int = 0
    num_free_pages: int = 0
    num_kv_pages: int = 0
    num_adapter_pages: int = 0
    # Evictable: of idle adapters, and of the prefix cache where no sequence uses them. Cached: the latter alone.
    num_evictable_pages: int = 0
    num_cached_pages: int = 0
    num_preemptions_total: int = 0
    num_steps_total: int = 0
    num_adapter_hits_total: int = 0
    num_adapter_misses_total: int = 0
    num_adapter_load_failures_total: int = 0
    # Time in which a step was planned, computed or taken in; where two overlap it counts once, so that this over the
    # number of steps is the time from one to the next.
    step_seconds_total: float = 0.0
    # What the policy did: sequences that began to run, those dropped before by why, how often one was passed by that
    # could have run, and by how much the counters of clients that wait differ now.
    num_admitted_total: int = 0
    num_dropped_total: dict[str, int] = {}
    num_passed_by_total: int = 0
    service_spread: float = 0.0
    # Tokens of prompts that began to run, and those among them whose KV was in the prefix cache.
    num_prefix_queried_tokens_total: int = 0
    num_prefix_found_tokens_total: int = 0
    # Loads of adapters that nobody had asked for: begun, and what became of them.
    num_speculative_loads_total: dict[str, int] = {}


class StepReport(msgspec.Struct, frozen=True, tag=True):
    """Core to frontend: all that happened in one step."""

    load: CoreLoad
    tokens: list[TokenEvent] = []
    failures: list[RequestFailed] = []
    loaded: list[AdapterLoaded] = []
    evicted: list[str] = []
    # Digests of all adapters that are being loaded; None: as in the last report.
    loading: tuple[str, ...] | None = None
    # Ids of `Prefetch` requests whose adapter is resident now, with how long its load took (0: it was already).
    prefetched: list[tuple[int, float]] = []
    # Requests that began with tokens found in the prefix cache, and how many; before or with their first token.
    found: list[tuple[int, int]] = []
    # Only of requests that somebody sees in a trace: those that began to run (again, after a preemption), by id and
    # when, in seconds since the epoch; and loads that were begun for them.
    admitted: list[tuple[int, float]] = []
    traced_loads: list[TracedLoad] = []


class Pong(msgspec.Struct, frozen=True, tag=True):
    """Core to frontend: it is."""


ToFrontend: TypeAlias = CoreReady | StepReport | Pong

LENGTH = struct.Struct("!I")
"""Each message is its length in bytes, then its MessagePack."""

MAX_MESSAGE_BYTES = 256 * 2**20

encoder = msgspec.msgpack.Encoder()
to_core_decoder: msgspec.msgpack.Decoder[ToCore] = msgspec.msgpack.Decoder(ToCore)
to_frontend_decoder: msgspec.msgpack.Decoder[ToFrontend] = msgspec.msgpack.Decoder(ToFrontend)


def frame(message: ToCore | ToFrontend) -> bytes:
    """A message as it travels."""
    body = encoder.encode(message)
    return LENGTH.pack(len(body)) + body
