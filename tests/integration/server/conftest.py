"""One running service for all tests of this folder: FastChat's controller, our worker, our API server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.support.serving import CONTEXT, EAGER_VLLM, Program, Stack, serve_job, tiny_model
from yuan2_core.contract import ServeJob
from yuan2_core.tokenizer import Yuan2Tokenizer

VLLM_CONTEXT = 2048


@dataclass
class Service:
    """A service that answers, and what it was made from."""

    stack: Stack
    model: Path
    tokenizer: Yuan2Tokenizer
    job: ServeJob
    controller: Program
    worker: Program
    api: Program
    context: int = CONTEXT
    """Tokens of prompt and answer together."""
    clients: dict[str, openai.OpenAI] = field(default_factory=dict)

    def client(self, api: Program | None = None, **options: Any) -> openai.OpenAI:
        """The `openai` client on one of the API servers, without retries."""
        url = f"{(api or self.api).url}/v1"
        if url not in self.clients:
            self.clients[url] = openai.OpenAI(base_url=url, api_key="EMPTY", max_retries=0, timeout=60)
        return self.clients[url].with_options(**options) if options else self.clients[url]

    def close(self) -> None:
        """Close all clients."""
        for client in self.clients.values():
            client.close()


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model directory."""
    directory = tmp_path_factory.mktemp("model")
    tiny_model(directory)
    return directory


@contextmanager
def running_service(
    model: Path, directory: Path, *, context: int = CONTEXT, **changes: Any
) -> Iterator[Service]:
    """A service of a model for the length of the block; its files are in `directory`, and `changes` replace
    fields of its job."""
    stack = Stack(directory)
    try:
        controller = stack.controller()
        job = serve_job(model, controller.url, **{"max_concurrent_requests": 8, **changes})
        worker, api = stack.worker(job), stack.api(job)
        controller.ready("/test_connection")
        worker.ready()
        api.ready()
        tokenizer = Yuan2Tokenizer.from_pretrained(model)
        made = Service(stack, model, tokenizer, job, controller, worker, api, context)
        yield made
        made.close()
    finally:
        stack.close()


@pytest.fixture(scope="session")
def builtin_service(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The running service, with the built-in engine."""
    with running_service(model, tmp_path_factory.mktemp("service")) as made:
        yield made


@pytest.fixture(scope="session")
def service(builtin_service: Service) -> Service:
    """The one that most tests mean."""
    return builtin_service


@pytest.fixture(scope="session")
def vllm_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The same with vLLM, of a model whose answers only end at their limit: none ends before it is given
    up."""
    model = tmp_path_factory.mktemp("vllm-model")
    tiny_model(model, context=VLLM_CONTEXT, endless=True)
    directory = tmp_path_factory.mktemp("vllm-service")
    with running_service(model, directory, context=VLLM_CONTEXT, vllm=EAGER_VLLM) as made:
        yield made


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    """Programs for one test."""
    made = Stack(tmp_path)
    try:
        yield made
    finally:
        made.close()
