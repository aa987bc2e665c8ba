"""Names that callers give: adapter names and ids, tenants, digests, source URIs. Each is checked here and only here."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

from services.common.errors import Reason, SloraError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

MAX_TENANT_CHARS = 128
MAX_PREFIX_BYTES = 900  # an S3 key has at most 1024 bytes, and the files' names follow

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_VERSION = re.compile(r"[1-9][0-9]{0,8}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}")


@dataclass(frozen=True, slots=True)
class ObjectPrefix:
    """A place in S3: a bucket and a key prefix that is empty or ends in `/`."""

    bucket: str
    prefix: str

    @property
    def uri(self) -> str:
        """`s3://bucket/prefix/`."""
        return f"s3://{self.bucket}/{self.prefix}"


def check_name(name: str) -> str:
    """`name` if it is a valid adapter name, else ADAPTER_NAME_INVALID."""
    if not _NAME.fullmatch(name):
        raise SloraError(
            Reason.ADAPTER_NAME_INVALID,
            f"{name[:140]!r} is no adapter name: 1 to 128 of letters, digits, '.', '_', '-', beginning with a "
            "letter or digit",
            name=name[:140],
        )
    return name


def is_name_prefix(prefix: str) -> bool:
    """Whether any valid name can begin with `prefix`."""
    return not prefix or _NAME.fullmatch(prefix) is not None


def parse_adapter_id(adapter_id: str) -> tuple[str, int | None]:
    """Cuts `name` or `name@version` into name and version (None: not pinned); ADAPTER_NAME_INVALID otherwise."""
    name, at, version = adapter_id.partition("@")
    check_name(name)
    if not at:
        return name, None
    if not _VERSION.fullmatch(version):
        raise SloraError(
            Reason.ADAPTER_NAME_INVALID,
            f"{adapter_id[:160]!r} is no adapter id: behind '@' comes a version, 1 or more, without leading zeros",
            adapter_id=adapter_id[:160],
        )
    return name, int(version)


def check_tenant(tenant: str) -> str:
    """`tenant` if it is printable and at most 128 characters, else REQUEST_INVALID."""
    if len(tenant) > MAX_TENANT_CHARS or not tenant.isprintable():
        raise SloraError(
            Reason.REQUEST_INVALID,
            f"tenant must be at most {MAX_TENANT_CHARS} printable characters",
            field="tenant",
            num_chars=len(tenant),
        )
    return tenant


def check_digest(digest: str) -> str:
    """`digest` if it has the form of one, else ADAPTER_DIGEST_INVALID."""
    if not _DIGEST.fullmatch(digest):
        raise SloraError(
            Reason.ADAPTER_DIGEST_INVALID,
            f"{digest[:80]!r} is no digest: 'sha256:' and 64 lower-case hexadecimal digits",
            digest=digest[:80],
        )
    return digest


def parse_source_uri(uri: str) -> ObjectPrefix:
    """Cuts `s3://bucket/prefix/` (the last slash may be left out); SOURCE_URI_INVALID otherwise."""
    scheme, separator, rest = uri.partition("://")
    bucket, _, prefix = rest.partition("/")
    prefix = prefix if not prefix or prefix.endswith("/") else prefix + "/"
    sound = (
        scheme == "s3"
        and separator
        and _BUCKET.fullmatch(bucket)
        and prefix.isprintable()
        and len(prefix.encode()) <= MAX_PREFIX_BYTES
        and not prefix.startswith("/")
        and not any(part in {".", ".."} for part in prefix.split("/"))
    )
    if not sound:
        raise SloraError(
            Reason.SOURCE_URI_INVALID,
            f"{uri[:200]!r} is no source: it must be s3://bucket/prefix/, where {CONFIG_FILE} and {WEIGHTS_FILE} lie",
            source_uri=uri[:200],
        )
    return ObjectPrefix(bucket, prefix)


def content_digest(config_sha256: str, config_bytes: int, weights_sha256: str, weights_bytes: int) -> str:
    """The digest of an adapter's content: `sha256:` and the SHA-256 of these lines (UTF-8, each ends in LF):

        slora-adapter-v1
        adapter_config.json <length in bytes> <SHA-256 of its bytes, lower-case hexadecimal>
        adapter_model.safetensors <length in bytes> <SHA-256 of its bytes, lower-case hexadecimal>

    The same two files give the same digest wherever they lie; a change of any byte of either gives another.
    """
    lines = (
        "slora-adapter-v1",
        f"{CONFIG_FILE} {config_bytes} {config_sha256}",
        f"{WEIGHTS_FILE} {weights_bytes} {weights_sha256}",
    )
    return "sha256:" + hashlib.sha256("".join(line + "\n" for line in lines).encode()).hexdigest()
