"""The engine's settings, and the small frozen values they are cut into for those who use them."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from services.common.settings import LogFormat, LogLevel, check_bounds, setting
from services.common.tls import ChannelSecurity, ServerTls

OrderName = Literal["fcfs", "priority", "fair"]
ClientKind = Literal["tenant", "adapter"]

HEAD_START_LIMIT = 2**40
"""More requests than an engine sees; turns that are made of it stay below those that mean nobody (2**63)."""

_MOST_PAGES = 2**31
_MOST_PRICE = 1e9


MAX_TP_SIZE = 64


@dataclass(frozen=True)
class EngineSettings:
    """A slora engine: one base model and the adapters that its pool holds just now."""

    checkpoint: str = setting(help="directory of a Hugging Face checkpoint")
    adapter_store: tuple[str, ...] = setting(
        help="host:port of the adapter store, or of some of its replicas, separated by commas; they name the others"
    )
    listen: str = setting("127.0.0.1:50061", "host:port to serve gRPC on; port 0 takes a free one")
    metrics: str = setting("", "host:port to serve Prometheus metrics on; empty for none")
    base_model: str = setting("", "the base model's served name; empty: the checkpoint directory's name")
    engine_id: str = setting("", "unique name; empty: made from host, port and time")
    device: str = setting("cpu", "torch device: cpu or cuda")
    dtype: str = setting("auto", "auto (the checkpoint's), float32, bfloat16 or float16")
    random_weights: bool = setting(False, "make up the weights of config.json's model and read none: to size a machine")
    num_threads: int = setting(
        0, "CPU threads of the core; 0: torch's own choice, with tp_size its share of the CPUs", at_least=0
    )
    tp_size: int = setting(1, "processes (on accelerators: devices) of this host that share the model")
    step_timeout_seconds: float = setting(
        120.0,
        "a step that takes longer ends the core: it hangs; after twice as long where no other process sees that",
        above=0,
    )
    pool_bytes: int = setting(
        0, "bytes of each process's pool; 0: 512 MiB on a CPU, what the weights leave on an accelerator", at_least=0
    )
    num_pages: int = setting(0, "pages of the pool; 0: as many as pool_bytes holds", at_least=0, below=_MOST_PAGES)
    tokens_per_page: int = setting(16, "tokens whose K and V one page holds", above=0)
    prefix_cache: bool = setting(True, "keep KV of finished prompts and outputs, for those that begin alike")
    prefix_cache_across_tenants: bool = setting(
        False, "let tenants find each other's prefixes: their times and usage then tell who sent what before"
    )
    max_adapters: int = setting(1024, "most adapters resident at once (rows of the device's adapter table)", above=0)
    popularity_half_life_seconds: float = setting(
        0.0,
        "half-life of adapters' counts of requests, by which popular ones are loaded ahead of requests; 0: none is",
        at_least=0,
    )
    max_running: int = setting(0, "most sequences that run at once; 0: 64 on a CPU, 256 on an accelerator", at_least=0)
    max_step_tokens: int = setting(
        0, "most tokens of a step, prefill and decode; 0: 512 on a CPU, 8192 otherwise", at_least=0
    )
    admission_batch: int = setting(
        0, "when full, fill so many places at a time; 0: 1 on a CPU, 4 on an accelerator", at_least=0
    )
    max_model_len: int = setting(0, "longest sequence in tokens; 0: the checkpoint's", at_least=0)
    max_waiting: int = setting(
        4096,
        "most requests in the queue; further ones are refused, with fair the last of the client with most",
        at_least=1,
    )
    policy: OrderName = setting("fcfs", "in which order requests are admitted: fcfs, priority or fair")
    priority_head_start: int = setting(
        256,
        "requests that each point of priority puts a request ahead of",
        at_least=0,
        below=HEAD_START_LIMIT,
        only_with="priority",
    )
    fairness_by: ClientKind = setting("tenant", "between whom: tenant or adapter", only_with="fair")
    input_price: float = setting(1.0, "what a token of input counts", at_least=0, below=_MOST_PRICE, only_with="fair")
    output_price: float = setting(2.0, "what a token of output counts", at_least=0, below=_MOST_PRICE, only_with="fair")
    fairness_weights: tuple[str, ...] = setting(
        (), "shares, as tenant=2,other=1; 1 for those not named", only_with="fair"
    )
    fairness_headroom: float = setting(
        0.0625,
        "share of the places that is kept free of clients over their share: served 1.3 times what others were lately",
        at_least=0,
        below=1,
        only_with="fair",
    )
    fairness_prompt_tokens: int = setting(
        512,
        "while a client over its share has to wait, its prompts join only steps of so many prompt tokens; 0: all",
        at_least=0,
        only_with="fair",
    )
    latency_goal_seconds: float = setting(
        0.0, "drop at once whose first token cannot come in this time; 0: nobody", at_least=0
    )
    max_adapters_a_batch: int = setting(0, "soft limit on different adapters that run at once; 0: none", at_least=0)
    clustering_patience_seconds: float = setting(1.0, "one that waited so long may exceed that limit", at_least=0)
    tls_certificate: str = setting(
        "", "PEM file with the certificate that is shown, then its issuers; empty: plain text"
    )
    tls_key: str = setting("", "PEM file with that certificate's key")
    tls_client_ca: str = setting("", "PEM file of authorities: callers need a certificate of theirs; empty: none asked")
    health: str = setting("", "host:port to serve health alone on, in plain text, for probes without TLS; empty: none")
    store_ca: str = setting("", "PEM file of the authorities of the store's certificate; empty: plain text")
    store_certificate: str = setting("", "PEM file with the certificate that is shown to a store that asks for one")
    store_key: str = setting("", "PEM file with that certificate's key")
    store_server_name: str = setting("", "name in the store's certificate, where that is not the host of its address")
    store_token_file: str = setting("", "file with this service's token, for a store that asks who calls")
    share_arena: bool = setting(True, "copy adapters out of the memory of a store on this host, if it may be read")
    load_through_local: bool = setting(
        False, "load everything through a store on this host, if it can lend, wherever adapters have their homes"
    )
    load_timeout_seconds: float = setting(30.0, "an adapter load that takes longer fails", above=0)
    drain_seconds: float = setting(30.0, "on SIGTERM running requests have this long to end", at_least=0)
    log_level: LogLevel = setting("INFO", "DEBUG, INFO, WARNING or ERROR")
    log_format: LogFormat = setting("json", "json (an object a line) or text (for people)")
    otlp_endpoint: str = setting("", "http(s)://host:port of a collector of traces, OTLP over gRPC; empty: no traces")
    trace_sample_ratio: float = setting(
        1.0, "share of traces kept that begin here; a caller's own are kept as it says", at_least=0, at_most=1
    )

    def __post_init__(self) -> None:
        if not 1 <= self.tp_size <= MAX_TP_SIZE:
            raise ValueError(f"tp_size is {self.tp_size}; it must be in 1 to {MAX_TP_SIZE}")
        check_bounds(self)
        _ = self.policies  # which says what is wrong with them

    @property
    def server_tls(self) -> ServerTls:
        """What callers are shown and asked for."""
        return ServerTls(self.tls_certificate, self.tls_key, self.tls_client_ca)

    @property
    def store_security(self) -> ChannelSecurity:
        """How the store is called."""
        return ChannelSecurity(
            self.store_ca, self.store_certificate, self.store_key, self.store_server_name, self.store_token_file
        )

    @property
    def served_name(self) -> str:
        """What the base model is called outside."""
        return self.base_model or Path(self.checkpoint).resolve().name

    @property
    def without_effect(self) -> list[str]:
        """Settings that were changed, but are another policy's than the one chosen."""
        fields = [f for f in dataclasses.fields(self) if f.metadata["only_with"] not in ("", self.policy)]
        return [field.name for field in fields if getattr(self, field.name) != field.default]

    @property
    def num_places(self) -> int:
        """How many sequences run at once at most, of settings `for_device`."""
        return min(self.max_running, self.max_step_tokens)

    @property
    def policies(self) -> PolicyConfig:
        """Who is admitted, in what order, and who is dropped."""
        return PolicyConfig(
            order=self.policy,
            priority_head_start=self.priority_head_start,
            fairness_by=self.fairness_by,
            input_price=self.input_price,
            output_price=self.output_price,
            client_weights=_parse_weights(self.fairness_weights),
            fairness_headroom=self.fairness_headroom,
            fairness_prompt_tokens=self.fairness_prompt_tokens,
            latency_goal_seconds=self.latency_goal_seconds,
            max_adapters_a_batch=self.max_adapters_a_batch,
            clustering_patience_seconds=self.clustering_patience_seconds,
        )

    def for_process(self, tp_rank: int) -> EngineSettings:
        """These settings, as one of the processes that share the model has them: its device, its share of CPUs.

        Raises ValueError for a device that is named by its number.
        """
        if self.tp_size == 1:
            return self
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"with tp_size {self.tp_size} device is cpu or cuda, not {self.device}")
        if self.device == "cuda":
            return dataclasses.replace(self, device=f"cuda:{tp_rank}")
        share = max(1, (os.cpu_count() or 1) // self.tp_size)
        return dataclasses.replace(self, num_threads=self.num_threads or share)

    def for_device(self) -> EngineSettings:
        """These settings, with what was left to the engine chosen for its device."""
        on_cpu = self.device == "cpu"
        return dataclasses.replace(
            self,
            max_running=self.max_running or (64 if on_cpu else 256),
            max_step_tokens=self.max_step_tokens or (512 if on_cpu else 8192),
            admission_batch=self.admission_batch or (1 if on_cpu else 4),
        )


_LEAST_WEIGHT, _MOST_WEIGHT = 1e-6, 1e6


def _parse_weights(texts: Sequence[str]) -> dict[str, float]:
    weights: dict[str, float] = {}
    for text in texts:
        client, _, number = text.rpartition("=")
        try:
            weight = float(number)
        except ValueError:
            raise ValueError(f"fairness_weights has {text!r}; each is client=number, as gold=2") from None
        if client in weights:
            raise ValueError(f"fairness_weights names {client!r} twice")
        weights[client] = weight
    return weights


@dataclass(frozen=True)
class PolicyConfig:
    """Which policies an engine combines; see `services.engine.scheduling.policies`.

    Raises ValueError for prices and weights that make no sense.
    """

    order: OrderName = "fcfs"
    priority_head_start: int = 256
    fairness_by: ClientKind = "tenant"
    input_price: float = 1.0
    output_price: float = 2.0
    client_weights: Mapping[str, float] = field(default_factory=dict)
    fairness_headroom: float = 0.0625
    fairness_prompt_tokens: int = 512
    latency_goal_seconds: float = 0.0
    max_adapters_a_batch: int = 0
    clustering_patience_seconds: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < max(self.input_price, self.output_price) < math.inf:
            raise ValueError(
                f"input_price and output_price are {self.input_price} and {self.output_price}; "
                "one of them must be above 0, and both finite"
            )
        for client, weight in self.client_weights.items():
            if not _LEAST_WEIGHT <= weight <= _MOST_WEIGHT:
                bounds = f"{_LEAST_WEIGHT:g} to {_MOST_WEIGHT:g}"
                raise ValueError(f"fairness_weights gives {client!r} {weight}; a weight is in {bounds}")


@dataclass(frozen=True)
class SchedulerConfig:
    """The limits of a step and of the queue."""

    max_running: int
    max_step_tokens: int
    max_model_len: int
    max_waiting: int
    tokens_per_page: int
    eos_token_ids: frozenset[int]
    admission_batch: int = 1
    prefix_cache: bool = False
    prefix_cache_across_tenants: bool = False
    popularity_half_life_seconds: float = 0.0


@dataclass(frozen=True)
class PoolConfig:
    """The pool's shape: `[num_layers, num_pages, page_elems]`."""

    num_layers: int
    num_pages: int
    tokens_per_page: int
    num_kv_heads: int
    head_dim: int

    @property
    def page_elems(self) -> int:
        """Elements of one layer's page: K and V of tokens_per_page tokens."""
        return 2 * self.num_kv_heads * self.tokens_per_page * self.head_dim
