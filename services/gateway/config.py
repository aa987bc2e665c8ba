"""The gateway's settings, and the small frozen values they are cut into for those who use them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from services.common.settings import LogFormat, LogLevel, check_bounds, setting
from services.common.tls import ChannelSecurity, ServerTls

RoutingName = Literal["adapter_aware", "least_loaded", "round_robin"]


@dataclass(frozen=True)
class GatewaySettings:
    """A slora gateway: takes requests for any adapter and routes each to an engine."""

    engines: tuple[str, ...] = setting(help="host:port of each engine, separated by commas")
    adapter_store: tuple[str, ...] = setting(
        help="host:port of the adapter store, or of some of its replicas, separated by commas; they name the others"
    )
    listen: str = setting("127.0.0.1:50051", "host:port to serve gRPC on; port 0 takes a free one")
    metrics: str = setting("", "host:port to serve Prometheus metrics on; empty for none")
    http: str = setting("", "host:port to serve the OpenAI-compatible HTTP API on; empty for none")
    http_max_body_bytes: int = setting(4 * 2**20, "largest body of an HTTP request", above=0)
    http_allow_adapter_updates: bool = setting(False, "whether /v1/load_lora_adapter and unload may change adapters")
    max_concurrent: int = setting(4096, "most requests in flight; further ones are refused", above=0)
    max_attempts: int = setting(3, "most engines a request is sent to before its first token", above=0)
    engine_wait_seconds: float = setting(
        2.0, "how long a request waits for an engine that is expected back", at_least=0
    )
    engine_grace_seconds: float = setting(10.0, "an engine heard of this recently is expected back", at_least=0)
    engine_silence_seconds: float = setting(
        3.0, "an engine whose state stream is silent this long gets no requests", above=0
    )
    routing: RoutingName = setting(
        "adapter_aware", "how engines are chosen: adapter_aware, or for comparison least_loaded or round_robin"
    )
    spill_share: float = setting(
        0.125, "an adapter's engine may be fuller than the emptiest by this share of it", at_least=0
    )
    spill_requests: int = setting(4, "... or by this many requests, whichever is more", at_least=0)
    loading_seconds: float = setting(
        10.0, "an adapter sent to an engine this recently is thought to be loading there", at_least=0
    )
    store_timeout_seconds: float = setting(5.0, "how long a look-up in the adapter store may take", above=0)
    tls_certificate: str = setting(
        "", "PEM file with the certificate that is shown, then its issuers; empty: plain text"
    )
    tls_key: str = setting("", "PEM file with that certificate's key")
    tls_client_ca: str = setting("", "PEM file of authorities: callers need a certificate of theirs; empty: none asked")
    health: str = setting("", "host:port to serve health alone on, in plain text, for probes without TLS; empty: none")
    engine_ca: str = setting("", "PEM file of the authorities of the engines' certificates; empty: plain text")
    engine_certificate: str = setting("", "PEM file with the certificate that is shown to an engine that asks for one")
    engine_key: str = setting("", "PEM file with that certificate's key")
    engine_server_name: str = setting(
        "", "name in the engines' certificates, where that is not the host of their addresses"
    )
    store_ca: str = setting("", "PEM file of the authorities of the store's certificate; empty: plain text")
    store_certificate: str = setting("", "PEM file with the certificate that is shown to a store that asks for one")
    store_key: str = setting("", "PEM file with that certificate's key")
    store_server_name: str = setting("", "name in the store's certificate, where that is not the host of its address")
    store_token_file: str = setting("", "file with this service's token, for a store that asks who calls")
    allow_anonymous: bool = setting(False, "whether a gateway without keys may listen beyond the loopback interface")
    tenancy_redis: str = setting(
        "", "redis:// URL where API keys, tenants and limits are kept; empty: no keys asked for"
    )
    tenancy_prefix: str = setting("slora:tenancy", "what the keys of tenancy in Redis begin with")
    tenancy_timeout_seconds: float = setting(1.0, "how long a call to that Redis may take", above=0)
    tenancy_cache_seconds: float = setting(
        5.0, "how long an API key is believed: so late a revocation may be noticed", at_least=0
    )
    tenancy_lease_seconds: float = setting(15.0, "a killed gateway's requests count as running for this long", above=0)
    tenancy_fail_open: bool = setting(False, "whether known keys are served, without limits, while that Redis is away")
    admin_key_file: str = setting(
        "", "file with the key of AdminService (or SLORA_GATEWAY_ADMIN_KEY has the key); without one it is not served"
    )
    max_model_labels: int = setting(100, "most models with metrics of their own; the rest count as `other`", at_least=0)
    drain_seconds: float = setting(30.0, "on SIGTERM running requests have this long to end", at_least=0)
    log_level: LogLevel = setting("INFO", "DEBUG, INFO, WARNING or ERROR")
    log_format: LogFormat = setting("json", "json (an object a line) or text (for people)")
    otlp_endpoint: str = setting("", "http(s)://host:port of a collector of traces, OTLP over gRPC; empty: no traces")
    trace_sample_ratio: float = setting(
        1.0, "share of traces kept that begin here; a caller's own are kept as it says", at_least=0, at_most=1
    )

    def __post_init__(self) -> None:
        check_bounds(self)

    @property
    def server_tls(self) -> ServerTls:
        """What callers are shown and asked for."""
        return ServerTls(self.tls_certificate, self.tls_key, self.tls_client_ca)

    @property
    def engine_security(self) -> ChannelSecurity:
        """How engines are called."""
        return ChannelSecurity(self.engine_ca, self.engine_certificate, self.engine_key, self.engine_server_name)

    @property
    def store_security(self) -> ChannelSecurity:
        """How the store is called."""
        return ChannelSecurity(
            self.store_ca, self.store_certificate, self.store_key, self.store_server_name, self.store_token_file
        )


@dataclass(frozen=True)
class RoutingPolicy:
    """How engines are chosen: how much busier than others one may be and still be chosen for what it holds, and how
    long it counts that something was sent there, that it failed, and that it is late with a report."""

    rule: RoutingName = "adapter_aware"
    spill_share: float = 0.125
    spill_requests: int = 4
    loading_seconds: float = 10.0
    avoid_seconds: float = 1.0
    late_seconds: float = 2.0
    """More than the second within which an engine promises its next report."""


@dataclass(frozen=True)
class RetryPolicy:
    """When to try another engine, and how long to wait where there is none."""

    max_attempts: int = 3
    engine_wait_seconds: float = 2.0
    engine_grace_seconds: float = 10.0


@dataclass(frozen=True)
class HttpPolicy:
    """What HTTP requests may bring and do."""

    max_body_bytes: int = 4 * 2**20
    allow_adapter_updates: bool = False


@dataclass(frozen=True)
class TenancyPolicy:
    """Where tenants and keys are kept, and how much is risked on what is known of them."""

    redis_url: str = ""
    """Empty: everyone may use everything."""
    prefix: str = "slora:tenancy"
    timeout_seconds: float = 1.0
    cache_seconds: float = 5.0
    lease_seconds: float = 15.0
    fail_open: bool = False


def routing_policy(settings: GatewaySettings) -> RoutingPolicy:
    """The part of `settings` that routing needs."""
    return RoutingPolicy(settings.routing, settings.spill_share, settings.spill_requests, settings.loading_seconds)


def retry_policy(settings: GatewaySettings) -> RetryPolicy:
    """The part of `settings` that dispatching needs."""
    return RetryPolicy(settings.max_attempts, settings.engine_wait_seconds, settings.engine_grace_seconds)


def http_policy(settings: GatewaySettings) -> HttpPolicy:
    """The part of `settings` that the HTTP API needs."""
    return HttpPolicy(settings.http_max_body_bytes, settings.http_allow_adapter_updates)


def tenancy_policy(settings: GatewaySettings) -> TenancyPolicy:
    """The part of `settings` that tenancy needs."""
    return TenancyPolicy(
        settings.tenancy_redis,
        settings.tenancy_prefix,
        settings.tenancy_timeout_seconds,
        settings.tenancy_cache_seconds,
        settings.tenancy_lease_seconds,
        settings.tenancy_fail_open,
    )
