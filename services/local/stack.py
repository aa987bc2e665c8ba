"""The whole of slora on one host: Redis, S3, the adapter store, engines and the gateway, supervised, on loopback.

As a library, for the demo and for tests:

    with LocalStack(tmp_path, checkpoint, engine_options={"num_pages": 256}) as stack:
        channel = grpc.insecure_channel(stack.gateway_address)
        ...
        stack.kill("engine-0")          # SIGKILL; it is started again
        stack.wait_ready("engine-0")
        stack.kill_core("engine-0")     # the engine stays and starts another core
        stack.wait_ready("engine-0")
        stack.take_down("redis")        # SIGKILL; it stays down …
        stack.bring_up("redis")         # … until now

The processes are called redis, s3, adapter-store, engine-0, engine-1, … and gateway.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from services.common.settings import option_name
from services.local.checkpoint import BadInput, makes_weights_up, open_checkpoint
from services.local.embedded_redis import EmbeddedRedis
from services.local.embedded_s3 import EmbeddedS3
from services.local.health_client import is_serving
from services.local.ports import LOOPBACK, free_port, is_free
from services.local.supervisor import ProcessSpec, Supervisor

REDIS, S3, ADAPTER_STORE, GATEWAY = "redis", "s3", "adapter-store", "gateway"
HTTP = "gateway-http"
DRAIN_SECONDS = 5
_NOTICE_SECONDS = 5.0

PATIENT_THREADS = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "5000"}
"""Threads of an engine that wait for each other spin for some microseconds and then sleep. Others share this host's
cores, and threads that spin on take the time of those they wait for. A decode step of 100 million parameters on two
cores, alone and beside a process that keeps one of them busy: 17.6 and 248 ms with spins of 200,000, 17.7 and 83 with
20,000, 17.7 and 46 with these, 21.9 and 35 with 1,000; 23.5 and 33 where they sleep at once, as each of the step's
hundreds of products then waits for a wake-up."""

SLEEPING_THREADS = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}
"""Threads that train where anything else may run, such as in a container, sleep at once: on two cores that others kept
busy 15 steps of the demo's base model took 10 s, and 62 with threads that spin for that moment."""

HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""Weights, pool and activations of an engine lie in huge pages where the kernel lends them (transparent huge pages at
`madvise`): a decode step reads all weights, and a prefill's fresh buffers fault once, not 512 times. 7.9 to 7.35 s for
the CPU benchmark's requests. C libraries other than glibc 2.35 and later ignore it."""

Options = Mapping[str, object]
"""Settings of a service by name: `{"num_pages": 64}` becomes `--num-pages 64`."""


def check_gateway_ports(grpc_port: int, http_port: int, may_have: Callable[[int], bool] = is_free) -> None:
    """Raises BadInput if the gateway may not have one of its ports; 0 is any free one."""
    how = {"gRPC": "`make up PORT=N`, or --port N", "HTTP": "`make up HTTP_PORT=N`, or --http-port N"}
    if grpc_port and grpc_port == http_port:
        raise BadInput(f"port {grpc_port} cannot be the gateway's for gRPC and for HTTP; choose another for one")
    for api, port in (("gRPC", grpc_port), ("HTTP", http_port)):
        if port and not may_have(port):
            hint = f"choose another one for the gateway's {api}: {how[api]}"
            raise BadInput(f"port {port} of {LOOPBACK} is in use; {hint}")


@dataclass
class LocalStack:
    """All services over one checkpoint; a context manager, running inside the `with` block.

    `state_dir` holds redis/, s3/ and logs/; with the same one, adapters registered before are there again. Options go
    to the services as they are and win over what is set here. `s3_environment` (the AWS way: AWS_ENDPOINT_URL, keys)
    names an S3 service elsewhere; without it one is embedded. Raises BadInput for a directory that is no checkpoint,
    StartFailed when a process does not come up (a service has `start_timeout_seconds`).
    """

    state_dir: Path
    checkpoint: Path
    num_engines: int = 1
    base_model: str = ""
    gateway_port: int = 0
    http_port: int = 0
    store_port: int = 0
    bucket: str = "adapters"
    store_options: Options = field(default_factory=dict)
    engine_options: Options = field(default_factory=dict)
    gateway_options: Options = field(default_factory=dict)
    s3_environment: Mapping[str, str] | None = None
    start_timeout_seconds: float = 90.0
    report: Callable[[str], None] = lambda line: None

    def __post_init__(self) -> None:
        described = open_checkpoint(self.checkpoint, needs_weights=not makes_weights_up(self.engine_options))
        self.checkpoint = described.path
        self.base_model = self.base_model or described.name
        self._dtype = described.dtype
        chosen = {GATEWAY: self.gateway_port, HTTP: self.http_port, ADAPTER_STORE: self.store_port}
        check_gateway_ports(self.gateway_port, self.http_port)
        self._ports: dict[str, int] = {name: port for name, port in chosen.items() if port}
        for name in self._port_names():
            self._ports[name] = self._ports.get(name) or free_port(self._ports.values())
        self.redis = EmbeddedRedis(self.state_dir / "redis", self._ports[REDIS])
        self.s3 = None if self.s3_environment is not None else EmbeddedS3(self.state_dir / "s3", self._ports[S3])

    def __enter__(self) -> LocalStack:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self, on_ready: Callable[[str], None] = lambda name: None) -> None:
        """Starts everything; returns when the gateway serves. `on_ready` hears each process that is up, by name."""
        if self.s3 is not None:
            self.s3.make_bucket(self.bucket)
        self.supervisor.start(on_ready)

    def stop(self) -> None:
        """Stops everything, the gateway first; idempotent."""
        self.supervisor.stop()

    def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        """Kills a process; it is started again on its ports. See `wait_ready`."""
        self.supervisor.kill(name, number)

    def take_down(self, name: str) -> None:
        """Kills a process and leaves it down until `bring_up`."""
        self.supervisor.take_down(name)

    def bring_up(self, name: str) -> None:
        """Starts again what `take_down` ended, and waits until it is ready."""
        self.supervisor.bring_up(name)
        self.supervisor.wait_ready(name)

    def wait_ready(self, name: str, timeout_seconds: float = 90.0) -> None:
        """Returns when the process is up and serves; raises StartFailed after `timeout_seconds`."""
        self.supervisor.wait_ready(name, timeout_seconds)

    def pid(self, name: str) -> int:
        """A process's id; LookupError while it is down."""
        return self.supervisor.pid(name)

    def core_pid(self, engine: str = "engine-0") -> int:
        """The process id of an engine's core; LookupError while it is down."""
        children = self.supervisor.child_pids(engine)
        if not children:
            raise LookupError(f"{engine} has no core now")
        return children[0]

    def kill_core(self, engine: str = "engine-0") -> None:
        """Kills an engine's core; returns when the engine has noticed. It starts another: see `wait_ready`."""
        core, address = self.core_pid(engine), self._address(engine)
        os.kill(core, signal.SIGKILL)
        deadline = time.monotonic() + _NOTICE_SECONDS
        while is_serving(address) and core in self.supervisor.child_pids(engine) and time.monotonic() < deadline:
            time.sleep(0.02)

    @property
    def process_names(self) -> tuple[str, ...]:
        """All processes, in the order of their start."""
        return self.supervisor.names

    @property
    def log_dir(self) -> Path:
        """A log file for each process."""
        return self.state_dir / "logs"

    @property
    def gateway_address(self) -> str:
        """`host:port` of the gateway: where clients send requests."""
        return self._address(GATEWAY)

    @property
    def http_url(self) -> str:
        """What OpenAI's clients take as their base URL."""
        return f"http://{self._address(HTTP)}/v1"

    @property
    def store_address(self) -> str:
        """`host:port` of the adapter store: where adapters are uploaded."""
        return self._address(ADAPTER_STORE)

    @property
    def engine_names(self) -> tuple[str, ...]:
        """engine-0, engine-1, …"""
        return tuple(f"engine-{i}" for i in range(self.num_engines))

    @property
    def engine_addresses(self) -> tuple[str, ...]:
        """`host:port` of each engine."""
        return tuple(self._address(name) for name in self.engine_names)

    @property
    def metrics_urls(self) -> dict[str, str]:
        """Where each service serves Prometheus metrics, by its name."""
        services = (ADAPTER_STORE, *self.engine_names, GATEWAY)
        return {name: f"http://{self._address(_metrics(name))}/metrics" for name in services}

    @property
    def client_s3_environment(self) -> dict[str, str]:
        """Environment variables with which an AWS client reaches the S3 service in use."""
        return self.s3.client_environment() if self.s3 is not None else dict(self.s3_environment or {})

    @cached_property
    def supervisor(self) -> Supervisor:
        """The supervisor of all processes, for those who need more than the methods here."""
        storage = [self._redis_spec()] + ([self._s3_spec(self.s3)] if self.s3 is not None else [])
        engines = [self._service("engine", name, self._engine_settings()) for name in self.engine_names]
        store = self._service("adapter_store", ADAPTER_STORE, self._store_settings())
        gateway = self._service("gateway", GATEWAY, self._gateway_settings())
        return Supervisor([storage, [store], engines, [gateway]], self.log_dir, self.report)

    def _port_names(self) -> list[str]:
        services = [ADAPTER_STORE, *self.engine_names, GATEWAY]
        return [REDIS, S3, HTTP, *services, *(_metrics(name) for name in services)]

    def _address(self, name: str) -> str:
        return f"{LOOPBACK}:{self._ports[name]}"

    def _redis_spec(self) -> ProcessSpec:
        return ProcessSpec(REDIS, self.redis.command(), self.redis.is_ready)

    def _s3_spec(self, s3: EmbeddedS3) -> ProcessSpec:
        return ProcessSpec(S3, s3.command(), s3.is_ready, s3.server_environment())

    def _store_settings(self) -> dict[str, object]:
        settings: dict[str, object] = {
            "redis_url": self.redis.url,
            "s3_bucket": self.bucket,
            "base_model_config": self.checkpoint,
            "base_model": self.base_model,
            "dtype": self._dtype,
            **self.store_options,
        }
        endpoint = self.client_s3_environment.get("AWS_ENDPOINT_URL")
        return {"s3_endpoint": endpoint, **settings} if endpoint else settings

    def _store_environment(self) -> dict[str, str]:
        if self.s3 is None:
            return {**os.environ, **(self.s3_environment or {})}
        # What the user has set for AWS elsewhere (a profile, a session token) is not for the embedded server.
        elsewhere = {key: value for key, value in os.environ.items() if not key.startswith("AWS_")}
        return {**elsewhere, **self.s3.client_environment()}

    def _engine_settings(self) -> dict[str, object]:
        return {
            "checkpoint": self.checkpoint,
            "adapter_store": self.store_address,
            "base_model": self.base_model,
            "dtype": self._dtype,
            **self.engine_options,
        }

    def _gateway_settings(self) -> dict[str, object]:
        return {
            "engines": ",".join(self.engine_addresses),
            "adapter_store": self.store_address,
            "http": self._address(HTTP),
            **self.gateway_options,
        }

    def _service(self, module: str, name: str, settings: Options) -> ProcessSpec:
        address = self._address(name)
        everything = {
            "listen": address,
            "metrics": self._address(_metrics(name)),
            "drain_seconds": DRAIN_SECONDS,
            **settings,
        }
        # Where the service is encrypted, its health is asked for at a port of its own.
        probed = str(everything.get("health") or address)
        options = [part for key, value in everything.items() for part in (option_name(key), str(value))]
        return ProcessSpec(
            name,
            (sys.executable, "-m", f"services.{module}", *options),
            lambda: is_serving(probed),
            self._store_environment() if name == ADAPTER_STORE else {**PATIENT_THREADS, **HUGE_PAGES, **os.environ},
            self.start_timeout_seconds,
        )


def _metrics(name: str) -> str:
    return f"{name}-metrics"
