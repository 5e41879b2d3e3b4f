"""Starting, ending, failing and coming back: what a cluster does to the programs of a service."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import openai
import pytest

from tests.integration.server.conftest import Service
from tests.support.serving import Program, Stack, read_termination, serve_job, tiny_model
from tests.support.waiting import wait_for

MESSAGES = [{"role": "user", "content": "Who are you?"}]


def ask(client: openai.OpenAI, **options):
    return client.chat.completions.create(
        model="yuan2", messages=MESSAGES, temperature=0, **{"max_tokens": 4, **options}
    )


def keys_directory(directory: Path, *keys: str) -> Path:
    """A Secret as the kubelet mounts it: hidden directories, and links into the current one."""
    data = directory / f"..{len(list(directory.parent.iterdir()))}-{len(keys)}"
    data.mkdir(parents=True)
    for link in directory.glob("key*"):
        link.unlink()
    for number, key in enumerate(keys):
        (data / f"key{number}").write_text(f"{key}\n")
        (directory / f"key{number}").symlink_to(data / f"key{number}")
    return directory


def test_every_route_wants_a_key_that_is_in_the_secret_now(service: Service, stack: Stack, tmp_path: Path):
    keys = keys_directory(tmp_path / "keys", "sk-one", "sk-two")
    job = service.job.model_copy(update={"api": service.job.api.model_copy(update={"require_key": True})})
    api = stack.api(job, keys).ready()
    for key, accepted in (("sk-one", True), ("sk-two", True), ("sk-three", False), ("EMPTY", False)):
        client = service.client(api, api_key=key)
        if accepted:
            assert ask(client).choices
            continue
        for call in (client.models.list, lambda client=client: ask(client)):
            with pytest.raises(openai.AuthenticationError) as raised:
                call()
            assert raised.value.code == "invalid_api_key"
    for path in ("/v1/models", "/v1/chat/completions", "/api/v1/chat/completions", "/docs", "/nothing"):
        assert httpx.post(api.url + path, json={}).status_code == 401
    assert httpx.get(api.url + "/metrics").status_code == 200

    keys_directory(keys, "sk-three")
    headers = {"authorization": "Bearer sk-three"}
    wait_for("the new key", lambda: httpx.get(f"{api.url}/v1/models", headers=headers).status_code == 200, 5)
    assert ask(service.client(api, api_key="sk-three")).choices
    with pytest.raises(openai.AuthenticationError):
        ask(service.client(api, api_key="sk-one"))


def test_a_restart_of_the_controller_fails_no_request(service: Service):
    port = int(service.controller.url.rsplit(":", 1)[1])
    assert ask(service.client()).choices
    service.controller.kill()
    assert ask(service.client()).choices
    assert [card.id for card in service.client().models.list()] == ["yuan2"]
    assert service.api.probe("/readyz")

    service.controller = service.stack.controller(port).ready("/test_connection")
    assert ask(service.client()).choices  # the worker has not registered yet
    wait_for("the worker's new registration", lambda: service.worker.probe("/readyz"), 5)
    assert ask(service.client()).choices


def test_without_a_controller_and_without_workers_clients_get_openais_503(service: Service, stack: Stack):
    """The API server is ready all the while: a connection that is refused would say less."""
    api = stack.api(serve_job(service.model, "http://127.0.0.1:9")).ready()
    with pytest.raises(openai.InternalServerError) as raised:
        ask(service.client(api))
    assert (raised.value.status_code, raised.value.code) == (503, "no_controller")
    assert raised.value.response.headers["retry-after"]
    controller = stack.controller().ready("/test_connection")
    api = stack.api(serve_job(service.model, controller.url)).ready()
    with pytest.raises(openai.InternalServerError) as raised:
        ask(service.client(api))
    assert (raised.value.status_code, raised.value.code) == (503, "no_worker")


def test_workers_that_go_leave_clear_ends_and_a_service_that_answers(
    service: Service, stack: Stack, tmp_path: Path
):
    """The worker that is answering is killed: a clear error, and the other one answers from then on.

    That one is asked to leave: it answers to the end. Then nobody is there."""
    tiny_model(tmp_path / "model", context=2048, endless=True)
    controller = stack.controller()
    job = serve_job(tmp_path / "model", controller.url)
    workers, api = [stack.worker(job), stack.worker(job)], stack.api(job)
    for program, path in ((controller, "/test_connection"), *((worker, "/readyz") for worker in workers)):
        program.ready(path)
    client = service.client(api.ready())

    stream = iter(ask(client, stream=True, max_tokens=1900))
    next(chunk for chunk in stream if chunk.choices[0].delta.content)
    [busy] = [worker for worker in workers if load_of(worker)]
    [other] = [worker for worker in workers if worker is not busy]
    busy.kill()
    with pytest.raises(openai.APIError, match="stopped before the answer was complete"):
        list(stream)
    for _ in range(3):
        assert ask(client).usage.completion_tokens == 4

    stream = iter(ask(client, stream=True, max_tokens=300))
    next(chunk for chunk in stream if chunk.choices[0].delta.content)
    other.process.terminate()
    assert [chunk.choices[0].finish_reason for chunk in stream][-1] == "length"
    assert other.process.wait(30) == 0
    with pytest.raises(openai.InternalServerError) as raised:
        ask(client)
    assert (raised.value.status_code, raised.value.code) == (503, "no_worker")
    assert api.probe("/readyz")
    assert api.terminate() == 0


def load_of(worker: Program) -> int:
    return int(httpx.post(worker.url + "/worker_get_status").json()["queue_length"])


def test_a_model_that_cannot_be_served_ends_the_worker_with_its_reason(
    service: Service, stack: Stack, tmp_path: Path
):
    broken = tmp_path / "broken"
    tiny_model(broken)
    (broken / "model.safetensors").unlink()
    nowhere = serve_job(tmp_path / "nowhere", "http://127.0.0.1:9")
    too_long = serve_job(service.model, "http://127.0.0.1:9", max_model_length=100_000)
    cases = {
        "safetensors": (serve_job(broken, "http://127.0.0.1:9"), "InvalidModel"),
        "nowhere": (nowhere, "InvalidModel"),
        "maxModelLength": (too_long, "InvalidJob"),
    }
    programs = {words: stack.worker(job) for words, (job, _) in cases.items()}
    for words, program in programs.items():
        assert program.process.wait(60) == 78, program.log.read_text()
        left = read_termination(stack, program)
        assert left["reason"] == cases[words][1]
        assert words in left["message"]
        assert "\n" not in left["message"]
        assert "Traceback" not in program.log.read_text()


def test_a_worker_that_is_asked_to_leave_while_it_loads_ends_at_once(service: Service, stack: Stack):
    worker = stack.worker(service.job).ready("/healthz")
    assert httpx.get(worker.url + "/readyz").status_code == 503
    assert httpx.post(worker.url + "/worker_get_status").json()["model_names"] == []
    refused = httpx.post(worker.url + "/worker_generate", json={"model": "yuan2", "prompt": "x"}).json()
    assert refused["error_code"] == 42903
    assert worker.terminate(10) == 0


def test_a_job_that_is_not_one_ends_the_program_with_its_reason(stack: Stack, tmp_path: Path):
    job = json.loads(serve_job(tmp_path, "http://127.0.0.1:9").to_json())
    job["worker"]["precision"] = "fp8"
    (tmp_path / "bad.json").write_text(json.dumps(job))
    arguments = ["--job", str(tmp_path / "bad.json"), "--termination-log", stack.termination(1)]
    program = stack.run("api", ["-m", "yuan2_server", "api", *arguments], 1)
    assert program.process.wait(60) == 78
    left = read_termination(stack, program)
    assert left["reason"] == "InvalidJob"
    assert "worker.precision" in left["message"]
