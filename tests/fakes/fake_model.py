"""What a fake engine is asked, and what it must answer: tokens that are a function of prompt, output and adapter only.

A token's KV is a link in a chain of hashes over (adapter, tokens so far); the next token is a function of the chain.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Sequence

from services.engine.adapters.layout import AdapterLayout
from services.engine.messages import Adapter, Generate, SamplingParams, StopParams

VOCAB_SIZE = 101
EOS = 0
NUM_LAYERS = 2
BASE = zlib.crc32(b"base model")


def digest_of(name: str) -> str:
    """A digest for the adapter `name`."""
    return "sha256:" + hashlib.sha256(name.encode()).hexdigest()


def adapter(name: str | None) -> Adapter | None:
    """The adapter `name`, version 1."""
    return None if name is None else Adapter(f"{name}@1", digest_of(name))


def generate(
    request_id: int,
    prompt: Sequence[int],
    max_tokens: int,
    adapter_name: str | None = None,
    **stop: object,
) -> Generate:
    """A request."""
    return Generate(
        request_id,
        list(prompt),
        SamplingParams(seed=request_id),
        StopParams(max_tokens, **stop),  # type: ignore[arg-type]
        adapter(adapter_name),
    )


def seed_of(digest: str | None) -> int:
    """Where the chain of an adapter, or of the base model, begins."""
    return BASE if digest is None else zlib.crc32(digest.encode())


def next_token(link: int, prompt: Sequence[int], output: Sequence[int], forbidden: Sequence[int]) -> int:
    """The token behind the end of a chain."""
    token = hash((link, tuple(prompt), tuple(output))) % VOCAB_SIZE
    while token in forbidden:
        token = (token + 1) % VOCAB_SIZE
    return token


def expected_output(request: Generate, max_model_len: int, eos: frozenset[int] = frozenset({EOS})) -> list[int]:
    """What `request` must give, whatever else runs, computed the slow way."""
    link = seed = seed_of(request.adapter.digest if request.adapter else None)
    for token in request.prompt_ids:
        link = hash((link, token, seed))
    output: list[int] = []
    stops = set(request.stop.stop_token_ids) | (set() if request.stop.ignore_eos else eos)
    while True:
        early = len(output) < request.stop.min_tokens
        token = next_token(link, request.prompt_ids, output, sorted(stops) if early else ())
        output.append(token)
        link = hash((link, token, seed))
        if token in stops and not early:
            return output
        if len(output) == request.stop.max_tokens or len(request.prompt_ids) + len(output) == max_model_len:
            return output


def layout_of(digest: str, num_pages: int, page_elems: int, dtype: str = "float32") -> AdapterLayout:
    """A layout that takes exactly `num_pages`."""
    return AdapterLayout(digest, dtype, 1, NUM_LAYERS, num_pages * page_elems, ((),) * NUM_LAYERS)
