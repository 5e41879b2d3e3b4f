"""What the vLLM engine has of its own: equal answers, requests that are given up, and its ends."""

from __future__ import annotations

import re

import httpx
import openai
import psutil
import pytest

from tests.integration.server.conftest import Service
from tests.integration.server.test_worker_protocol import stream
from tests.support.serving import read_termination, serve_job
from tests.support.waiting import wait_for

pytestmark = pytest.mark.vllm
QUESTION = {"model": "yuan2", "messages": [{"role": "user", "content": "Who are you?"}], "temperature": 0}
PROMPTS = ("Who are you?<sep>", "你是谁？<sep>", "a", "1 + 1 = 2, 2 + 2 = 4, " * 20)


def counted(service: Service, name: str) -> float:
    found = re.search(
        rf"^{re.escape(name)}\S* (\S+)$", httpx.get(service.worker.url + "/metrics").text, re.MULTILINE
    )
    return float(found[1]) if found else 0.0


def queue_length(service: Service) -> int:
    return int(httpx.post(service.worker.url + "/worker_get_status").json()["queue_length"])


def test_both_engines_answer_alike_token_for_token(vllm_service: Service) -> None:
    """Greedily and in fp32, with penalties too: ids, texts and log-probabilities."""
    job = serve_job(vllm_service.model, vllm_service.controller.url, served_name="other")
    builtin = vllm_service.stack.worker(job).ready()
    for number, prompt in enumerate(PROMPTS):
        penalties = {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2}
        asked = {"prompt": prompt, "max_new_tokens": 24, "logprobs": 3, **(penalties if number % 2 else {})}
        theirs = stream(vllm_service, **asked)[-1]
        ours = stream(vllm_service, url=builtin.url, model="other", **asked)[-1]
        assert theirs["text"] == ours["text"]
        assert theirs["usage"] == ours["usage"]
        assert theirs["logprobs"]["tokens"] == ours["logprobs"]["tokens"]
        assert theirs["logprobs"]["token_logprobs"] == pytest.approx(
            ours["logprobs"]["token_logprobs"], abs=1e-4
        )
        for left, right in zip(
            theirs["logprobs"]["top_logprobs"], ours["logprobs"]["top_logprobs"], strict=True
        ):
            assert left == pytest.approx(right, abs=1e-4)
    assert builtin.terminate() == 0


def test_a_seed_repeats_an_answer_and_another_one_does_not(vllm_service: Service) -> None:
    def ask(seed: int) -> str:
        return stream(vllm_service, temperature=1.5, top_p=0.99, top_k=300, seed=seed)[-1]["text"]

    assert ask(-5) == ask(-5) != ask(2**70)


def test_streams_whose_clients_leave_are_aborted_in_vllm(vllm_service: Service) -> None:
    streams = [vllm_service.client().chat.completions.create(**QUESTION, stream=True) for _ in range(4)]
    for answers in streams:
        for _ in range(3):
            next(iter(answers))
    assert queue_length(vllm_service) == 4
    before = counted(vllm_service, 'yuan2_worker_requests_total{outcome="cancelled"}')
    for answers in streams:
        answers.close()
    wait_for("an empty queue", lambda: queue_length(vllm_service) == 0, 30)
    assert counted(vllm_service, 'yuan2_worker_requests_total{outcome="cancelled"}') == before + 4
    wait_for("vLLM without requests", lambda: counted(vllm_service, "vllm:num_requests_running") == 0, 30)


def test_more_requests_than_the_limit_are_429(vllm_service: Service) -> None:
    client = vllm_service.client()
    streams = [client.chat.completions.create(**QUESTION, stream=True) for _ in range(8)]
    for answers in streams:
        next(iter(answers))
    with pytest.raises(openai.RateLimitError):
        client.chat.completions.create(**QUESTION, max_tokens=1)
    for answers in streams:
        answers.close()


def test_a_worker_that_is_asked_to_leave_finishes_its_answers(vllm_service: Service) -> None:
    """It does not come back, so another one is started for it; that one hears SIGTERM while it loads, too."""
    loading = vllm_service.stack.worker(vllm_service.job).ready("/healthz")
    assert httpx.get(loading.url + "/readyz").status_code == 503
    assert loading.terminate(60) == 0


def test_an_engine_core_that_dies_fails_liveness_with_the_reason(vllm_service: Service) -> None:
    """The last test: nobody answers after it."""
    worker = vllm_service.worker
    [core] = [
        child
        for child in psutil.Process(worker.process.pid).children()
        if "resource_tracker" not in " ".join(child.cmdline())
    ]
    core.kill()
    wait_for("a liveness that fails", lambda: httpx.get(worker.url + "/healthz").status_code == 503, 30)
    assert "engine core has died" in httpx.get(worker.url + "/healthz").text
    assert httpx.post(worker.url + "/worker_get_status").json()["model_names"] == []
    assert worker.terminate(60) == 1
    left = read_termination(vllm_service.stack, worker)
    assert left["reason"] == "EngineFailed"
    assert "engine core has died" in left["message"]
