"""A packed adapter as a file: what the disk cache keeps. Written whole or not at all, believed only when it verifies.

The format: a line `slora-packed-1 <bytes of the header> <BLAKE3 of the header>`, the header (the manifest as JSON), the
packed bytes, nothing behind them. There is no flush to the device: what a crash of the host tears, the digests tell.
"""

from __future__ import annotations

import json
import os
from dataclasses import astuple, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from services.adapter_store.manifest import ElementType, ModulePlacement, PackedLayout, PackedManifest, TargetModule
from services.adapter_store.packing import Bytes
from services.common.packed_digest import packed_digest

PART_SUFFIX = ".part"
_MAGIC = "slora-packed-1"
_MAX_LINE_BYTES = 160
_MAX_HEADER_BYTES = 4 * 2**20
_WRITE_BYTES = 8 * 2**20


class DamagedFileError(Exception):
    """A file is not what was written there; the message says what is wrong."""


def encode_header(manifest: PackedManifest) -> bytes:
    """What stands before the packed bytes."""
    layout = manifest.layout
    fields = {
        "digest": manifest.digest,
        "packed_digest": manifest.packed_digest,
        "element_type": layout.element_type.value,
        "tile_elems": layout.tile_elems,
        "num_layers": layout.num_layers,
        "layer_elems": layout.layer_elems,
        "layers": [[astuple(placement) for placement in layer] for layer in layout.layers],
    }
    header = json.dumps(fields, separators=(",", ":")).encode()
    return f"{_MAGIC} {len(header)} {packed_digest(header)}\n".encode() + header


def write_packed(path: Path, header: bytes, content: memoryview) -> None:
    """Makes the file at `path`, under another name until it is whole. OSError, with nothing left, if it cannot."""
    unfinished = path.with_name(path.name + PART_SUFFIX)
    try:
        with unfinished.open("wb", buffering=0) as file:
            os.posix_fallocate(file.fileno(), 0, len(header) + len(content))  # a full disk says so before it is filled
            _write_all(file, memoryview(header))
            _write_all(file, content)
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


@dataclass(slots=True)
class PackedFile:
    """An open file whose header was read and verified; its packed bytes were not. A context manager."""

    manifest: PackedManifest
    _file: IO[bytes]

    @classmethod
    def open(cls, path: Path) -> PackedFile:
        """Reads the header; DamagedFileError if it or the file's length is not as it was written, OSError."""
        file = path.open("rb", buffering=0)
        try:
            manifest = _read_header(file)
            size, expected = os.fstat(file.fileno()).st_size, file.tell() + manifest.layout.packed_bytes
            if size != expected:
                raise DamagedFileError(f"it has {size} bytes instead of {expected}")
            return cls(manifest, file)
        except BaseException:
            file.close()
            raise

    def read_into(self, out: Bytes) -> None:
        """Fills `out` (layout.packed_bytes bytes) and verifies it; DamagedFileError, OSError. For a thread."""
        rest = out.data
        while rest:
            count = self._file.readinto(rest)  # type: ignore[attr-defined]  # unbuffered
            if not count:
                raise DamagedFileError("it ends too early")
            rest = rest[count:]
        if packed_digest(out.data) != self.manifest.packed_digest:
            raise DamagedFileError("its bytes have another digest")

    def __enter__(self) -> PackedFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def _write_all(file: IO[bytes], content: memoryview) -> None:
    while content:
        content = content[file.write(content[:_WRITE_BYTES]) :]


def _read_header(file: IO[bytes]) -> PackedManifest:
    line, newline, _ = file.read(_MAX_LINE_BYTES).partition(b"\n")
    words = line.decode(errors="replace").split(" ")
    if not newline or len(words) != 3 or words[0] != _MAGIC or not words[1].isdecimal():
        raise DamagedFileError("it does not begin as it should")
    num_bytes = int(words[1])
    file.seek(len(line) + 1)
    header = file.read(num_bytes) if num_bytes <= _MAX_HEADER_BYTES else b""
    if packed_digest(header) != words[2]:
        raise DamagedFileError("its header has another digest")
    return _decode(json.loads(header))


def _decode(fields: dict[str, Any]) -> PackedManifest:
    """The manifest; what is verified was written by this module, and is taken at its word."""
    layers = tuple(
        tuple(ModulePlacement(TargetModule(module), *numbers) for module, *numbers in layer)
        for layer in fields["layers"]
    )
    layout = PackedLayout(
        ElementType(fields["element_type"]),
        fields["tile_elems"],
        fields["num_layers"],
        fields["layer_elems"],
        layers,
    )
    return PackedManifest(fields["digest"], fields["packed_digest"], layout)
