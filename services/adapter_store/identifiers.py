"""Names that callers give: adapter names, ids and aliases, labels, tenants, digests, source URIs.

Each is checked here and only here.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass

from services.common.errors import FieldError, Reason, SloraError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

MAX_TENANT_CHARS = 128
MAX_LABELS, MAX_LABEL_CHARS = 16, 128
# A bare name means the newest version already; an alias of this name that means another would mislead.
RESERVED_ALIASES = frozenset({"latest", "newest"})
MAX_PREFIX_BYTES = 900  # an S3 key has at most 1024 bytes, and the files' names follow

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_ALIAS = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,62}")
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


@dataclass(frozen=True, slots=True)
class AdapterId:
    """What a caller means: a name with a version, with an alias, or with neither: the newest version."""

    name: str
    version: int | None = None
    alias: str = ""

    def __str__(self) -> str:
        behind = self.alias or ("" if self.version is None else str(self.version))
        return f"{self.name}@{behind}" if behind else self.name


def parse_adapter_id(adapter_id: str) -> AdapterId:
    """Reads `name`, `name@version` or `name@alias`; ADAPTER_NAME_INVALID otherwise."""
    name, at, behind = adapter_id.partition("@")
    check_name(name)
    if not at:
        return AdapterId(name)
    if _VERSION.fullmatch(behind):
        return AdapterId(name, int(behind))
    if _ALIAS.fullmatch(behind):
        return AdapterId(name, alias=behind)
    raise SloraError(
        Reason.ADAPTER_NAME_INVALID,
        f"{adapter_id[:160]!r} is no adapter id: behind '@' comes a version, 1 or more without leading zeros, or an "
        "alias, which begins with a letter",
        adapter_id=adapter_id[:160],
    )


def check_alias(alias: str) -> str:
    """`alias` if it can be one, else ALIAS_INVALID. Numbers stay versions."""
    if not _ALIAS.fullmatch(alias) or alias.lower() in RESERVED_ALIASES:
        raise SloraError(
            Reason.ALIAS_INVALID,
            f"{alias[:80]!r} can be no alias: 1 to 63 of letters, digits, '.', '_', '-', beginning with a letter (a "
            f"number is a version), and none of {', '.join(sorted(RESERVED_ALIASES))}: a bare name means the newest",
            alias=alias[:80],
        )
    return alias


def check_labels(labels: Mapping[str, str]) -> Mapping[str, str]:
    """`labels` if they are few and short enough, else LABELS_INVALID."""
    if len(labels) > MAX_LABELS:
        raise too_many_labels(len(labels))
    for key, value in labels.items():
        if not _ALIAS.fullmatch(key):
            problem = "a key has 1 to 63 of letters, digits, '.', '_', '-', beginning with a letter"
        elif len(value) > MAX_LABEL_CHARS or not value.isprintable():
            problem = f"a value has at most {MAX_LABEL_CHARS} printable characters"
        else:
            continue
        raise SloraError(Reason.LABELS_INVALID, f"the label {key[:80]!r} cannot be: {problem}", label=key[:80])
    return labels


def too_many_labels(count: int) -> SloraError:
    """The error for more labels than a version may have."""
    message = f"there would be {count} labels; a version has at most {MAX_LABELS}"
    return SloraError(Reason.LABELS_INVALID, message, num_labels=count, max_labels=MAX_LABELS)


def check_tenant(tenant: str) -> str:
    """`tenant` if it is printable and at most 128 characters, else REQUEST_INVALID."""
    if len(tenant) > MAX_TENANT_CHARS or not tenant.isprintable():
        complaint = f"must be at most {MAX_TENANT_CHARS} printable characters"
        raise FieldError(Reason.REQUEST_INVALID, "tenant", complaint, num_chars=len(tenant))
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
            f"{uri[:200]!r} is no source: it must be s3://bucket/prefix/, where {CONFIG_FILE} and {WEIGHTS_FILE} lie "
            "(to sync: where a folder an adapter lies)",
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


def source_digest(uri: str, config_etag: str, config_bytes: int, weights_etag: str, weights_bytes: int) -> str:
    """The digest of a place in S3 as a listing shows it: `sha256:` and the SHA-256 of these lines (UTF-8, LF):

        slora-source-v1
        <uri of the place, s3://bucket/prefix/>
        adapter_config.json <length in bytes> <ETag>
        adapter_model.safetensors <length in bytes> <ETag>

    It identifies an adapter whose files were not read. The place is part of it because ETags need not tell objects
    of different places apart: not every service makes them from the content.
    """
    lines = (
        "slora-source-v1",
        uri,
        f"{CONFIG_FILE} {config_bytes} {config_etag}",
        f"{WEIGHTS_FILE} {weights_bytes} {weights_etag}",
    )
    return "sha256:" + hashlib.sha256("".join(line + "\n" for line in lines).encode()).hexdigest()
