"""The adapter store's settings."""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass

from services.adapter_store.identifiers import parse_source_uri
from services.common.errors import SloraError
from services.common.settings import LogFormat, LogLevel, check_bounds, setting
from services.common.tls import ServerTls


@dataclass(frozen=True)
class AdapterStoreSettings:
    """A slora adapter store: the adapters of one base model, from S3, in host RAM.

    Credentials and region of S3 come the AWS way: environment, shared files, instance roles.
    """

    base_model_config: str = setting(help="a checkpoint directory, or its config.json")
    base_model: str = setting("", "the base model's served name; empty: the checkpoint directory's name")
    dtype: str = setting("auto", "type of packed elements: auto (the checkpoint's), float32, bfloat16 or float16")
    listen: str = setting("127.0.0.1:50052", "host:port to serve gRPC on; port 0 takes a free one")
    metrics: str = setting("", "host:port to serve Prometheus metrics on; empty for none")
    tls_certificate: str = setting(
        "", "PEM file with the certificate that is shown, then its issuers; empty: plain text"
    )
    tls_key: str = setting("", "PEM file with that certificate's key")
    tls_client_ca: str = setting("", "PEM file of authorities: callers need a certificate of theirs; empty: none asked")
    health: str = setting("", "host:port to serve health alone on, in plain text, for probes without TLS; empty: none")
    service_tokens: str = setting(
        "", "directory with a token file a service, named engine, gateway or operator: callers must say who they are"
    )
    tenancy_redis: str = setting(
        "", "redis:// URL where gateways keep API keys: their tenants may call; empty: services only"
    )
    tenancy_prefix: str = setting("slora:tenancy", "what the keys of tenancy in Redis begin with")
    tenancy_timeout_seconds: float = setting(1.0, "how long a call to that Redis may take", above=0)
    tenancy_cache_seconds: float = setting(
        5.0, "how long an API key is believed: so late a revocation may be noticed", above=0
    )
    allow_anonymous: bool = setting(False, "whether a store without tokens may listen beyond the loopback interface")
    redis_url: str = setting("redis://127.0.0.1:6379/0", "Redis that holds the catalogue")
    catalogue_prefix: str = setting("slora", "first part of every Redis key; one catalogue a base model")
    redis_timeout_seconds: float = setting(5.0, "a Redis command that takes longer counts as Redis being away", above=0)
    max_events: int = setting(10_000, "catalogue changes kept for watchers that resume", above=0)
    s3_endpoint: str = setting("", "URL of the S3 service; empty: AWS")
    s3_bucket: str = setting("", "bucket for uploads; empty: uploads are refused")
    s3_prefix: str = setting("adapters", "prefix of uploads in that bucket")
    s3_timeout_seconds: float = setting(5.0, "silence of S3 for longer than this counts as S3 being away", above=0)
    s3_read_seconds: float = setting(
        300.0, "an S3 object that takes longer to read, tries included, is given up", above=0
    )
    s3_attempts: int = setting(
        4, "tries of an S3 request that is throttled, breaks or fails; pauses are random", above=0
    )
    s3_threads: int = setting(8, "most S3 reads at once, and most S3 requests of other kinds", above=0)
    s3_part_bytes: int = setting(
        8 * 2**20, "larger S3 objects are read in ranges of so many bytes, side by side", above=0
    )
    arena_bytes: int = setting(2**30, "bytes of shared memory that hold packed adapters")
    arena_dir: str = setting("/dev/shm", "directory (a tmpfs) of the shared memory segment")
    arena_group_readable: bool = setting(False, "engines of its group may map the segment too, not only its user's")
    disk_cache_dir: str = setting("", "directory, of this store alone, that keeps packed adapters; empty for none")
    disk_cache_bytes: int = setting(64 * 2**30, "most bytes of packed adapters in disk_cache_dir")
    max_adapter_bytes: int = setting(2 * 2**30, "largest adapter_model.safetensors that is taken", above=0)
    max_preparing: int = setting(
        4, "most adapters read, validated and packed at once, and most read from the disk", above=0
    )
    max_uploads: int = setting(64, "most uploads received at once", above=0)
    upload_dir: str = setting("", "directory for files being uploaded; empty: the system's temporary directory")
    orphan_seconds: float = setting(
        3600.0, "files of an upload that never ended are removed after this long", at_least=0
    )
    sweep_seconds: float = setting(30.0, "how often files that no version uses are looked for", above=0)
    sync_uri: str = setting("", "s3://bucket/prefix/ whose folders are adapters: followed by itself; empty for none")
    sync_seconds: float = setting(60.0, "how often that prefix is listed", above=0)
    replica_id: str = setting("", "names this store among its replicas, also after a restart; empty: its address")
    advertise: str = setting(
        "", "host or host:port where engines and gateways reach this store; empty: listen's host, or this host's name"
    )
    replica_seconds: float = setting(3.0, "a replica that was silent for so long is no longer one", above=0)
    num_homes: int = setting(2, "replicas that hold an adapter", above=0)
    pinned_share: float = setting(
        0.75, "most of the arena that pinned adapters may take, in (0, 1]", above=0, at_most=1
    )
    stall_seconds: float = setting(
        60.0, "a fetch or upload that stands still, or a lease that lasts, so long is ended", above=0
    )
    drain_seconds: float = setting(30.0, "on SIGTERM running calls have this long to end", at_least=0)
    log_level: LogLevel = setting("INFO", "DEBUG, INFO, WARNING or ERROR")
    log_format: LogFormat = setting("json", "json (an object a line) or text (for people)")
    otlp_endpoint: str = setting("", "http(s)://host:port of a collector of traces, OTLP over gRPC; empty: no traces")
    trace_sample_ratio: float = setting(
        1.0, "share of traces kept that begin here; a caller's own are kept as it says", at_least=0, at_most=1
    )

    @property
    def server_tls(self) -> ServerTls:
        """What callers are shown and asked for."""
        return ServerTls(self.tls_certificate, self.tls_key, self.tls_client_ca)

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.disk_cache_dir and not self.disk_cache_bytes > 0:
            raise ValueError(f"disk_cache_bytes is {self.disk_cache_bytes}; with a disk_cache_dir it must be above 0")
        if self.tenancy_redis and not self.service_tokens:
            raise ValueError("tenancy_redis without service_tokens: tenants alone could call, and no engine could load")
        if self.sync_uri:
            try:
                parse_source_uri(self.sync_uri)
            except SloraError as error:
                raise ValueError(f"sync_uri: {error.message}") from error

    def address_at(self, port: int) -> str:
        """`host:port` where others reach this store, which listens on `port`."""
        host = self.listen.rpartition(":")[0]
        if host in ("", "0.0.0.0", "[::]"):
            host = socket.gethostname()
        address = self.advertise or host
        try:
            return f"[{ipaddress.IPv6Address(address)}]:{port}"
        except ValueError:
            return address if ":" in address.rpartition("]")[2] else f"{address}:{port}"
