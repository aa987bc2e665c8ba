"""The gateway's Prometheus metrics, `slora_gateway_*`. Label sets are bounded: models by a limit, engines by the
configuration, outcomes by the list of error reasons."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from services.common.telemetry import BoundedLabels
from services.gateway.engine_state import EngineState
from services.gateway.interval_histogram import IntervalHistogram
from services.gateway.router import Decision

UNRESOLVED = "unresolved"
"""The model label of requests whose model was not found: what callers make up must not use up the labels."""

_TTFT_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_INTER_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0, 5.0)


class ModelMetrics:
    """The metrics of one model, looked up once a request so that a token costs no label look-up."""

    def __init__(self, metrics: GatewayMetrics, label: str) -> None:
        self.label = label
        self.observe_first_token: Callable[[float], None] = metrics.first_token.labels(label).observe
        self.observe_inter_token = metrics.inter_token.of_model(label)
        self.count_prompt_tokens: Callable[[float], None] = metrics.tokens.labels(label, "prompt").inc
        self.count_completion_tokens: Callable[[float], None] = metrics.tokens.labels(label, "completion").inc


class GatewayMetrics:
    """Counters and histograms of requests; `watch_engines` adds the gauges of engines."""

    def __init__(self, registry: CollectorRegistry, max_models: int) -> None:
        self._bounded = BoundedLabels(max_models)
        self._models: dict[str, ModelMetrics] = {}
        prefix = "slora_gateway"
        self.requests = Counter(
            f"{prefix}_requests", "Requests by model and outcome.", ["model", "outcome"], registry=registry
        )
        self.first_token = Histogram(
            f"{prefix}_time_to_first_token_seconds",
            "From a request's arrival to its first message.",
            ["model"],
            buckets=_TTFT_BUCKETS,
            registry=registry,
        )
        self.inter_token = IntervalHistogram(
            f"{prefix}_inter_token_seconds",
            "Between two tokens of a stream; those of one message share the time since the message before.",
            _INTER_TOKEN_BUCKETS,
        )
        registry.register(self.inter_token)
        self.tokens = Counter(
            f"{prefix}_tokens", "Tokens of prompts and completions.", ["model", "kind"], registry=registry
        )
        self.retries = Counter(
            f"{prefix}_retries", "Requests sent to another engine, by why.", ["reason"], registry=registry
        )
        self.routed = Counter(
            f"{prefix}_routing_decisions",
            "Requests sent to an engine, by why that one.",
            ["decision"],
            registry=registry,
        )
        for decision in Decision:
            self.routed.labels(decision.value)  # a rate needs a zero to rise from
        self._http_responses = Counter(
            f"{prefix}_http_responses",
            "HTTP requests by route and status; 499 where the client left before there was one.",
            ["route", "status"],
            registry=registry,
        )
        self._refusals = Counter(
            f"{prefix}_refusals",
            "Callers refused for their key or their tenant's limits, by why.",
            ["reason"],
            registry=registry,
        )
        self.store_failovers = Counter(
            f"{prefix}_store_failovers",
            "Times that a replica of the adapter store failed, and another was asked.",
            registry=registry,
        )
        self.in_flight = Gauge(f"{prefix}_in_flight_requests", "Requests being served.", registry=registry)

    def count_http_response(self, route: str, status: int) -> None:
        """An HTTP request ended; `route` is one of the API's, or `other`."""
        self._http_responses.labels(route, str(status)).inc()

    def count_refusal(self, reason: str) -> None:
        """A caller was refused; `reason` is one of the error reasons, in lower case. Tenants are no labels: they are
        as many as an operator likes."""
        self._refusals.labels(reason).inc()

    def of_model(self, name: str) -> ModelMetrics:
        """The metrics of the model of this name (an adapter's without its version); of `other` past the limit."""
        label = self._bounded(name)
        if label not in self._models:
            self._models[label] = ModelMetrics(self, label)
        return self._models[label]


class EngineCollector(Collector):
    """The gauges of engines and of the catalogue, read when scraped.

    Scrapes come on another thread; it only reads single values, which a moment later would be others anyway.
    """

    def __init__(self, states: Sequence[EngineState], num_adapters: Callable[[], int]) -> None:
        self._states = tuple(states)
        self._num_adapters = num_adapters

    def collect(self) -> Iterator[Metric]:
        """The gauges' values now."""
        per_engine: list[tuple[str, str, Callable[[EngineState], float]]] = [
            ("engine_up", "1 if the engine reports its state.", lambda s: float(s.is_up)),
            ("engine_draining", "1 if the engine takes no new requests.", lambda s: float(s.load.draining)),
            ("engine_running_sequences", "Sequences that run in the engine.", lambda s: s.load.num_running),
            ("engine_queue_length", "Sequences that wait in the engine.", lambda s: s.load.num_waiting),
            ("engine_in_flight_requests", "This gateway's requests in the engine.", lambda s: s.num_in_flight),
            ("engine_free_pages", "Pages of the engine's pool that nothing owns.", lambda s: s.load.num_free_pages),
            ("engine_resident_adapters", "Adapters in the engine's memory.", lambda s: len(s.resident)),
            ("engine_fullness", "How full the router takes it to be; over 1, requests wait.", lambda s: s.fullness),
        ]
        for name, text, value in per_engine:
            family = GaugeMetricFamily(f"slora_gateway_{name}", text, labels=["engine"])
            for state in self._states:
                family.add_metric([state.address], value(state))
            yield family
        num_up = sum(state.is_up for state in self._states)
        yield GaugeMetricFamily("slora_gateway_engines_up", "Engines that report their state.", value=num_up)
        yield GaugeMetricFamily(
            "slora_gateway_adapters", "Adapters (names) in the catalogue.", value=self._num_adapters()
        )
