"""Brings the demo's adapters to the adapter store: most by upload, some by way of S3."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from slora_client import AdapterClient

from services.local.s3_client import S3Client, S3Place
from services.local.stack import LocalStack

TEAM_BUCKET = "team-models"
"""Where a team that trains adapters might keep them; the store only reads there."""
LEFT_IN_S3 = ("pirate", "german", "json")
_UPLOADS_AT_ONCE = 4
_TIMEOUT_SECONDS = 60.0


def deliver(stack: LocalStack, adapters: Mapping[str, Path], advance: Callable[[int], None]) -> None:
    """Registers every adapter; those of LEFT_IN_S3 lie in a bucket of their own and are registered by their address."""
    if stack.s3 is None:
        raise ValueError("the demo runs on the embedded S3 server")
    s3 = S3Client(stack.client_s3_environment)
    s3.make_bucket(TEAM_BUCKET)
    with AdapterClient(stack.store_address) as store, ThreadPoolExecutor(_UPLOADS_AT_ONCE) as pool:

        def bring(name: str, directory: Path) -> None:
            if name in LEFT_IN_S3:
                place = S3Place(TEAM_BUCKET, f"adapters/{name}/")
                s3.put_adapter(directory, place)
                store.register(name, place.uri, timeout=_TIMEOUT_SECONDS)
            else:
                store.upload(name, directory, timeout=_TIMEOUT_SECONDS)
            advance(1)

        # `list` waits for all of them, and raises what went wrong with any.
        list(pool.map(bring, adapters.keys(), adapters.values()))
