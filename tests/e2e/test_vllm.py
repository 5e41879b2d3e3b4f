"""A Yuan2Service whose worker is vLLM, on the node: the `openai` client, whole and streamed.

An image with vLLM would take 6 GB three times over, in builder, registry and node. The packages of its lock
come from .venv-vllm instead, as a volume that the pod's template mounts; what runs is what that image would
run.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.support.cluster import TestCluster
from tests.support.journey import Namespace, api_url, namespace
from tests.support.serving import EAGER, VLLM_PYTHON, tiny_model

pytestmark = pytest.mark.node
PACKAGES = "/opt/vllm"
PATHS = f"/opt/yuan2/core:/opt/yuan2/server_image:{PACKAGES}"
SECONDS = 600.0
QUESTION: dict[str, Any] = {
    "model": "yuan2",
    "messages": [{"role": "user", "content": "你是谁？"}],
    "temperature": 0,
    "max_tokens": 24,
}


def link_packages(directory: Path) -> None:
    """The packages of .venv-vllm as links to the same files; removing the links leaves those alone."""
    [installed] = VLLM_PYTHON.parents[1].glob("lib/python3.*/site-packages")
    shutil.copytree(installed, directory, copy_function=os.link, dirs_exist_ok=True, symlinks=True)


def service(engine: str) -> dict[str, Any]:
    """A service of the tiny model, with the engine's packages where it is vLLM."""
    place = {"persistentVolumeClaim": {"claimName": "models", "path": "tiny"}}
    worker: dict[str, Any] = {"engine": engine, "precision": "fp32", "maxConcurrentRequests": 8}
    if engine == "vllm":
        mount = {"name": "vllm", "mountPath": PACKAGES, "readOnly": True}
        variables = {"PYTHONPATH": PATHS, **EAGER}
        container = {
            "name": "yuan2-worker",
            "env": [{"name": name, "value": value} for name, value in variables.items()],
            "volumeMounts": [mount],
        }
        volume = {"name": "vllm", "persistentVolumeClaim": {"claimName": "vllm", "readOnly": True}}
        worker |= {
            "engineArgs": {"enforce-eager": "true", "block-size": "32"},
            "podTemplate": {"spec": {"volumes": [volume], "containers": [container]}},
        }
    return {
        "apiVersion": "yuan2.dev/v1alpha1",
        "kind": "Yuan2Service",
        "metadata": {"name": engine},
        "spec": {"model": {"name": "yuan2", "source": place}, "worker": worker},
    }


@pytest.fixture(scope="module")
def served(operated: TestCluster) -> Iterator[Namespace]:
    """Two services of one model, one with each engine."""
    with namespace(operated, "e2e-vllm") as made:
        tiny_model(made.claim("models") / "tiny")
        link_packages(made.claim("vllm"))
        image = {"image": operated.images["serve"]}
        for engine in ("builtin", "vllm"):
            document = service(engine)
            made.apply(document | {"spec": document["spec"] | image})
        for engine in ("builtin", "vllm"):
            made.wait(f"y2svc/{engine}", "Ready", SECONDS)
        yield made


def client(made: Namespace, engine: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{api_url(made, engine)}/v1", api_key="EMPTY", max_retries=0, timeout=120)


def test_both_engines_answer_alike_whole_and_streamed(served: Namespace) -> None:
    texts = set()
    for engine in ("builtin", "vllm"):
        with client(served, engine) as asked:
            assert [card.id for card in asked.models.list()] == ["yuan2"]
            whole = asked.chat.completions.create(**QUESTION)
            pieces = asked.chat.completions.create(
                **QUESTION, stream=True, stream_options={"include_usage": True}
            )
            chunks = list(pieces)
        streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert streamed == whole.choices[0].message.content
        assert chunks[-1].usage == whole.usage
        texts.add(streamed)
    assert len(texts) == 1


def test_vllms_metrics_are_those_of_the_worker(served: Namespace) -> None:
    [pod] = served.list("pods", "yuan2.dev/service=vllm,yuan2.dev/component=worker")
    found = served.kubectl(
        "get", "--raw", f"/api/v1/namespaces/{served.name}/pods/{pod['metadata']['name']}:8504/proxy/metrics"
    )
    assert "vllm:generation_tokens_total" in found


def test_a_wrong_argument_of_the_engine_is_told_in_the_status(served: Namespace) -> None:
    document = service("vllm")
    document["metadata"] = {"name": "wrong"}
    document["spec"]["image"] = served.cluster.images["serve"]
    document["spec"]["worker"]["engineArgs"] = {"no-such-option": "1"}
    served.apply(document)
    told = served.until(
        "the reason",
        lambda: (
            "no-such-option" in served.condition("y2svc", "wrong", "Degraded").get("message", "")
            and served.condition("y2svc", "wrong", "Degraded")
        ),
        SECONDS,
    )
    assert "engineArgs: vLLM has no option no-such-option" in told["message"]
    served.kubectl("delete", "y2svc", "wrong")
