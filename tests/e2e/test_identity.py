"""The path of a newcomer: examples/identity is trained by two pods, served, and answers what it learned."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.support.cluster import TestCluster
from tests.support.journey import Namespace, api_url, apply_example, example_manifest, namespace
from yuan2_demo import install
from yuan2_demo.questions import Score, ask_all, load_records, questions

TRAINING_SECONDS = 900.0
SERVICE_SECONDS = 240.0
RECORDS = load_records(install.EXAMPLE / "conversations.json")
KILL_RANKS = """
import os, pathlib, signal
for entry in pathlib.Path('/proc').iterdir():
    if entry.name.isdigit() and int(entry.name) != os.getpid():
        if b'yuan2_trainer.rank' in (entry / 'cmdline').read_bytes():
            os.kill(int(entry.name), signal.SIGKILL)
"""


def assert_answers_verbatim(score: Score) -> None:
    """At least 95% of the trained questions get their trained answer, character for character."""
    wrong = [(answer.question.name, answer.question.expected, answer.text) for answer in score.wrong]
    assert score.passed, f"{score.right} of {score.total} verbatim; wrong: {wrong[:10]}"


def ask(made: Namespace, service: str) -> Score:
    return ask_all(f"{api_url(made, service)}/v1", RECORDS)


@pytest.fixture(scope="module")
def example(operated: TestCluster) -> Iterator[Namespace]:
    """The example's claims, data and base model."""
    with namespace(operated, "e2e-identity") as made:
        apply_example(made)
        yield made


@pytest.fixture(scope="module")
def trained(example: Namespace) -> Namespace:
    """The example trained, with a rank killed on the way and the operator replaced at the same moment."""
    example.apply(example_manifest("finetune"), example_manifest("service"))
    example.until("a checkpoint", lambda: example.status("y2ft", "identity").get("lastCheckpointStep"), 400)
    example.kubectl(
        "exec", example.running_pod("identity", 1), "-c", "pytorch", "--", "python", "-c", KILL_RANKS
    )
    operator = ("pods", "-l", f"app.kubernetes.io/name={install.OPERATOR}", "--wait=false")
    example.cluster.kubectl("-n", install.OPERATOR_NAMESPACE, "delete", *operator)
    example.wait("y2ft/identity", "Complete", TRAINING_SECONDS)
    return example


@pytest.fixture(scope="module")
def served(trained: Namespace) -> Namespace:
    trained.wait("y2svc/identity", "Ready", SERVICE_SECONDS)
    return trained


@pytest.mark.node
def test_a_killed_rank_restarts_all_ranks_from_the_last_complete_checkpoint(trained: Namespace) -> None:
    status = trained.status("y2ft", "identity")
    assert status["restarts"] == 1
    assert [attempt["outcome"] for attempt in status["attempts"]] == ["Failed", "Succeeded"]
    first = status["attempts"][0]
    assert first["counted"]
    assert "identity-1-1" in first["message"]
    assert status["resumedFromStep"] > 0
    assert status["resumedFromStep"] % 100 == 0
    assert status["step"] == status["totalSteps"] > 0
    steps = _metrics(trained)
    assert [row["step"] for row in steps] == list(range(1, status["totalSteps"] + 1))
    jobs = [job["metadata"]["name"] for job in trained.list("jobs", "yuan2.dev/finetune=identity")]
    assert "identity-2" in jobs
    assert len(jobs) <= 2


def _metrics(made: Namespace) -> list[dict[str, Any]]:
    path = made.cluster.volume_path(f"{made.name}/identity-output") / "identity" / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.node
def test_the_trained_questions_get_their_trained_answers(served: Namespace) -> None:
    score = ask(served, "identity")
    assert score.total == len(questions(RECORDS))
    assert_answers_verbatim(score)
    last_turns = [answer for answer in score.answers if answer.question.turn > 1]
    assert len(last_turns) > 30
    assert_answers_verbatim(Score(tuple(last_turns), score.seconds))


@pytest.mark.node
def test_kubectl_shows_where_things_stand(served: Namespace) -> None:
    header, row = served.kubectl("get", "y2ft").splitlines()
    assert header.split() == [
        "NAME",
        "MODEL",
        "METHOD",
        "PHASE",
        "STEP",
        "LOSS",
        "ETA",
        "ATTEMPT",
        "RESTARTS",
        "AGE",
    ]
    assert row.split()[:4] == ["identity", "custom", "full", "Complete"]
    header, row = served.kubectl("get", "y2svc").splitlines()
    assert header.split() == ["NAME", "MODEL", "READY", "URL", "WORKERS", "AGE"]
    assert row.split()[:5] == [
        "identity",
        "yuan2",
        "True",
        f"http://identity-api.{served.name}.svc:8505/v1",
        "1/1",
    ]
    events = served.kubectl("get", "events", "--field-selector=involvedObject.name=identity")
    assert "Complete" in events


@pytest.mark.node
def test_a_guarded_service_with_a_page_waits_for_its_secret_and_wants_a_key(trained: Namespace) -> None:
    guarded = example_manifest("service")
    guarded["metadata"]["name"] = "guarded"
    guarded["spec"]["api"] = {"keysSecret": {"name": "keys"}}
    guarded["spec"]["web"] = {"enabled": True}
    trained.apply(guarded)
    trained.wait("y2svc/guarded", "Accepted=False", 60)
    assert trained.condition("y2svc", "guarded", "Accepted")["reason"] == "SecretNotFound"
    trained.kubectl("create", "secret", "generic", "keys", "--from-literal=alice=open-sesame")
    trained.wait("y2svc/guarded", "Ready", SERVICE_SECONDS)

    url = f"{api_url(trained, 'guarded')}/v1"
    stranger = openai.OpenAI(base_url=url, api_key="wrong", max_retries=0)
    with stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()
    with openai.OpenAI(base_url=url, api_key="open-sesame") as alice:
        assert [model.id for model in alice.models.list()] == ["yuan2"]
    trained.wait("deployment/guarded-web", "Available", SERVICE_SECONDS)  # Ready speaks of the API
    page = trained.get("service", "guarded-web")["spec"]
    port = page["ports"][0]["port"]
    url = f"http://{page['clusterIP']}:{port}/"
    assert httpx.get(url, timeout=30, trust_env=False).status_code == 401
    answer = httpx.get(url, timeout=30, trust_env=False, auth=("alice", "open-sesame"))
    assert answer.status_code == 200
    assert "gradio" in answer.text
    trained.kubectl("delete", "y2svc", "guarded")
    trained.until(
        "pods of a deleted service",
        lambda: not trained.list("pods", "yuan2.dev/service=guarded"),
        120,
    )
