"""A spool that finds no room on its disk."""

from __future__ import annotations

import asyncio
import resource
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from services.adapter_store.upload_spool import UploadSpool
from services.common.errors import Reason, SloraError

LIMIT = 2**20


@pytest.fixture
def small_disk() -> Iterator[None]:
    """No file may grow beyond LIMIT bytes: the kernel says so, as it does when a quota or a disk is used up."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


async def test_an_upload_that_finds_no_room_says_so_and_leaves_nothing(tmp_path: Path, small_disk: None) -> None:
    with ThreadPoolExecutor(1) as threads, UploadSpool(str(tmp_path), 2**30, threads) as spool:
        spool.add_config(b"{}")
        await spool.add_weights(b"x" * LIMIT)
        with pytest.raises(SloraError) as refused:
            await asyncio.wait_for(spool.add_weights(b"x"), 20)
    assert refused.value.reason is Reason.ADAPTER_TOO_LARGE
    assert refused.value.reason.status.name == "RESOURCE_EXHAUSTED"
    assert "upload_dir" in refused.value.message
    assert await asyncio.to_thread(lambda: list(tmp_path.iterdir())) == []
