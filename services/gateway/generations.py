"""A generation from its request to its last message: the one path that gRPC and HTTP share.

It lets the request in, resolves its model, finds an engine that answers, and notes what happened. Messages are the
engine's own; those who ask turn them into what their caller understands.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from services.common.errors import FieldError, Reason, SloraError, Status
from services.common.request_id import bind_request_id
from services.common.tracing import current_span, using
from services.gateway.admission import Admission
from services.gateway.dispatcher import Dispatcher, OpenStream, Work
from services.gateway.metrics import GatewayMetrics
from services.gateway.models import HOW_TO_LIST, Models, ResolvedModel
from services.gateway.relay_turns import RelayTurns
from services.gateway.request_record import CANCELLED, OK, RequestRecord
from services.gateway.router import Wish
from services.gateway.tenancy.limiter import Limiter, Quota
from services.tenancy.tenants import ANONYMOUS, Tenant

MAX_REQUEST_ID_CHARS = 128

_OWED = frozenset({Status.UNAVAILABLE, Status.RESOURCE_EXHAUSTED, Status.DATA_LOSS, Status.INTERNAL})


def no_deadline() -> None:
    """For callers that wait as long as it takes: HTTP has no deadlines."""


@dataclass(frozen=True)
class Size:
    """How many tokens a generation may use, as far as that can be told without a tokenizer."""

    num_prompt_tokens: int = 0
    max_new_tokens: int = 0

    @property
    def num_tokens(self) -> int:
        """All of them."""
        return self.num_prompt_tokens + self.max_new_tokens


class SharedFate:
    """Of the choices of one request: the first that fails ends the others, and what it failed for is what the request
    failed for."""

    def __init__(self) -> None:
        self.has_failed = False

    def fail(self) -> bool:
        """A choice has failed; whether it is the first."""
        is_first, self.has_failed = not self.has_failed, True
        return is_first


@dataclass(frozen=True)
class Ask:
    """A generation as a caller asks for it."""

    model: str
    request_id: str
    """Empty: one is made."""
    to_engine_request: Callable[[str, ResolvedModel], Any]
    """Makes what an engine takes, of the request id and the model."""
    time_remaining: Callable[[], float | None] = no_deadline
    """Seconds until the caller's deadline; None without one."""
    is_gone: Callable[[], bool] = lambda: False
    """Whether the caller is known to have left."""
    fate: SharedFate = field(default_factory=SharedFate)
    """The same for all choices of a request."""
    tenant: Tenant = ANONYMOUS
    """Who asks: whose adapters, whose limits."""
    size: Size = Size()


@dataclass(frozen=True)
class Answer:
    """A generation that has begun."""

    request_id: str
    model: ResolvedModel
    quota: Quota | None
    """What the tenant may still use; None without limits."""
    messages: AsyncGenerator[Any, None]
    """The engine's messages, to be iterated over once; the last one has the completion. Raises `SloraError`."""


class Generations:
    """Starts generations; each is a request of its own in metrics, log and admission."""

    def __init__(
        self,
        models: Models,
        dispatcher: Dispatcher,
        admission: Admission,
        limiter: Limiter,
        metrics: GatewayMetrics,
    ) -> None:
        self._models = models
        self._limiter = limiter
        self._dispatcher = dispatcher
        self._admission = admission
        self._metrics = metrics
        self._turns = RelayTurns()

    @contextlib.asynccontextmanager
    async def open(self, ask: Ask) -> AsyncIterator[Answer]:
        """A generation whose first message is here. Leaving the context ends it: the engine frees what it holds.

        Raises `SloraError`: what the model, the engines, the tenant's limits, or the bound on requests in flight have
        against it.
        """
        self._turns.give_way()
        record = RequestRecord(self._metrics, span=current_span().child("generation"))
        record.tenant = ask.tenant.name
        outcome = Reason.INTERNAL.name.lower()
        try:
            with using(record.span), self._admission.enter():
                async with self._admitted(ask, record) as quota:
                    with contextlib.ExitStack() as held:
                        answer = await self._begin(ask, record, quota, held)
                        async with contextlib.aclosing(answer.messages):
                            yield answer
            outcome = OK
        except asyncio.CancelledError:
            outcome = _outcome_of_cancellation(ask)
            raise
        except Exception as error:
            ask.fate.fail()
            if ask.is_gone():
                # Writing to the caller failed before its cancellation arrived here.
                outcome = _outcome_of_cancellation(ask)
            elif isinstance(error, SloraError):
                outcome = error.reason.name.lower()
            raise
        finally:
            record.finish(outcome)

    @contextlib.asynccontextmanager
    async def _admitted(self, ask: Ask, record: RequestRecord) -> AsyncIterator[Quota | None]:
        """Within the tenant's limits; charged in the end for what it used. It is no request if it did not begin, unless
        its caller left or made a mistake; one mistake is one request, however many choices have it."""
        async with self._limiter.admit(ask.tenant, ask.size.num_tokens) as admitted:
            try:
                yield admitted.quota
            except asyncio.CancelledError:
                admitted.was_refused = not record.has_begun and ask.fate.has_failed
                raise
            except Exception as error:
                is_counted = ask.fate.fail() and _is_callers_mistake(error)
                admitted.was_refused = not record.has_begun and not is_counted
                raise
            finally:
                admitted.used_tokens = record.num_tokens_used(ask.size.num_prompt_tokens)

    async def _begin(self, ask: Ask, record: RequestRecord, quota: Quota | None, held: contextlib.ExitStack) -> Answer:
        record.request_id = request_id = _checked_request_id(ask.request_id)
        bind_request_id(request_id)
        model = await self._models.resolve(ask.model, ask.time_remaining, ask.tenant)
        digest = None if model.adapter is None else model.adapter.digest
        record.on_resolved(model.name, model.public_id, digest)
        work = Work(
            request=ask.to_engine_request(request_id, model),
            wish=Wish(model.base_model, digest, request_id, can_be_loaded=self._models.is_store_followed),
            time_remaining=ask.time_remaining,
        )
        try:
            stream = await self._dispatcher.open(work, record, held)
        except SloraError as error:
            raise _as_callers_error(error, model) from None
        return Answer(request_id, model, quota, _messages(stream, model, record, self._turns))


async def _messages(
    stream: OpenStream, model: ResolvedModel, record: RequestRecord, turns: RelayTurns
) -> AsyncGenerator[Any, None]:
    """A stream's messages. What comes while nobody asks for the next one is merged into it."""
    message = stream.first
    on_message = record.on_message
    on_message(len(message.token_ids))
    yield message
    try:
        if not message.HasField("completion"):
            async for message in stream.rest:
                stream.on_message()
                on_message(len(message.token_ids))
                await turns.take()
                yield message
                if message.HasField("completion"):
                    break
            else:
                raise SloraError(Reason.INTERNAL, "the engine ended the stream without saying why the generation ended")
    except SloraError as error:
        raise _as_callers_error(error, model) from None
    record.on_completion(message.completion.usage.num_prompt_tokens)


def _is_callers_mistake(error: Exception) -> bool:
    """Whether another service of this kind, with all at hand, would have refused the request too: an unknown model, a
    field out of its range, too little time. Else it was owed an answer."""
    if not isinstance(error, SloraError):
        return False
    return error.reason is Reason.REQUEST_TOO_LARGE or error.reason.status not in _OWED


def _checked_request_id(request_id: str) -> str:
    if len(request_id) > MAX_REQUEST_ID_CHARS:
        complaint = f"has {len(request_id)} characters; at most {MAX_REQUEST_ID_CHARS} are allowed"
        raise FieldError(Reason.REQUEST_INVALID, "request_id", complaint, limit=MAX_REQUEST_ID_CHARS)
    return request_id or uuid.uuid4().hex


def _as_callers_error(error: SloraError, model: ResolvedModel) -> SloraError:
    """Engines' errors are passed on as they are, but for an adapter that was deleted since it was resolved: what the
    caller named is a model."""
    if error.reason is not Reason.ADAPTER_NOT_FOUND:
        return error
    message = f"no model {model.public_id!r} any more: it was deleted; {HOW_TO_LIST} lists what there is"
    return SloraError(Reason.MODEL_NOT_FOUND, message, model=model.public_id)


def _outcome_of_cancellation(ask: Ask) -> str:
    """A passed deadline and a caller that goes away both arrive as a cancellation."""
    remaining = ask.time_remaining()
    return Reason.DEADLINE_EXCEEDED.name.lower() if remaining is not None and remaining <= 0 else CANCELLED
