"""The seam to vLLM's `AsyncLLM`, which lives on an event loop in a thread of its own."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import aclosing
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from yuan2_server.engines.seam import as_request_error, full, gone, hangs
from yuan2_server.engines.vllm.sampling import check, settings, tokens_of
from yuan2_server.protocol import ErrorCode, RequestError
from yuan2_server.sequence import Embedding, Entry, Sequence

log = logging.getLogger(__name__)

STEP_SECONDS = 600.0
"""Requests that all get no token for longer are taken for a step that never ends."""
WARM_TOKENS = 2
BASE = ""
"""Key of the adapter that belongs to the model itself."""


class VllmEngine:
    """`seam.Engine` in front of an `AsyncLLM`.

    `open_llm` is called on the engine's thread, where it has a running event loop; `rows` are those of the
    model's logits; `adapters` are vLLM's requests for adapters by the names that clients ask for, and for
    `BASE`.
    """

    def __init__(
        self,
        open_llm: Callable[[], Any],
        max_requests: int,
        rows: int,
        adapters: Mapping[str, Any] | None = None,
        step_seconds: float = STEP_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._open_llm = open_llm
        self._max_requests = max_requests
        self._rows = rows
        self._adapters = adapters or {}
        self._step_seconds = step_seconds
        self._clock = clock
        self._llm: Any = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="engine", daemon=True)
        self._lock = threading.Lock()
        self._load = 0
        self._heard = clock()
        self._closed = False
        self._tasks: dict[int, asyncio.Task[None]] = {}
        """Of each piece of work; they belong to the engine's thread."""

    def start(self) -> None:
        """Start vLLM and let it answer once. Raises what vLLM raises."""
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._warm(), self._loop).result()

    @property
    def load(self) -> int:
        """Requests that run or wait."""
        return self._load

    @property
    def problem(self) -> str:
        """Why nothing will be generated any more, in a sentence; empty while all is well."""
        if self._closed:
            return "the engine has stopped"
        if self._llm is not None and self._llm.errored:
            return "vLLM's engine core has died; the worker's log says why"
        silent = self._clock() - self._heard
        return hangs(silent) if self._load and silent > self._step_seconds else ""

    def submit(self, work: Entry) -> None:
        """Queue a sequence. Raises RequestError."""
        if isinstance(work, Embedding):
            message = (
                "embeddings: the engine vllm only generates text; serve them with worker.engine: builtin"
            )
            raise RequestError(ErrorCode.PARAM_OUT_OF_RANGE, message, "model")
        check(work.params)
        with self._lock:
            if self.problem:
                raise gone()
            if self._load >= self._max_requests:
                raise full(self._load)
            if not self._load:
                self._heard = self._clock()
            self._load += 1
        self._loop.call_soon_threadsafe(self._begin, work)

    def cancel(self, work: Entry) -> None:
        """Abort it in vLLM; its sink hears nothing more."""
        if not self._closed:
            self._loop.call_soon_threadsafe(self._cancel, work.id)

    def close(self) -> None:
        """Stop vLLM's processes; what is not finished fails."""
        self._closed = True
        asyncio.run_coroutine_threadsafe(self._shut(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def add_metrics(self, registry: CollectorRegistry) -> None:
        """vLLM's own metrics, under its own names."""
        registry.register(Relay())

    async def _warm(self) -> None:
        self._llm = self._open_llm()
        params = _sampling(temperature=0.0, max_tokens=WARM_TOKENS, ignore_eos=True, detokenize=False)
        for adapter in self._adapters.values() or [None]:
            async for _ in self._llm.generate(_prompt([0]), params, "warm-up", lora_request=adapter):
                pass

    def _begin(self, work: Sequence) -> None:
        task = self._loop.create_task(self._answer(work))
        self._tasks[work.id] = task
        task.add_done_callback(lambda _: self._forget(work.id))

    def _forget(self, number: int) -> None:
        self._tasks.pop(number, None)
        with self._lock:
            self._load -= 1

    def _cancel(self, number: int) -> None:
        task = self._tasks.get(number)
        if task is not None:
            task.cancel()

    async def _answer(self, work: Sequence) -> None:
        try:
            reason = await self._generate(work)
        except asyncio.CancelledError:
            if self._closed:
                work.sink.fail(gone())
            raise
        except Exception as error:
            log.error("request failed", exc_info=error)
            work.sink.fail(gone() if self._llm.errored else as_request_error(error))
        else:
            work.sink.finish(reason)

    async def _generate(self, work: Sequence) -> Any:
        """Tell the sink each token; returns why the answer ends."""
        outputs = self._llm.generate(
            _prompt(list(work.prompt_ids)),
            _sampling(**settings(work.params, self._rows)),
            str(work.id),
            lora_request=self._adapters.get(work.model, self._adapters.get(BASE)),
        )
        # Closing it before its end, at a stop string or when cancelled, aborts the request.
        async with aclosing(outputs):
            async for output in outputs:
                self._heard = self._clock()
                for token in tokens_of(output.outputs[0], work.params.logprobs):
                    reason = work.append(token)
                    if reason is not None:
                        return reason
        raise RuntimeError(f"vLLM ended an answer early: {output.outputs[0].finish_reason}")

    async def _shut(self) -> None:
        for task in list(self._tasks.values()):
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        self._llm.shutdown()


class Relay(Collector):
    """What vLLM counts in prometheus_client's own registry: the metrics whose names start with `vllm:`."""

    def collect(self) -> Iterator[Metric]:
        """Those of this moment."""
        return (metric for metric in REGISTRY.collect() if metric.name.startswith("vllm:"))


def _prompt(ids: list[int]) -> Any:
    from vllm.inputs import tokens_input

    return tokens_input(ids)


def _sampling(**arguments: Any) -> Any:
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    return SamplingParams(**arguments, output_kind=RequestOutputKind.DELTA)
