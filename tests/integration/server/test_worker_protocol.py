"""What FastChat's programs see of our worker: its protocol over HTTP, and FastChat's own API server."""

from __future__ import annotations

import base64
import json
import struct
from itertools import pairwise

import httpx
import openai
import pytest

from tests.integration.server.conftest import VLLM_CONTEXT, Service
from yuan2_core.conversation import render_prompt

QUESTION = "Who are you?"


@pytest.fixture(scope="module", params=["builtin", pytest.param("vllm", marks=pytest.mark.vllm)])
def service(request: pytest.FixtureRequest) -> Service:
    """The service with each of the engines."""
    found: Service = request.getfixturevalue(f"{request.param}_service")
    return found


def post(service: Service, path: str, **body) -> dict:
    return httpx.post(service.worker.url + path, json=body, timeout=60).json()


def stream(service: Service, url: str = "", **body) -> list[dict]:
    arguments = {
        "model": "yuan2",
        "prompt": f"{QUESTION}<sep>",
        "temperature": 0,
        "max_new_tokens": 16,
        **body,
    }
    url = f"{url or service.worker.url}/worker_generate_stream"
    data = httpx.post(url, json=arguments, timeout=60).content
    assert data.endswith(b"\0")
    return [json.loads(document) for document in data[:-1].split(b"\0")]


def test_the_stream_is_cumulative_and_repeats_its_last_text_with_the_reason(service: Service):
    documents = stream(service)
    texts = [document["text"] for document in documents]
    assert all(later.startswith(earlier) for earlier, later in pairwise(texts))
    assert texts[-1] == texts[-2]
    assert [document["finish_reason"] for document in documents[:-1]] == [None] * (len(documents) - 1)
    assert documents[-1]["finish_reason"] == "length"
    assert {document["error_code"] for document in documents} == {0}
    prompt = len(service.tokenizer.encode(f"{QUESTION}<sep>"))
    assert documents[-1]["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": 16,
        "total_tokens": prompt + 16,
    }


def test_fastchats_controller_passes_the_stream_on(service: Service):
    assert stream(service, url=service.controller.url)[-1] == stream(service)[-1]


def test_generate_answers_with_the_final_document(service: Service):
    body = {"model": "yuan2", "prompt": f"{QUESTION}<sep>", "temperature": 0, "max_new_tokens": 16}
    assert post(service, "/worker_generate", **body) == stream(service)[-1]


def test_echo_starts_the_text_with_the_prompt(service: Service):
    plain, echoed = stream(service)[-1]["text"], stream(service, echo=True)
    assert echoed[-1]["text"] == f"{QUESTION}<sep>{plain}"
    assert echoed[0]["text"].startswith(QUESTION)


def test_logprobs_have_fastchats_shape(service: Service):
    logprobs = stream(service, logprobs=3, max_new_tokens=5)[-1]["logprobs"]
    assert set(logprobs) == {"text_offset", "tokens", "token_logprobs", "top_logprobs"}
    assert [len(values) for values in logprobs.values()] == [5, 5, 5, 5]
    for token, value, top in zip(
        logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
    ):
        assert len(top) == 3
        assert top[token] == value == max(top.values())


def test_a_repetition_penalty_changes_the_answer(service: Service):
    assert stream(service, repetition_penalty=5.0)[-1]["text"] != stream(service)[-1]["text"]


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"model": "vicuna"}, 40301, "vicuna"),
        ({"temperature": -1}, 40302, "temperature"),
        ({"top_p": 2}, 40302, "top_p"),
        ({"use_beam_search": True}, 40302, "use_beam_search"),
        ({"best_of": 4}, 40302, "best_of"),
        ({"n": 2}, 40302, "n: 2"),
        ({"max_new_tokens": 0}, 40302, "max_new_tokens"),
        ({"stop": [""]}, 40302, "stop"),
        ({"temperature": "hot"}, 40001, "temperature"),
        ({"images": ["a.png"]}, 40001, "images"),
        ({"prompt": None}, 40001, "prompt"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, 40001, "user's"),
        ({"prompt": "你" * VLLM_CONTEXT}, 40303, "maximum context length is"),
    ],
)
def test_what_cannot_be_honoured_is_refused_with_fastchats_code(service: Service, change, code, words):
    [document] = stream(service, **change)
    assert document["error_code"] == code
    assert words in document["text"]
    assert "\n" not in document["text"]
    body = {"model": "yuan2", "prompt": "x", **change}
    assert post(service, "/worker_generate", **body)["error_code"] == code


def test_parameters_as_fastchats_programs_send_them_are_accepted(service: Service):
    api_server = {
        "top_k": -1,
        "logprobs": None,
        "presence_penalty": 0.0,
        "stop_token_ids": [77185],
        "stop": ["<eod>"],
    }
    web_page = {
        "stop": "<eod>",
        "stop_token_ids": [77185],
        "echo": False,
        "repetition_penalty": 1.0,
        "top_p": 1.0,
    }
    assert stream(service, **api_server)[-1] == stream(service, **web_page)[-1] == stream(service)[-1]


def test_a_limit_beyond_the_context_is_cut_for_fastchats_programs_and_refused_for_ours(service: Service):
    assert stream(service, max_new_tokens=10**6)[-1]["finish_reason"] in ("length", "stop")
    [refused] = stream(service, max_new_tokens=10**6, clamp=False)
    assert (refused["error_code"], refused["param"]) == (40303, "max_new_tokens")


def test_deltas_add_up_to_the_cumulative_text(service: Service):
    documents = stream(service, deltas=True, logprobs=2)
    whole = stream(service, logprobs=2)[-1]
    assert all(document["delta"] for document in documents)
    assert "".join(document["text"] for document in documents) == whole["text"]
    tokens = [token for document in documents for token in document.get("logprobs", {}).get("tokens", [])]
    assert tokens == whole["logprobs"]["tokens"]


def test_tokens_of_a_text_and_of_messages(service: Service):
    messages = [{"role": "user", "content": "one<sep>two"}]
    answer = post(service, "/tokenize", model="yuan2", messages=messages)
    assert answer["tokens"] == render_prompt(messages, service.tokenizer)
    assert answer["context_length"] == service.context
    text = post(service, "/tokenize", model="yuan2", prompt="a<n>b<sep>")
    assert text["tokens"] == service.tokenizer.encode("a<n>b<sep>")


def test_messages_are_rendered_by_the_worker(service: Service):
    messages = [{"role": "user", "content": "one<sep>two"}]
    final = stream(service, prompt="something else", messages=messages)[-1]
    assert final["usage"]["prompt_tokens"] == len(render_prompt(messages, service.tokenizer))


def test_status_details_and_counts(service: Service):
    assert post(service, "/worker_get_status") == {"model_names": ["yuan2"], "speed": 1, "queue_length": 0}
    assert post(service, "/model_details", model="yuan2")["context_length"] == service.context
    counted = post(service, "/count_token", model="yuan2", prompt="a<n>b<sep>")
    assert counted == {"count": len(service.tokenizer.encode("a<n>b<sep>")), "error_code": 0}


def test_the_conversation_template_is_fastchats_with_our_stop_token(service: Service):
    from fastchat.conversation import get_conv_template

    template = post(service, "/worker_get_conv_template", model="yuan2")["conv"]
    own = get_conv_template("yuan2")
    for name in ("name", "system_template", "system_message", "offset", "sep", "sep2", "stop_str"):
        assert template[name] == getattr(own, name)
    assert template["roles"] == list(own.roles)
    assert template["messages"] == list(own.messages)
    assert template["sep_style"] == int(own.sep_style)
    assert template["stop_token_ids"] == [service.tokenizer.eod_id]


def test_vllm_only_generates_and_says_so(service: Service):
    if service.job.worker.vllm is None:
        assert "embedding" in post(service, "/worker_get_embeddings", model="yuan2", input=["x"])
        return
    refused = post(service, "/worker_get_embeddings", model="yuan2", input=["x"])
    assert refused["error_code"] == 40302
    assert "only generates text" in refused["text"]
    [refused] = stream(service, temperature=0.001)
    assert (refused["error_code"], refused["param"]) == (40302, "temperature")


def test_embeddings_are_those_of_the_tokens(builtin_service: Service):
    ids = builtin_service.tokenizer.encode("a<n>b<sep>")
    by_ids = post(builtin_service, "/worker_get_embeddings", model="yuan2", input=[ids])
    assert by_ids == post(builtin_service, "/worker_get_embeddings", model="yuan2", input=["a<n>b<sep>"])
    refused = post(builtin_service, "/worker_get_embeddings", model="yuan2", input=[[10**6]])
    assert refused["error_code"] == 40302


def test_embeddings_are_unit_vectors_of_the_text(builtin_service: Service):
    service, texts = builtin_service, ["Who are you?", "你是谁？", "Who are you?"]
    answer = post(service, "/worker_get_embeddings", model="yuan2", input=texts)
    first, second, again = answer["embedding"]
    assert sum(x * x for x in first) == pytest.approx(1)
    assert first == again != second
    assert answer["token_num"] == sum(len(service.tokenizer.encode(text)) for text in texts)
    packed = post(service, "/worker_get_embeddings", model="yuan2", input=texts[:1], encoding_format="base64")
    [data] = packed["embedding"]
    assert struct.unpack(f"<{len(first)}f", base64.b64decode(data)) == pytest.approx(first)
    assert post(service, "/worker_get_embeddings", model="yuan2", input=[])["error_code"] == 40001


def test_probes_and_metrics(service: Service):
    for path in ("/healthz", "/readyz"):
        assert httpx.get(service.worker.url + path).text == "ok"
        assert httpx.get(service.api.url + path).text == "ok"
    worker, api = (httpx.get(program.url + "/metrics").text for program in (service.worker, service.api))
    assert "yuan2_worker_queue_length 0.0" in worker
    assert "yuan2_worker_completion_tokens_total" in worker
    assert "yuan2_api_requests_in_flight" in api


@pytest.fixture(scope="module")
def fastchat(service: Service) -> openai.OpenAI:
    """A client of FastChat's own, unmodified API server. Its streams do not work: they need pydantic 1, and
    gradio, FastAPI and we need 2 (FastChat issue 3140)."""
    program = service.stack.fastchat_api(service.controller).ready("/v1/models")
    return service.client(program)


def chat(client: openai.OpenAI, question: str, **options):
    messages = [{"role": "user", "content": question}]
    return client.chat.completions.create(
        model="yuan2", messages=messages, temperature=0, max_tokens=16, **options
    )


@pytest.mark.parametrize("question", [QUESTION, "你是谁？"])
def test_fastchats_api_server_gives_the_same_answer(service: Service, fastchat: openai.OpenAI, question: str):
    ours, theirs = chat(service.client(), question), chat(fastchat, question)
    assert theirs.choices[0].message.content == ours.choices[0].message.content
    assert theirs.choices[0].finish_reason == ours.choices[0].finish_reason
    assert theirs.usage.total_tokens == ours.usage.total_tokens


def test_fastchats_api_server_loses_a_trailing_n(service: Service, fastchat: openai.OpenAI):
    """FastChat ends its prompt with `rstrip("<n>")`, which takes a trailing n, < or > of the question too."""
    theirs = chat(fastchat, "Who is the man").choices[0].message.content
    assert theirs == chat(service.client(), "Who is the ma").choices[0].message.content
    assert theirs != chat(service.client(), "Who is the man").choices[0].message.content


def test_fastchats_api_server_counts_and_completes(service: Service, fastchat: openai.OpenAI):
    completion = fastchat.completions.create(
        model="yuan2", prompt=f"{QUESTION}<sep>", temperature=0, max_tokens=16
    )
    assert completion.choices[0].text == stream(service)[-1]["text"]
    body = {"prompts": [{"model": "yuan2", "prompt": QUESTION, "max_tokens": 8}]}
    url = str(fastchat.base_url).removesuffix("/v1/")
    [checked] = httpx.post(f"{url}/api/v1/token_check", json=body).json()["prompts"]
    assert checked == {
        "fits": True,
        "tokenCount": len(service.tokenizer.encode(QUESTION)),
        "contextLength": service.context,
    }


def test_fastchats_api_server_embeds(service: Service, fastchat: openai.OpenAI):
    if service.job.worker.vllm is not None:
        with pytest.raises(openai.APIStatusError):
            fastchat.embeddings.create(model="yuan2", input=[QUESTION], encoding_format="float")
        return
    answer = fastchat.embeddings.create(model="yuan2", input=[QUESTION], encoding_format="float")
    [direct] = post(service, "/worker_get_embeddings", model="yuan2", input=[QUESTION])["embedding"]
    assert answer.data[0].embedding == pytest.approx(direct)
