"""What process 0 of a tensor-parallel core and the others (its followers) say to each other, over a socket pair each.

Framed as `services.engine.messages`. Process 0 says what it does, in the order in which it does it; a follower says
that it is ready, and what its loads come to. Steps have no answer but their collectives. End of file is the end of
either.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import TypeAlias

import msgspec

from services.engine.messages import LENGTH, NOBODY, Adapter, Origin, SamplingParams
from services.engine.step import SampleRequest, ScheduledChunk, StepPlan


class FollowedChunk(msgspec.Struct, frozen=True, array_like=True):
    """A `ScheduledChunk`, of which a follower need not know how its token is drawn."""

    sequence_id: int
    token_ids: list[int]
    start: int
    block_table: list[int]
    adapter_slot: int
    wants_token: bool


class FollowedStep(msgspec.Struct, frozen=True, tag=True):
    """Compute your part of this step."""

    chunks: list[FollowedChunk]


class StartLoad(msgspec.Struct, frozen=True, tag=True):
    """Begin to load your shard of an adapter; `number` names the load from here on."""

    number: int
    adapter: Adapter
    origin: Origin = NOBODY


class GrantLoad(msgspec.Struct, frozen=True, tag=True):
    """Where it goes."""

    number: int
    slot: int
    pages: list[int]


class CancelLoad(msgspec.Struct, frozen=True, tag=True):
    """Give it up; it is answered all the same, unless it was already."""

    number: int


class RemoveAdapter(msgspec.Struct, frozen=True, tag=True):
    """Forget the adapter at `slot`."""

    slot: int


ToFollower: TypeAlias = FollowedStep | StartLoad | GrantLoad | CancelLoad | RemoveAdapter


class FollowerReady(msgspec.Struct, frozen=True, tag=True):
    """My part of the model is loaded."""


class ShardInstalled(msgspec.Struct, frozen=True, tag=True):
    """My shard is in its pages and at its slot."""

    number: int
    load_seconds: float
    packed_bytes: int
    lent: bool


class ShardFailed(msgspec.Struct, frozen=True, tag=True):
    """It is not, and nothing of mine touches its pages any more. `reason` is empty if it was given up."""

    number: int
    reason: str = ""
    message: str = ""
    metadata: dict[str, str] = {}


ToLeader: TypeAlias = FollowerReady | ShardInstalled | ShardFailed

to_follower_decoder: msgspec.msgpack.Decoder[ToFollower] = msgspec.msgpack.Decoder(ToFollower)
to_leader_decoder: msgspec.msgpack.Decoder[ToLeader] = msgspec.msgpack.Decoder(ToLeader)
_encoder = msgspec.msgpack.Encoder()

# A token is wanted; how it is drawn is process 0's affair.
_WANTED = SampleRequest(SamplingParams(), (), (), 0)


def frame(message: ToFollower | ToLeader) -> bytes:
    """A message as it travels."""
    body = _encoder.encode(message)
    return LENGTH.pack(len(body)) + body


def bodies(sock: socket.socket) -> Iterator[bytes]:
    """The messages that come, undecoded, until the end of file; OSError if the socket fails."""
    with sock.makefile("rb") as stream:
        while len(head := stream.read(LENGTH.size)) == LENGTH.size:
            (length,) = LENGTH.unpack(head)
            body = stream.read(length)
            if len(body) < length:
                return
            yield body


def followed(plan: StepPlan) -> FollowedStep:
    """What a follower has to know of a step."""
    return FollowedStep(
        [
            FollowedChunk(
                chunk.sequence_id,
                list(chunk.token_ids),
                chunk.start,
                list(chunk.block_table),
                chunk.adapter_slot,
                chunk.sample is not None,
            )
            for chunk in plan.chunks
        ]
    )


def to_plan(step: FollowedStep) -> StepPlan:
    """The step as a runner takes it."""
    return StepPlan(tuple(map(_to_chunk, step.chunks)))


def _to_chunk(chunk: FollowedChunk) -> ScheduledChunk:
    sample = _WANTED if chunk.wants_token else None
    return ScheduledChunk(
        chunk.sequence_id, chunk.token_ids, chunk.start, chunk.block_table, chunk.adapter_slot, sample
    )
