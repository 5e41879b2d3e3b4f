"""The worker program: load the model, join the controller, answer, and leave in order on SIGTERM."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from yuan2_core.contract import ServeJob
from yuan2_core.errors import ModelError, UserError
from yuan2_server.engines.opening import open_engine
from yuan2_server.job import EngineFailedError
from yuan2_server.lifecycle import HttpServer, in_daemon_thread, stop_requested
from yuan2_server.registration import Registration, heart_beat_interval
from yuan2_server.worker import ModelWorker, ServedModel
from yuan2_server.worker_app import WorkerHost, build_app

log = logging.getLogger(__name__)

SETTLE_SECONDS = 1.0
"""After the withdrawal, requests whose senders had asked the controller before it still arrive."""
WATCH_SECONDS = 1.0
DRAIN_SECONDS = 86_400.0
"""Longest wait for running requests; the pod's grace period usually ends it sooner."""


async def run_worker(job: ServeJob, address: str, tell: Callable[[str], None]) -> None:
    """Serve until SIGTERM. `tell` is called with a sentence when the engine fails, once.

    Raises:
        UserError: the model cannot be served as it is.
        EngineFailedError: SIGTERM came after the engine had failed.
    """
    try:
        interval = heart_beat_interval()
    except ValueError as error:
        raise UserError(str(error)) from error
    stop = stop_requested()
    host = WorkerHost(job.served_name)
    server = HttpServer(build_app(host), job.worker.port)
    await server.start()
    try:
        worker = await _until(stop, asyncio.create_task(_load(job, host)))
        if worker is not None:
            await _serve(job, host, worker, address, interval, stop, tell)
    finally:
        await server.stop()


async def _load(job: ServeJob, host: WorkerHost) -> ModelWorker:
    started = time.monotonic()
    model = await in_daemon_thread(lambda: load_served_model(job))
    log.info("loaded %s in %.1f s", job.model_path, time.monotonic() - started)
    return ModelWorker(model, host.metrics)


async def _until(stop: asyncio.Event, task: asyncio.Task[ModelWorker]) -> ModelWorker | None:
    """The task's result, or None when the program is asked to stop first."""
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({stopping, task}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    return task.result() if task.done() else None


async def _serve(
    job: ServeJob,
    host: WorkerHost,
    worker: ModelWorker,
    address: str,
    interval: float,
    stop: asyncio.Event,
    tell: Callable[[str], None],
) -> None:
    engine = worker.model.engine
    host.metrics.gauge("yuan2_worker_queue_length", "Requests that run or wait.", lambda: engine.load)
    engine.add_metrics(host.metrics.registry)
    host.worker = worker
    registration = Registration(job.worker.controller_url, address, worker.status, interval)
    host.is_registered = lambda: registration.registered
    tasks = [asyncio.create_task(registration.run()), asyncio.create_task(_watch(host, registration, tell))]
    await stop.wait()
    log.info("draining %d requests", engine.load)
    worker.draining = True
    await registration.withdraw()
    await _drain(worker)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    if engine.problem:
        raise EngineFailedError(engine.problem)  # its thread may hang: nobody waits for it
    await asyncio.to_thread(engine.close)


async def _watch(host: WorkerHost, registration: Registration, tell: Callable[[str], None]) -> None:
    """Once the engine has failed, leave the controller's list and say why; liveness fails from then on."""
    while not host.broken():  # noqa: ASYNC110 -- another thread breaks
        await asyncio.sleep(WATCH_SECONDS)
    log.error("%s: this process must be started again", host.broken())
    tell(host.broken())
    await registration.withdraw()


async def _drain(worker: ModelWorker) -> None:
    deadline = time.monotonic() + DRAIN_SECONDS
    await asyncio.sleep(SETTLE_SECONDS)
    worker.closing = True
    engine = worker.model.engine
    while engine.load and not engine.problem and time.monotonic() < deadline:  # noqa: ASYNC110 -- once
        await asyncio.sleep(0.05)


def load_served_model(job: ServeJob) -> ServedModel:
    """Check the model directory, then load it. Raises UserError; what headers show is found before torch is
    imported."""
    from yuan2_core.tokenizer import Yuan2Tokenizer
    from yuan2_model import check_model_directory

    tokenizer = Yuan2Tokenizer.from_pretrained(job.model_path)
    dimensions = check_model_directory(job.model_path).dimensions
    if tokenizer.vocab_size > dimensions.vocab_size:
        raise ModelError(
            f"{job.model_path}: the tokenizer has {tokenizer.vocab_size} tokens, more than the "
            f"{dimensions.vocab_size} rows of the model's embedding; use the tokenizer of this model"
        )
    context = job.worker.max_model_length or dimensions.max_position_embeddings
    if context > dimensions.max_position_embeddings:
        raise UserError(
            f"maxModelLength: {context} is more than the {dimensions.max_position_embeddings} positions of "
            "the model; lower it"
        )
    engine = open_engine(job, tokenizer, dimensions, context)
    return ServedModel(job.names, tokenizer, engine, context)
