"""What the vLLM engine has of its own: equal answers, requests that are given up, and its ends."""

from __future__ import annotations

import re
from pathlib import Path

import httpx
import openai
import psutil
import pytest

from tests.integration.server.conftest import Service
from tests.integration.server.test_worker_protocol import stream
from tests.support.serving import EAGER_VLLM, Program, Stack, read_termination, serve_job
from tests.support.waiting import wait_for
from tests.vllm.reference import adapter

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


def assert_alike(service: Service, vllm: str, builtin: str, model: str = "yuan2") -> None:
    """Greedily and in fp32, with penalties too: texts, tokens and log-probabilities."""
    for number, prompt in enumerate(PROMPTS):
        penalties = {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2}
        asked = {"prompt": prompt, "max_new_tokens": 24, "logprobs": 3, **(penalties if number % 2 else {})}
        theirs = stream(service, url=vllm, model=model, **asked)[-1]
        ours = stream(service, url=builtin, **asked)[-1]
        assert (theirs["text"], theirs["usage"]) == (ours["text"], ours["usage"])
        assert theirs["logprobs"]["tokens"] == ours["logprobs"]["tokens"]
        scores = ours["logprobs"]["token_logprobs"]
        assert theirs["logprobs"]["token_logprobs"] == pytest.approx(scores, abs=1e-4)
        for left, right in zip(
            theirs["logprobs"]["top_logprobs"], ours["logprobs"]["top_logprobs"], strict=True
        ):
            assert left == pytest.approx(right, abs=1e-4)


def test_both_engines_answer_alike_token_for_token(vllm_service: Service, stack: Stack) -> None:
    job = serve_job(vllm_service.model, "http://127.0.0.1:9")
    builtin = stack.worker(job)
    wait_for("a model", lambda: post_status(builtin) or builtin.probe("/nothing"), 120)
    assert_alike(vllm_service, vllm_service.worker.url, builtin.url)


def post_status(worker: Program) -> list[str]:
    """The models that a worker has, which no controller needs to know."""
    try:
        found: list[str] = httpx.post(worker.url + "/worker_get_status").json()["model_names"]
    except httpx.TransportError:
        return []
    return found


def test_a_worker_with_adapters_answers_as_merged_and_finishes_when_it_is_asked_to_leave(
    vllm_service: Service, stack: Stack, tmp_path: Path
) -> None:
    """One adapter belongs to the model, another one has a name of its own."""
    paths = [str(tmp_path / name) for name in ("own", "terse")]
    for seed, path in enumerate(paths):
        adapter(path, str(vllm_service.model), rank=4, seed=seed)
    controller = stack.controller()
    vllm = EAGER_VLLM.model_copy(update={"adapters": {"terse": paths[1]}})
    job = serve_job(vllm_service.model, controller.url, vllm=vllm)
    job = job.model_copy(update={"adapter_path": paths[0]})
    worker, api = stack.worker(job), stack.api(job)
    bare = serve_job(vllm_service.model, "http://127.0.0.1:9")
    builtins = [stack.worker(bare.model_copy(update={"adapter_path": path})) for path in paths]
    controller.ready("/test_connection")
    for builtin in builtins:
        wait_for("a model", lambda builtin=builtin: post_status(builtin) or builtin.probe("/nothing"), 120)
    assert post_status(worker.ready()) == ["yuan2", "terse"]
    assert_alike(vllm_service, worker.url, builtins[0].url)
    assert_alike(vllm_service, worker.url, builtins[1].url, model="terse")
    urls = (vllm_service.worker.url, *(builtin.url for builtin in builtins))
    assert len({stream(vllm_service, url=url, max_new_tokens=24)[-1]["text"] for url in urls}) == 3

    client = vllm_service.client(api.ready())
    assert {card.id for card in client.models.list()} == {"yuan2", "terse"}
    answers = iter(client.chat.completions.create(**QUESTION, stream=True, max_tokens=300))
    next(chunk for chunk in answers if chunk.choices[0].delta.content)
    worker.process.terminate()
    assert [chunk.choices[0].finish_reason for chunk in answers][-1] == "length"
    assert worker.process.wait(60) == 0


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


def test_a_worker_that_is_asked_to_leave_while_vllm_loads_ends(vllm_service: Service, stack: Stack) -> None:
    loading = stack.worker(vllm_service.job)
    wait_for("processes of vLLM", lambda: loading.probe("/healthz") and cores(loading), 120)
    assert httpx.get(loading.url + "/readyz").status_code == 503
    started = psutil.Process(loading.process.pid).children(recursive=True)
    assert loading.terminate(60) == 0
    assert not psutil.wait_procs(started, timeout=30)[1]


def cores(worker: Program) -> list[psutil.Process]:
    """vLLM's engine core, the child of a worker beside Python's own."""
    children = psutil.Process(worker.process.pid).children()
    return [child for child in children if "resource_tracker" not in " ".join(child.cmdline())]


def test_an_engine_core_that_dies_fails_liveness_with_the_reason(vllm_service: Service) -> None:
    """The last test: nobody answers after it."""
    worker = vllm_service.worker
    [core] = cores(worker)
    core.kill()
    wait_for("a liveness that fails", lambda: httpx.get(worker.url + "/healthz").status_code == 503, 30)
    assert "engine core has died" in httpx.get(worker.url + "/healthz").text
    assert httpx.post(worker.url + "/worker_get_status").json()["model_names"] == []
    assert worker.terminate(60) == 1
    left = read_termination(vllm_service.stack, worker)
    assert left["reason"] == "EngineFailed"
    assert "engine core has died" in left["message"]
