"""`make bench-serve`: our worker with its built-in engine against FastChat's own, each behind the programs
that its users run.

Real processes on both sides: FastChat's controller, a model worker and an API server; the same model code,
the same random model that never ends an answer, so that every answer has the tokens that were asked for, the
same prompts, greedy, fp32, all processors. One side works at a time, in turns.

- Tokens a second: so many clients, each with one answer, unstreamed, through each side's own API server.
- Time to the first token: answers asked for at random moments (Poisson), the same on both sides, streamed.
  Requests come at a share of what the slower side can do at 8 clients, so that no queue grows for ever.

FastChat's programs run in the environment that its documents pin (`.venv-fastchat`).
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import httpx

from tests.bench.fastchat_model import for_fastchat
from tests.bench.fastchat_side import PYTHON
from tests.bench.report import Report, Row, compared, options, percentile
from tests.support.serving import Program, Stack, serve_job, tiny_model
from tests.support.waiting import wait_for
from yuan2_core.processors import available_cpus

LIMIT = 64
"""Requests that FastChat's worker takes at once; ours has the same default."""
LOAD = 0.7
"""Of the rate at which the slower side answers 8 clients."""
AGAINST = "FastChat's worker and API server"


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    hidden: int = 768
    layers: int = 12
    tokens: int = 64
    """Of an answer."""
    words: int = 48
    """Of a prompt."""
    streams: tuple[int, ...] = (1, 8, 32)
    arrivals: int = 100
    pairs: int = 3
    seconds: float = 1800.0
    """Longest wait for an answer, or for a worker."""

    def __str__(self) -> str:
        return f"hidden {self.hidden:,} × {self.layers} layers, fp32, answers of {self.tokens} tokens"


SMALL = Plan(hidden=64, layers=1, tokens=8, words=4, streams=(1, 2), arrivals=4, pairs=1, seconds=120.0)


@dataclass(frozen=True)
class Side:
    """Where one side is asked."""

    url: str
    """Of its API server."""
    endings: tuple[str, ...] = ("length",)
    """What it says of an answer that has all its tokens."""


def main() -> None:
    """Measure and write build/bench/serve.json."""
    parser = options(__doc__)
    parser.add_argument("--pairs", type=int, default=Plan.pairs, help="of each (default %(default)s)")
    parser.add_argument("--threads", type=int, default=available_cpus(), help="of each worker")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the programs end with this one
    report = Report("serve", arguments)
    plan = SMALL if arguments.small else replace(Plan(), pairs=arguments.pairs)
    with tempfile.TemporaryDirectory() as name:
        report.write(measure(Path(name), plan, arguments.threads))


def measure(root: Path, plan: Plan, threads: int) -> list[Row]:
    """Tokens a second at each number of clients, and the time to the first token."""
    with _sides(root, plan, threads) as (ours, theirs):
        return asyncio.run(_measure(plan, ours, theirs))


async def _measure(plan: Plan, ours: Side, theirs: Side) -> list[Row]:
    rows = []
    slowest = float("inf")
    for streams in plan.streams:
        await _throughput(ours, plan, 1)
        await _throughput(theirs, plan, 1)
        pairs = [
            (await _throughput(ours, plan, streams), await _throughput(theirs, plan, streams))
            for _ in range(plan.pairs)
        ]
        sizes = f"{plan}, {streams} client{'s' if streams > 1 else ''}"
        rows.append(compared("tokens a second, built-in engine", AGAINST, sizes, pairs, "tokens/s"))
        if streams <= 8:
            slowest = min(statistics.median(side) for side in zip(*pairs, strict=True))
    return [*rows, *await _first_tokens(plan, ours, theirs, LOAD * slowest / plan.tokens)]


async def _throughput(side: Side, plan: Plan, streams: int) -> float:
    """Tokens a second of so many answers at once."""
    async with _client(plan) as client:
        began = time.perf_counter()
        await asyncio.gather(*(_answer(client, side, plan, number) for number in range(streams)))
        return streams * plan.tokens / (time.perf_counter() - began)


async def _first_tokens(plan: Plan, ours: Side, theirs: Side, rate: float) -> list[Row]:
    """Median and 99th percentile at so many requests a second."""
    found = [await _arrivals(side, plan, rate) for side in (ours, theirs)]
    sizes = f"{plan}, {plan.arrivals} requests at random moments, {rate:.2g} a second"
    return [
        compared(f"time to the first token, built-in engine, {name}", AGAINST, sizes, [(one, other)], "s")
        for name, (one, other) in {
            "median": tuple(map(statistics.median, found)),
            "99th percentile": tuple(percentile(times, 99) for times in found),
        }.items()
    ]


async def _arrivals(side: Side, plan: Plan, rate: float) -> list[float]:
    """Seconds to the first token of each request."""
    choose = random.Random(0)

    async def one(client: httpx.AsyncClient, number: int, wait: float) -> float:
        await asyncio.sleep(wait)
        return await _first_token(client, side, plan, number)

    async with _client(plan) as client:
        moment, waits = 0.0, []
        for _ in range(plan.arrivals):
            moment += choose.expovariate(rate)
            waits.append(moment)
        return list(await asyncio.gather(*(one(client, *pair) for pair in enumerate(waits))))


async def _answer(client: httpx.AsyncClient, side: Side, plan: Plan, number: int) -> None:
    response = await client.post(f"{side.url}/v1/chat/completions", json=_request(plan, number))
    response.raise_for_status()
    choice = response.json()["choices"][0]
    # An answer that ended early would count tokens that were never made. FastChat's worker says `stop` of one
    # that reached its length, too: it counts words, not tokens.
    if choice["finish_reason"] not in side.endings or not choice["message"]["content"]:
        raise RuntimeError(f"{side.url}: {choice}")


async def _first_token(client: httpx.AsyncClient, side: Side, plan: Plan, number: int) -> float:
    began, first = time.perf_counter(), None
    request = {**_request(plan, number), "stream": True}
    async with client.stream("POST", f"{side.url}/v1/chat/completions", json=request) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if first is None and '"content": "' in line.replace('":"', '": "').replace('"content": ""', ""):
                first = time.perf_counter() - began
    if first is None:
        raise RuntimeError(f"{side.url}: a stream without a token")
    return first


def _request(plan: Plan, number: int) -> dict[str, object]:
    choose = random.Random(number)
    words = " ".join(choose.choices(("man", "garden", "small", "model", "tests", "doing"), k=plan.words))
    messages = [{"role": "user", "content": words}]
    return {"model": "yuan2", "messages": messages, "temperature": 0, "max_tokens": plan.tokens}


def _client(plan: Plan) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    return httpx.AsyncClient(timeout=plan.seconds, limits=limits, trust_env=False)


@contextlib.contextmanager
def _sides(root: Path, plan: Plan, threads: int) -> Iterator[tuple[Side, Side]]:
    model = root / "model"
    tiny_model(model, context=2048, endless=True, hidden=plan.hidden, layers=plan.layers)
    stack = Stack(root, threads=threads)
    try:
        yield _ours(stack, model), _theirs(stack, for_fastchat(model, root / "yuan2-fastchat"), plan)
    finally:
        stack.close()


def _ours(stack: Stack, model: Path) -> Side:
    controller = stack.controller().ready("/test_connection")
    job = serve_job(model, controller.url, max_concurrent_requests=LIMIT)
    stack.worker(job).ready()
    api = stack.api(job).ready()
    return Side(api.url)


def _theirs(stack: Stack, model: Path, plan: Plan) -> Side:
    controller = stack.controller().ready("/test_connection")
    stack.fastchat_worker(model, controller, LIMIT, PYTHON)
    _wait_listed(controller, plan.seconds)
    api = stack.fastchat_api(controller, PYTHON).ready("/v1/models")
    return Side(api.url, ("length", "stop"))


def _wait_listed(controller: Program, seconds: float) -> None:
    def listed() -> bool:
        httpx.post(f"{controller.url}/refresh_all_workers", trust_env=False)
        answer = httpx.post(f"{controller.url}/list_models", trust_env=False)
        return "yuan2" in answer.json()["models"]

    wait_for("FastChat's worker", listed, seconds, every=0.5)


if __name__ == "__main__":
    main()
