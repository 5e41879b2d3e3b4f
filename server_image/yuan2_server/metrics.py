"""Prometheus metrics of worker and API server, each in a registry of its own."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.responses import Response

from yuan2_server.requests import key_name

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class WorkerMetrics:
    """What a model worker counts. Names start with `yuan2_worker_`."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "yuan2_worker_requests",
            "Requests by how they ended: stop, length, cancelled, refused, failed.",
            ["outcome"],
            registry=self.registry,
        )
        self.prompt_tokens = Counter(
            "yuan2_worker_prompt_tokens", "Tokens of prompts.", registry=self.registry
        )
        self.completion_tokens = Counter(
            "yuan2_worker_completion_tokens", "Tokens of answers.", registry=self.registry
        )
        self.first_token_seconds = Histogram(
            "yuan2_worker_time_to_first_token_seconds",
            "From a request's arrival to its first text.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.request_seconds = Histogram(
            "yuan2_worker_request_seconds",
            "From a request's arrival to the end of its answer.",
            buckets=_SECONDS,
            registry=self.registry,
        )

    def gauge(self, name: str, help_: str, value: Callable[[], float]) -> None:
        """Add a gauge that is read when metrics are."""
        Gauge(name, help_, registry=self.registry).set_function(value)


class ApiMetrics:
    """What the API server counts. Names start with `yuan2_api_`."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "yuan2_api_requests",
            "Requests by route and HTTP status; 499 when the client left.",
            ["route", "status"],
            registry=self.registry,
        )
        self.seconds = Histogram(
            "yuan2_api_request_seconds",
            "From a request's arrival to the end of its answer.",
            ["route"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.tokens = Counter(
            "yuan2_api_tokens",
            "Tokens by model, name of the API key, and kind: prompt or completion.",
            ["model", "key", "kind"],
            registry=self.registry,
        )
        self.in_flight = Gauge(
            "yuan2_api_requests_in_flight", "Requests being answered.", registry=self.registry
        )

    def spender(self, model: str) -> Callable[[int, int], None]:
        """Counts tokens of prompts and answers for the key of the request that is being answered now."""
        key = key_name.get()

        def count(prompt: int, completion: int) -> None:
            self.tokens.labels(model, key, "prompt").inc(prompt)
            self.tokens.labels(model, key, "completion").inc(completion)

        return count


def render(registry: CollectorRegistry) -> Response:
    """The answer to `GET /metrics`."""
    return Response(generate_latest(registry), media_type=CONTENT_TYPE)
