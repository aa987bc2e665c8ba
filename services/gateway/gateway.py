"""The gateway, put together: what follows engines and store, what serves, and in which order they start and stop."""

from __future__ import annotations

import asyncio
import contextlib
import functools

from prometheus_client import CollectorRegistry

from services.common.grpc_server import GrpcServer
from services.common.settings import check_peers
from services.common.tracing import NO_TRACING, Tracing
from services.gateway.adapter_source import CatalogueFeed
from services.gateway.admin_servicer import ADMIN_SERVICE_NAME, AdminServicer
from services.gateway.admission import Admission
from services.gateway.catalogue import Catalogue
from services.gateway.config import GatewaySettings, http_policy, retry_policy, routing_policy, tenancy_policy
from services.gateway.dispatcher import Dispatcher
from services.gateway.engine_client import EngineClient
from services.gateway.engine_pool import EnginePool
from services.gateway.generations import Generations
from services.gateway.http.app import build_app
from services.gateway.http.gate import Gate
from services.gateway.http.server import HttpServer
from services.gateway.metrics import EngineCollector, GatewayMetrics
from services.gateway.models import Models
from services.gateway.routing_rules import make_router
from services.gateway.servicer import SERVICE_NAME, InferenceServicer
from services.gateway.store_client import StoreClient
from services.gateway.tenancy.exposure import check_exposure
from services.gateway.tenancy.tenancy import Tenancy
from services.gateway.use_reporter import UseReporter


class Gateway:
    """A gateway in this process; create it inside a running event loop.

    Health: the server as a whole is SERVING as long as the process can answer. `slora.gateway.v1.InferenceService`
    is SERVING while at least one engine takes requests: that one is for readiness.
    """

    def __init__(
        self,
        settings: GatewaySettings,
        registry: CollectorRegistry,
        admin_secret: str = "",
        tracing: Tracing = NO_TRACING,
    ) -> None:
        """`admin_secret`, the admin key, lets AdminService be used; without one it is not served.

        Raises AddressError where an address is none, cannot be served on, or may not without keys; TlsError.
        """
        check_exposure(settings)
        check_peers("--engines", settings.engines)
        check_peers("--adapter-store", settings.adapter_store)
        self._settings = settings
        self._tracing = tracing
        self.pool = EnginePool(
            settings.engines,
            functools.partial(EngineClient, security=settings.engine_security),
            make_router(routing_policy(settings)),
            settings.engine_silence_seconds,
        )
        metrics = GatewayMetrics(registry, settings.max_model_labels)
        self._store = StoreClient(settings.adapter_store, metrics.store_failovers.inc, settings.store_security)
        self.catalogue = Catalogue()
        self._feed = CatalogueFeed(self.catalogue, self._store, self.pool.abandon_loads)
        self._admission = Admission(settings.max_concurrent)
        registry.register(EngineCollector(self.pool.states, lambda: len(self.catalogue)))
        self.tenancy = Tenancy(tenancy_policy(settings), admin_secret, metrics.count_refusal)
        feed = self._feed
        self._uses = UseReporter(self._store)
        models = Models(
            self.pool,
            self.catalogue,
            self._store,
            settings.store_timeout_seconds,
            lambda: feed.is_current,
            self._uses.note,
        )
        dispatcher = Dispatcher(self.pool, retry_policy(settings))
        directory, admin_key = self.tenancy.directory, self.tenancy.admin_key
        admin = None if directory is None or admin_key is None else AdminServicer(directory, admin_key)
        names = [SERVICE_NAME, *([ADMIN_SERVICE_NAME] if admin is not None else [])]
        self.server = GrpcServer(settings.listen, names, settings.server_tls, settings.health, tracing=tracing)
        if admin is not None:
            admin.add_to(self.server)
        generations = Generations(models, dispatcher, self._admission, self.tenancy.limiter, metrics)
        InferenceServicer(models, generations, self.tenancy.authenticator).add_to(self.server)
        self.http = self._http_server(models, generations, metrics) if settings.http else None
        self._tasks: list[asyncio.Task[None]] = []
        self._readiness: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begins to follow engines and store, then to serve.

        Waits up to `engine_wait_seconds` for every engine to be heard of first: without that, the first requests
        after a start would find none.
        """
        self.pool.start()
        self.tenancy.start()
        follow = (self._store.follow_replicas(), self._feed.run(), self._uses.run())
        self._tasks += [asyncio.create_task(task) for task in follow]
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.pool.wait_until_heard(), self._settings.engine_wait_seconds)
        await self.server.start()
        if self.http is not None:
            self.http.start()
        self._readiness = asyncio.create_task(self._follow_readiness())

    async def drain(self) -> None:
        """Refuses new requests and returns when the last running one has ended."""
        if self._readiness is not None:
            self._readiness.cancel()
        await self.server.set_serving(False)
        await self._admission.drain()

    async def close(self) -> None:
        """Ends HTTP and stops following; the gRPC server must have been stopped."""
        if self.http is not None:
            await self.http.stop()
        tasks = [*self._tasks, *([self._readiness] if self._readiness is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.pool.close()
        await self._uses.report()
        await self._store.close()
        await self.tenancy.close()

    def _http_server(self, models: Models, generations: Generations, metrics: GatewayMetrics) -> HttpServer:
        policy = http_policy(self._settings)
        gate = Gate(self.tenancy.authenticator, self.tenancy.admin_key, asks_for_keys=self.tenancy.is_on)
        count, tracing = metrics.count_http_response, self._tracing
        app = build_app(models, generations, self._store, gate, self._is_ready, count, policy, tracing)
        return HttpServer(self._settings.http, app, self._settings.server_tls)

    def _is_ready(self) -> bool:
        return self.pool.num_serving() > 0 and not self._admission.is_draining

    async def _follow_readiness(self) -> None:
        while True:
            change = self.pool.next_change()
            await self.server.set_serving(self.pool.num_serving() > 0, SERVICE_NAME)
            await change.wait()
