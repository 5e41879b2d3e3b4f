"""`GET /progress` (JSON), `/metrics` (Prometheus) of one attempt, and `/stacks` (text) of a pod's ranks."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from yuan2_core.contract import Progress

ReadProgress = Callable[[], Progress]
ReadStacks = Callable[[], str]
TEXT = "text/plain; charset=utf-8"
STACKS_SECONDS = 10.0
"""Stacks are read again only after so long, however often they are asked for: ranks stand still meanwhile."""

_GAUGES: tuple[tuple[str, str, str], ...] = (
    ("step", "step", "Optimizer steps done, earlier attempts included"),
    ("total_steps", "total_steps", "Optimizer steps of the whole run"),
    ("epoch", "epoch", "Passes over the data"),
    ("loss", "loss", "Mean loss over the labelled tokens of the last global batch"),
    ("learning_rate", "learning_rate", "Learning rate of the last step"),
    ("grad_norm", "grad_norm", "Gradient norm of the last step, before clipping"),
    (
        "tokens_per_second",
        "tokens_per_second",
        "Tokens of all ranks a second of step time, padding not counted",
    ),
    ("mfu", "mfu", "Model FLOPs a second of step time over the peak of the GPUs"),
    ("memory_bytes", "memory_bytes", "Highest memory of a process, on its GPU or resident on CPU"),
    ("eval_loss", "eval_loss", "Mean loss over the labelled tokens of the held-out data"),
    ("best_step", "best_step", "Step of the lowest evaluation loss"),
    ("samples", "samples", "Sequences to train on"),
    ("tokens", "tokens", "Tokens of the sequences to train on"),
    ("dropped_samples", "dropped_samples", "Sequences and records left out"),
    ("last_checkpoint_step", "last_checkpoint_step", "Step of the last complete checkpoint"),
    ("eta_seconds", "eta_seconds", "Remaining time at the recent pace"),
    ("last_step_age_seconds", "last_step_age_seconds", "Time since the last sign of life"),
)
_COUNTERS: tuple[tuple[str, str, str], ...] = (
    ("seconds_in_steps", "seconds_in_steps", "Wall time of this attempt inside optimizer steps"),
    ("seconds", "seconds_total", "Wall time of this attempt"),
)


class TrainCollector(Collector):
    """Turns a `Progress` into metric families `yuan2_train_*`; what is not known yet is absent."""

    def __init__(self, read: ReadProgress) -> None:
        self._read = read

    def collect(self) -> Iterator[Metric]:
        progress = self._read()
        names = ["name", "attempt"]
        values = [progress.name, str(progress.attempt)]
        for name, attribute, text in _GAUGES:
            value = getattr(progress, attribute)
            if value is not None:
                gauge = GaugeMetricFamily(f"yuan2_train_{name}", text, labels=names)
                gauge.add_metric(values, float(value))
                yield gauge
        for name, attribute, text in _COUNTERS:
            counter = CounterMetricFamily(f"yuan2_train_{name}", text, labels=names)
            counter.add_metric(values, float(getattr(progress, attribute)))
            yield counter
        state = GaugeMetricFamily(
            "yuan2_train_state", "1 for the state the attempt is in", labels=[*names, "state"]
        )
        state.add_metric([*values, progress.state], 1.0)
        yield state


class ProgressServer:
    """Answers from a thread of its own; reading progress touches files only, so it never waits for a rank.

    Without `read` it knows no progress: only node 0 does.
    """

    def __init__(self, port: int, read: ReadProgress | None, stacks: ReadStacks) -> None:
        self._server = ThreadingHTTPServer(("", port), _handler(_routes(read, stacks)))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, name="progress", daemon=True)

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


Route = Callable[[], tuple[str, bytes]]


def _routes(read: ReadProgress | None, stacks: ReadStacks) -> Mapping[str, Route]:
    """What is answered under which path: content type and body."""
    held = _Held(stacks)
    routes: dict[str, Route] = {"/stacks": lambda: (TEXT, held.read().encode())}
    if read is not None:
        registry = CollectorRegistry(auto_describe=False)
        registry.register(TrainCollector(read))
        routes["/progress"] = lambda: ("application/json", read().to_json().encode())
        routes["/metrics"] = lambda: (CONTENT_TYPE_LATEST, generate_latest(registry))
    return routes


class _Held:
    """Stacks that are kept for `STACKS_SECONDS`; who asks meanwhile waits for those that are being read."""

    def __init__(self, read: ReadStacks) -> None:
        self._read = read
        self._lock = threading.Lock()
        self._text, self._at = "", float("-inf")

    def read(self) -> str:
        with self._lock:
            if time.monotonic() - self._at > STACKS_SECONDS:
                self._text, self._at = self._read(), time.monotonic()
            return self._text


def _handler(routes: Mapping[str, Route]) -> type[BaseHTTPRequestHandler]:
    unknown = f"this port answers {', '.join(sorted(routes))}\n".encode()

    class Handler(BaseHTTPRequestHandler):
        timeout = 10

        def do_GET(self) -> None:
            route = routes.get(self.path.split("?", 1)[0])
            kind, body = (TEXT, unknown) if route is None else route()
            self.send_response(404 if route is None else 200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name is the base class's
            """A poll every few seconds is no news."""

    return Handler
