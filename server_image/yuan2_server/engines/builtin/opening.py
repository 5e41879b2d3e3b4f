"""The built-in engine, loaded and warm."""

from __future__ import annotations

import logging

from yuan2_core.contract import ServeJob
from yuan2_server.engines.builtin import runner
from yuan2_server.engines.builtin.engine import BuiltinEngine
from yuan2_server.engines.builtin.sampler import Sampler
from yuan2_server.engines.builtin.scheduler import Limits

log = logging.getLogger(__name__)


def open_builtin(job: ServeJob, tokens: int, context: int) -> BuiltinEngine:
    """Load the weights, `tokens` of whose rows have a text, and start the engine's thread.

    Raises UserError when the files are not whole, or the device is not there.
    """
    spec = job.worker
    model = runner.load(job.model_path, spec.device, spec.precision, job.adapter_path)
    budget = runner.cached_token_budget(model, spec.device)
    say = log.warning if budget < 2 * context else log.info
    say("memory for the caches of %d tokens; a request can have %d", budget, context)
    model_runner = runner.ModelRunner(model)
    model_runner.check()  # the first call is slow, and what fails now is not served
    limits = Limits(max_sequences=spec.max_concurrent_requests, max_cached_tokens=budget)
    engine = BuiltinEngine(model_runner, Sampler(tokens), limits)
    engine.start()
    return engine
