"""Answers that never end, until nobody listens any more."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from http.client import HTTPConnection

import httpx
import pytest

from tests.integration.server.conftest import Service, running_service
from tests.support.serving import tiny_model
from tests.support.waiting import wait_for

CONTEXT = 16384
"""Six such answers are 100,000 steps: minutes, where an answer that is given up ends within a step."""
QUESTION = {"model": "yuan2", "messages": [{"role": "user", "content": "Who are you?"}], "temperature": 0}


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service of such a model."""
    model = tmp_path_factory.mktemp("endless")
    tiny_model(model, context=CONTEXT, endless=True)
    with running_service(model, tmp_path_factory.mktemp("service"), context=CONTEXT) as made:
        yield made


def queue_length(service: Service) -> int:
    return int(httpx.post(service.worker.url + "/worker_get_status").json()["queue_length"])


def counted(service: Service, name: str) -> float:
    """A counter of the worker; 0 before it counts."""
    found = re.search(
        rf"^{re.escape(name)} (\S+)$", httpx.get(service.worker.url + "/metrics").text, re.MULTILINE
    )
    return float(found[1]) if found else 0.0


def tokens(service: Service) -> float:
    return counted(service, "yuan2_worker_completion_tokens_total")


def cancelled(service: Service) -> float:
    return counted(service, 'yuan2_worker_requests_total{outcome="cancelled"}')


def assert_nothing_is_generated(service: Service) -> None:
    """Nothing is queued, and the tokens of the next answer are the only ones that are counted."""
    wait_for("an empty queue", lambda: queue_length(service) == 0, 20)
    before = tokens(service)
    answer = service.client().chat.completions.create(**QUESTION, max_tokens=50)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 50
    assert tokens(service) == before + 50
    assert queue_length(service) == 0


def test_streams_whose_clients_leave_end_at_once(endless: Service) -> None:
    streams = [endless.client().chat.completions.create(**QUESTION, n=2, stream=True) for _ in range(3)]
    for stream in streams:
        for _ in range(3):
            next(iter(stream))
    assert queue_length(endless) == 6
    before = tokens(endless), cancelled(endless)
    for stream in streams:
        stream.close()
    assert_nothing_is_generated(endless)
    assert cancelled(endless) == before[1] + 6
    assert before[0] < tokens(endless) < CONTEXT


def test_an_answer_that_nobody_waits_for_ends_at_once(endless: Service) -> None:
    before = cancelled(endless)
    connection = HTTPConnection(endless.api.url.removeprefix("http://"))
    headers = {"content-type": "application/json"}
    connection.request("POST", "/v1/chat/completions", json.dumps({**QUESTION, "n": 8}), headers)
    wait_for("all eight answers", lambda: queue_length(endless) == 8, 60)
    connection.close()
    assert_nothing_is_generated(endless)
    assert cancelled(endless) == before + 8
