"""Questions and answers with the `openai` client: API server, FastChat's controller, worker, model."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import httpx
import openai
import pytest
import torch

from tests.integration.server.conftest import Service
from tests.support.serving import CONTEXT
from tests.support.waiting import wait_for
from yuan2_core.conversation import render_prompt
from yuan2_core.tokenizer import Yuan2Tokenizer

QUESTIONS = ("Who are you?", "你是谁？", "Who is the man", "a < b >", "say <sep> and <eod>")


def ask(service: Service, text: str, **options):
    messages = options.pop("messages", None) or [{"role": "user", "content": text}]
    options = {"temperature": 0, "max_tokens": 24, **options}
    return service.client().chat.completions.create(model="yuan2", messages=messages, **options)


@lru_cache
def greedy_ids(model: Path, prompt: tuple[int, ...], count: int) -> list[int]:
    """The answer of a plain argmax loop without a cache, `<eod>` left out."""
    from yuan2_model import load_model

    loaded = load_model(model, dtype=torch.float32)
    tokenizer = Yuan2Tokenizer.from_pretrained(model)
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            logits = loaded(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
            ids.append(int(logits[: tokenizer.vocab_size].argmax()))
            if ids[-1] == tokenizer.eod_id:
                return ids[len(prompt) : -1]
    return ids[len(prompt) :]


@pytest.mark.parametrize("question", QUESTIONS)
def test_the_greedy_answer_is_that_of_an_argmax_loop(service: Service, question: str):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": question}]
    answer = ask(service, "", messages=messages)

    prompt = render_prompt(messages, service.tokenizer)
    expected = greedy_ids(service.model, tuple(prompt), 24)
    assert answer.choices[0].message.content == service.tokenizer.decode(expected, skip_special_tokens=True)
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.usage.completion_tokens == len(expected)
    assert answer.usage.total_tokens == len(prompt) + len(expected)
    assert answer.choices[0].finish_reason == ("length" if len(expected) == 24 else "stop")


@pytest.mark.parametrize("question", QUESTIONS)
def test_streamed_chunks_add_up_to_the_whole_answer(service: Service, question: str):
    whole = ask(service, question)
    chunks = list(ask(service, question, stream=True, stream_options={"include_usage": True}))

    assert [chunk.usage is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    assert chunks[-1].usage == whole.usage
    assert chunks[-1].choices == []
    deltas = [chunk.choices[0].delta for chunk in chunks[:-1]]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == whole.choices[0].message.content
    reasons = [chunk.choices[0].finish_reason for chunk in chunks[:-1]]
    assert reasons == [None] * (len(reasons) - 1) + [whole.choices[0].finish_reason]


def test_models_lists_the_served_name(service: Service):
    [card] = service.client().models.list().data
    assert (card.id, card.owned_by, card.object) == ("yuan2", "fastchat", "model")
    assert service.client().models.retrieve("yuan2").id == "yuan2"


def test_a_stop_string_ends_the_generation_and_is_not_shown(service: Service):
    whole = ask(service, "Who are you?", max_tokens=60)
    text = whole.choices[0].message.content
    stop = text[len(text) // 2 :][:3]
    for stream in (False, True):
        if stream:
            chunks = list(ask(service, "Who are you?", max_tokens=60, stop=stop, stream=True))
            shown = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            reason = chunks[-1].choices[0].finish_reason
        else:
            stopped = ask(service, "Who are you?", max_tokens=60, stop=["never said this", stop])
            shown, reason = stopped.choices[0].message.content, stopped.choices[0].finish_reason
            assert stopped.usage.completion_tokens < whole.usage.completion_tokens
        assert shown == text[: text.index(stop)]
        assert reason == "stop"


def test_n_answers_count_the_prompt_once_and_a_seed_repeats_them(service: Service):
    options = {"n": 3, "temperature": 1.5, "seed": 11, "max_tokens": 12}
    first, again = ask(service, "Who are you?", **options), ask(service, "Who are you?", **options)
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in again.choices]
    assert len(set(texts)) == 3
    prompt = len(render_prompt([{"role": "user", "content": "Who are you?"}], service.tokenizer))
    assert first.usage.prompt_tokens == prompt
    assert 0 < first.usage.completion_tokens <= 36

    streamed = {0: "", 1: "", 2: ""}
    for chunk in ask(service, "Who are you?", stream=True, **options):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert [streamed[index] for index in range(3)] == texts


def test_logprobs_are_those_of_the_chosen_tokens(service: Service):
    answer = ask(service, "Who are you?", logprobs=True, top_logprobs=2, max_tokens=6)
    entries = answer.choices[0].logprobs.content
    assert len(entries) == 6
    for entry in entries:
        assert len(entry.top_logprobs) == 2
        assert entry.top_logprobs[0].logprob == pytest.approx(entry.logprob)  # greedy takes the best
        assert entry.logprob <= 0
    said = [entry for entry in entries if entry.token not in service.tokenizer.special_ids]
    spelled = b"".join(bytes(entry.bytes) for entry in said).decode(errors="replace")
    assert spelled.lstrip(" ") == answer.choices[0].message.content.lstrip(" ")


def test_a_history_is_rendered_as_in_training(service: Service):
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Who are"}, {"type": "text", "text": "you?"}]},
        {"role": "assistant", "content": "I am Yuan."},
        {"role": "user", "content": "And what is the man"},
    ]
    plain = [{**message} for message in messages]
    plain[0]["role"], plain[1]["content"] = "system", "Who are\nyou?"
    answer = ask(service, "", messages=messages)
    prompt = render_prompt(plain, service.tokenizer)
    expected = greedy_ids(service.model, tuple(prompt), 24)
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.choices[0].message.content == service.tokenizer.decode(expected, skip_special_tokens=True)


def test_special_tokens_in_a_message_are_ordinary_text(service: Service):
    answer = ask(service, "one<sep>two<eod>three")
    ids = render_prompt([{"role": "user", "content": "one<sep>two<eod>three"}], service.tokenizer)
    assert ids.count(service.tokenizer.sep_id) == 1
    assert service.tokenizer.eod_id not in ids
    assert answer.usage.prompt_tokens == len(ids)


UNSUPPORTED, TOO_LONG = "unsupported_parameter", "context_length_exceeded"


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"temperature": 3}, "temperature", None),
        ({"top_p": 1.5}, "top_p", None),
        ({"max_tokens": 0}, "max_tokens", None),
        ({"n": 0}, "n", None),
        ({"stop": [""]}, "stop.0", None),
        ({"top_logprobs": 3}, "top_logprobs", None),
        ({"messages": []}, "messages", None),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role", None),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages", None),
        ({"messages": [{"role": "user", "content": "你" * 400}]}, "messages", TOO_LONG),
        ({"max_tokens": CONTEXT}, "max_tokens", TOO_LONG),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", UNSUPPORTED),
        ({"response_format": {"type": "json_object"}}, "response_format", UNSUPPORTED),
        ({"logit_bias": {"5": 1}}, "logit_bias", UNSUPPORTED),
        ({"extra_body": {"mirostat": 1}}, "mirostat", "unknown_parameter"),
    ],
)
def test_a_bad_request_names_its_parameter(service: Service, change: dict, param: str, code: str):
    arguments = {"model": "yuan2", "messages": [{"role": "user", "content": "Who are you?"}], **change}
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as raised:
            service.client().chat.completions.create(stream=stream, **arguments)
        assert raised.value.param == param
        assert raised.value.code == code
        assert raised.value.type == "invalid_request_error"
        assert raised.value.body["message"]


def test_a_model_that_nobody_serves_is_not_found(service: Service):
    with pytest.raises(openai.NotFoundError) as raised:
        service.client().chat.completions.create(model="gpt-4", messages=[{"role": "user", "content": "Hi"}])
    assert (raised.value.param, raised.value.code) == ("model", "model_not_found")
    with pytest.raises(openai.NotFoundError):
        service.client().models.retrieve("gpt-4")


def test_parameters_that_ask_for_nothing_are_accepted(service: Service):
    neutral = {
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "logit_bias": {},
        "store": False,
        "user": "somebody",
        "extra_body": {"top_k": -1, "repetition_penalty": 1.0},
    }
    assert ask(service, "Who are you?", **neutral).choices == ask(service, "Who are you?").choices


@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_embeddings_are_vectors_of_length_one(service: Service, encoding: str):
    texts = ["Who are you?", "你是谁？"]
    # The client asks for base64 when it is not told, and decodes it.
    options = {"encoding_format": "float"} if encoding == "float" else {}
    answer = service.client().embeddings.create(model="yuan2", input=texts, **options)
    assert [entry.index for entry in answer.data] == [0, 1]
    for entry in answer.data:
        assert sum(x * x for x in entry.embedding) == pytest.approx(1, abs=1e-5)
    assert answer.usage.prompt_tokens == sum(len(service.tokenizer.encode(text)) for text in texts)
    alone = service.client().embeddings.create(model="yuan2", input=texts[0])
    assert alone.data[0].embedding == pytest.approx(answer.data[0].embedding, abs=1e-6)


@pytest.mark.parametrize(
    "change", [{"input": [[]]}, {"input": []}, {"input": ""}, {"input": "你" * 400}, {"dimensions": 8}]
)
def test_bad_embeddings_requests_name_their_parameter(service: Service, change: dict):
    with pytest.raises(openai.BadRequestError) as raised:
        service.client().embeddings.create(**{"model": "yuan2", "input": "Who are you?", **change})
    assert raised.value.param.startswith(next(iter(change)))


def test_the_answer_ends_where_the_context_does(service: Service):
    """Some of the answers of a random model have no other end."""
    answers = (ask(service, f"Who are you? {number}", max_tokens=None) for number in range(20))
    answer = next(answer for answer in answers if answer.choices[0].finish_reason == "length")
    assert answer.usage.total_tokens == CONTEXT


def test_unknown_routes_and_bodies_get_openai_errors(service: Service):
    missing = httpx.post(service.api.url + "/v1/images/generations", json={})
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "unknown_url")
    wrong = httpx.get(service.api.url + "/v1/chat/completions")
    assert (wrong.status_code, wrong.json()["error"]["type"]) == (405, "invalid_request_error")
    garbage = httpx.post(service.api.url + "/v1/chat/completions", content=b"{")
    assert (garbage.status_code, garbage.json()["error"]["type"]) == (400, "invalid_request_error")


def queue_length(service: Service) -> int:
    return int(httpx.post(service.worker.url + "/worker_get_status").json()["queue_length"])


def test_a_full_queue_is_a_rate_limit(service: Service):
    with pytest.raises(openai.RateLimitError) as raised:
        ask(service, "Who are you?", n=9, max_tokens=100)  # the worker takes 8
    assert raised.value.code == "rate_limit_exceeded"
    wait_for("an empty queue", lambda: queue_length(service) == 0, 5)
