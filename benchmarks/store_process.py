"""A real adapter store as a process, before an embedded Redis and S3: for benchmarks of the whole store."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.local.embedded_redis import EmbeddedRedis
from services.local.embedded_s3 import EmbeddedS3


@dataclass(frozen=True)
class StoreProcess:
    """A running store: its process, its address, what it said when it began to listen, and where its log is."""

    pid: int
    address: str
    listening: dict[str, Any]
    log: Path

    def errors(self) -> list[str]:
        """Lines of level ERROR in its log: what should never happen."""
        return [line for line in self.log.read_text().splitlines() if '"level": "ERROR"' in line]


@contextlib.contextmanager
def running_store_process(
    directory: Path, catalogue: EmbeddedRedis, blobs: EmbeddedS3, base: dict[str, Any], **settings: object
) -> Iterator[StoreProcess]:
    """A store of the base model `base` (a config.json) for the length of a block; its files lie in `directory`."""
    config = directory / "config.json"
    config.write_text(json.dumps(base))
    options: dict[str, object] = {
        "listen": "127.0.0.1:0", "base_model_config": config, "base_model": "tiny", "redis_url": catalogue.url,
        "arena_dir": directory, "upload_dir": directory, **settings,
    }  # fmt: skip
    command = [sys.executable, "-m", "services.adapter_store"]
    command += [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    log = directory / f"store-{time.time_ns()}.log"
    with log.open("wb") as file:
        process = subprocess.Popen(command, stderr=file, env=os.environ | blobs.client_environment())
    try:
        while not (listening := _listening(log)):
            if process.poll() is not None:
                raise RuntimeError(log.read_text()[-2000:])
            time.sleep(0.01)
        yield StoreProcess(process.pid, f"127.0.0.1:{listening['port']}", listening, log)
    finally:
        process.terminate()
        process.wait()


def _listening(log: Path) -> dict[str, Any]:
    for line in log.read_text().splitlines():
        with contextlib.suppress(ValueError):
            entry: dict[str, Any] = json.loads(line)
            if entry.get("message") == "listening":
                return entry
    return {}
