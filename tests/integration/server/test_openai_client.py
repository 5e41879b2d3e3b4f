"""What FastChat's own `test_openai_api.py` asks of an API server, and LangChain's and curl's requests."""

from __future__ import annotations

import json

import httpx
import openai
import pytest

from tests.integration.server.conftest import Service
from tests.integration.server.test_chat import ask
from tests.support.serving import CONTEXT

PROMPT = "Who are you?<sep>"


def complete(service: Service, prompt=PROMPT, **options):
    options = {"temperature": 0, "max_tokens": 12, **options}
    return service.client().completions.create(model="yuan2", prompt=prompt, **options)


def test_models_have_the_shape_of_the_published_check(service: Service):
    [card] = httpx.get(service.api.url + "/v1/models").json()["data"]
    permission = card["permission"][0]
    assert (card["id"], card["object"], card["owned_by"], card["root"]) == (
        "yuan2",
        "model",
        "fastchat",
        "yuan2",
    )
    assert card["parent"] is None
    assert set(permission) == {
        "id",
        "object",
        "created",
        "allow_create_engine",
        "allow_sampling",
        "allow_logprobs",
        "allow_search_indices",
        "allow_view",
        "allow_fine_tuning",
        "organization",
        "group",
        "is_blocking",
    }


def test_a_completion_goes_on_with_its_prompt(service: Service):
    answer = complete(service)
    assert (answer.object, answer.id[:5]) == ("text_completion", "cmpl-")
    assert answer.choices[0].text == ask(service, "Who are you?", max_tokens=12).choices[0].message.content
    assert answer.usage.prompt_tokens == len(service.tokenizer.encode(PROMPT))
    assert complete(service, echo=True).choices[0].text == PROMPT + answer.choices[0].text
    ids = service.tokenizer.encode(PROMPT)
    assert complete(service, prompt=ids).choices == answer.choices
    assert complete(service, prompt=ids, echo=True).choices[0].text == PROMPT + answer.choices[0].text


def test_a_streamed_completion_adds_up_to_the_whole_one(service: Service):
    whole = complete(service, logprobs=2)
    chunks = list(complete(service, logprobs=2, stream=True, stream_options={"include_usage": True}))
    texts = [choice.text for chunk in chunks for choice in chunk.choices]
    assert "".join(texts) == whole.choices[0].text
    assert chunks[-1].usage == whole.usage
    reasons = [choice.finish_reason for chunk in chunks for choice in chunk.choices]
    assert reasons == [None] * (len(reasons) - 1) + [whole.choices[0].finish_reason]
    rows = [choice.logprobs for chunk in chunks for choice in chunk.choices if choice.logprobs]
    for name in ("tokens", "token_logprobs", "text_offset"):
        joined = [value for row in rows for value in getattr(row, name)]
        assert joined == getattr(whole.choices[0].logprobs, name)
    echoed = "".join(c.text for chunk in complete(service, echo=True, stream=True) for c in chunk.choices)
    assert echoed == PROMPT + whole.choices[0].text


def test_several_prompts_are_completed_in_their_order(service: Service):
    answer = complete(service, prompt=[PROMPT, "1 + 1 = "], n=2, temperature=1.2, seed=3)
    again = complete(service, prompt=["1 + 1 = "], n=2, temperature=1.2, seed=3)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in answer.choices[2:]] == [choice.text for choice in again.choices]
    each = [len(service.tokenizer.encode(text)) for text in (PROMPT, "1 + 1 = ")]
    assert answer.usage.prompt_tokens == sum(each)


def test_tokens_of_texts_and_messages_are_told(service: Service):
    url = service.api.url + "/tokenize"
    answer = httpx.post(url, json={"model": "yuan2", "prompt": PROMPT}).json()
    assert answer["tokens"] == service.tokenizer.encode(PROMPT)
    assert (answer["count"], answer["max_model_len"]) == (len(answer["tokens"]), CONTEXT)
    messages = [{"role": "user", "content": "Who are you?"}]
    assert httpx.post(url, json={"model": "yuan2", "messages": messages}).json() == answer
    assert httpx.post(url, json={"model": "gpt-4", "prompt": PROMPT}).status_code == 404


def test_embeddings_take_texts_and_token_ids(service: Service):
    ids = service.tokenizer.encode("你是谁？")
    text = service.client().embeddings.create(model="yuan2", input="你是谁？")
    for given in (ids, [ids]):
        answer = service.client().embeddings.create(model="yuan2", input=given)
        assert answer.data[0].embedding == text.data[0].embedding
        assert answer.usage == text.usage
    with pytest.raises(openai.BadRequestError) as raised:
        service.client().embeddings.create(model="yuan2", input=[[10**6]])
    assert raised.value.param == "input"


def test_langchains_default_requests_are_answered(service: Service):
    """What `ChatOpenAI` and `OpenAIEmbeddings` of langchain-openai send by default, written by hand."""
    chat = {
        "model": "yuan2",
        "stream": False,
        "messages": [{"content": "Hi", "role": "user"}],
        "max_tokens": 5,
    }
    assert httpx.post(service.api.url + "/v1/chat/completions", json=chat).status_code == 200
    history = [
        {"role": "user", "content": "Hi", "name": "Ann"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "Hello?"},
        {"role": "user", "content": "Anybody?"},
    ]
    streamed = {**chat, "messages": history, "stream": True, "stream_options": {"include_usage": True}}
    lines = httpx.post(service.api.url + "/v1/chat/completions", json=streamed).text.split("\n\n")
    assert lines[-2] == "data: [DONE]"
    assert json.loads(lines[-3].removeprefix("data: "))["usage"]["completion_tokens"] <= 5
    embeddings = {"model": "yuan2", "input": [[5, 6, 7]], "encoding_format": "base64"}
    assert httpx.post(service.api.url + "/v1/embeddings", json=embeddings).status_code == 200
