"""Takes an upload's bytes to a temporary file that has no name: nothing of it survives the call, or the process."""

from __future__ import annotations

import errno
import hashlib
import mmap
import tempfile
from concurrent.futures import Executor
from types import TracebackType
from typing import IO

from services.adapter_store.peft_config import MAX_CONFIG_BYTES
from services.adapter_store.preparation import AdapterFiles
from services.adapter_store.threads import run_to_end
from services.common.errors import Reason, SloraError


class UploadSpool:
    """The two files of one upload while they come in: configuration first, then weights. A context manager."""

    def __init__(self, directory: str, max_weights_bytes: int, threads: Executor) -> None:
        self._threads = threads
        self._max_weights_bytes = max_weights_bytes
        self._config = bytearray()
        self._directory = directory or None
        # Made for the first bytes: an upload that sends none holds no file.
        self._file: IO[bytes] | None = None
        self._num_bytes = 0
        self._sha256 = hashlib.sha256()

    def __enter__(self) -> UploadSpool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def add_config(self, chunk: bytes) -> None:
        """The next bytes of adapter_config.json; UPLOAD_INVALID behind weights, ADAPTER_TOO_LARGE over the limit."""
        if self._num_bytes:
            raise SloraError(Reason.UPLOAD_INVALID, "a config_chunk came behind a weights_chunk; send the config first")
        if len(self._config) + len(chunk) > MAX_CONFIG_BYTES:
            raise _too_large("adapter_config.json", MAX_CONFIG_BYTES)
        self._config += chunk

    async def add_weights(self, chunk: bytes) -> None:
        """The next bytes of adapter_model.safetensors; ADAPTER_TOO_LARGE over the limit."""
        if not self._config:
            raise SloraError(Reason.UPLOAD_INVALID, "a weights_chunk came before any config_chunk")
        if self._num_bytes + len(chunk) > self._max_weights_bytes:
            raise _too_large("adapter_model.safetensors", self._max_weights_bytes)
        try:
            await run_to_end(self._threads, lambda: self._append(chunk))
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            message = "the store has no room for the upload; see its setting upload_dir"
            raise SloraError(Reason.ADAPTER_TOO_LARGE, message, num_bytes=self._num_bytes) from error
        self._num_bytes += len(chunk)

    def files(self) -> AdapterFiles:
        """Both files, complete; UPLOAD_INVALID if one is missing. Valid while the spool is open."""
        if not self._config or not self._num_bytes:
            missing = "adapter_model.safetensors" if self._config else "adapter_config.json"
            message = f"the upload ended without {missing}, or the file is empty"
            raise SloraError(Reason.UPLOAD_INVALID, message, file=missing)
        mapped = mmap.mmap(self.weights_file.fileno(), self._num_bytes, access=mmap.ACCESS_READ)
        return AdapterFiles(
            config=memoryview(bytes(self._config)),
            weights=memoryview(mapped),
            config_sha256=hashlib.sha256(self._config).hexdigest(),
            weights_sha256=self._sha256.hexdigest(),
        )

    @property
    def weights_file(self) -> IO[bytes]:
        """The spooled adapter_model.safetensors."""
        if self._file is None:
            # Unbuffered: a full disk is the chunk's error, and not once more that of closing the file.
            self._file = tempfile.TemporaryFile(dir=self._directory, buffering=0)  # noqa: SIM115 (closed in __exit__)
        return self._file

    def _append(self, chunk: bytes) -> None:
        rest = memoryview(chunk)
        while rest:
            rest = rest[self.weights_file.write(rest) :]
        self._sha256.update(chunk)


def _too_large(name: str, max_bytes: int) -> SloraError:
    return SloraError(
        Reason.ADAPTER_TOO_LARGE, f"{name} has more than {max_bytes} bytes", file=name, max_bytes=max_bytes
    )
