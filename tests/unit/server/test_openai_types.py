"""OpenAI's requests: honoured or refused by name, never ignored."""

from __future__ import annotations

import pytest

from yuan2_server.openai_chat import Choice, chat_logprobs, prompt_text, total_usage, worker_params
from yuan2_server.openai_errors import OpenAIError, from_worker
from yuan2_server.openai_types import NEUTRAL, parse_chat_request
from yuan2_server.protocol import ErrorCode, RequestError, error_document

QUESTION = {"role": "user", "content": "Hi"}


def parse(**fields):
    return parse_chat_request({"model": "yuan2", "messages": [QUESTION], **fields})


def test_null_is_as_good_as_absent():
    nulls = dict.fromkeys(
        ("temperature", "n", "stop", "max_tokens", "tools", "logprobs", "stream_options", "user", "seed")
    )
    assert parse(**nulls) == parse()


def test_an_answer_sent_back_as_the_client_library_has_it_is_accepted():
    answer = {"role": "assistant", "content": "Hello", "refusal": None, "tool_calls": None, "audio": None}
    request = parse(messages=[QUESTION, answer, QUESTION])
    assert request.dialogue().turns == (("Hi", "Hello"),)


@pytest.mark.parametrize("name", sorted(NEUTRAL))
def test_an_unsupported_parameter_is_refused_unless_it_asks_for_nothing(name: str):
    for value in NEUTRAL[name]:
        assert parse(**{name: value}) == parse()
    with pytest.raises(OpenAIError) as raised:
        parse(**{name: {"asks": "for something"}})
    assert (raised.value.status, raised.value.param, raised.value.code) == (
        400,
        name,
        "unsupported_parameter",
    )


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"continuous": True}}, "stream_options.continuous"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": "Hi", "name": "Ann"}]}, "messages.0.name"),
        ({"messages": [{"role": "tool", "content": "Hi"}]}, "messages.0.role"),
        ({"seed": "x"}, "seed"),
        ({"stop": 5}, "stop"),
    ],
)  # fmt: skip
def test_a_bad_field_is_named(fields: dict, param: str):
    with pytest.raises(OpenAIError) as raised:
        parse(**fields)
    assert raised.value.status == 400
    assert (raised.value.param or "").startswith(param)
    assert raised.value.type == "invalid_request_error"


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([QUESTION, QUESTION], "two user messages in a row"),
        ([QUESTION, {"role": "assistant", "content": " "}, QUESTION], "empty answer"),
        ([QUESTION, {"role": "system", "content": "x"}], "can only come first"),
        ([QUESTION, {"role": "assistant", "content": "x"}], "the last message must be the user's"),
    ],
)
def test_a_conversation_that_breaks_a_rule_is_refused(messages: list, words: str):
    with pytest.raises(OpenAIError, match=words) as raised:
        parse(messages=messages).dialogue()
    assert raised.value.param == "messages"


def test_the_worker_gets_messages_and_fastchats_prompt_text():
    answer = {"role": "assistant", "content": "Hello"}
    request = parse(
        messages=[
            {"role": "developer", "content": "Be brief."},
            QUESTION,
            answer,
            {"role": "user", "content": "man"},
        ],
        seed=5,
        max_completion_tokens=9,
        stop="x",
        logprobs=True,
    )
    params = worker_params(request, 2)
    assert params["prompt"] == prompt_text(request.dialogue()) == "Be brief.\nHi<n>Hello<n>man<sep>"
    assert [message["role"] for message in params["messages"]] == ["system", "user", "assistant", "user"]
    assert (params["seed"], params["max_new_tokens"], params["stop"], params["logprobs"]) == (7, 9, ["x"], 0)
    assert "seed" not in worker_params(parse(), 0)


def test_a_choice_turns_cumulative_text_into_deltas():
    choice = Choice(0)
    # FastChat's own worker shows half a character as U+FFFD and corrects it afterwards.
    texts = ["He", "Hel\ufffd", "Hel你", "Hel你"]
    deltas = [choice.take({"text": text, "usage": {"prompt_tokens": 3}})[0] for text in texts]
    assert deltas == ["He", "l", "你", ""]
    assert choice.take({"text": "Hel你\ufffd", "finish_reason": "length"})[0] == "\ufffd"
    assert (choice.text, choice.finish_reason, choice.usage) == (
        "Hel你\ufffd",
        "length",
        {"prompt_tokens": 3},
    )


def test_a_choice_takes_deltas_as_they_are():
    choice = Choice(0)
    texts = ["He", "", "llo"]
    assert [choice.take({"text": text, "delta": True})[0] for text in texts] == texts
    assert choice.text == "Hello"


def test_usage_counts_the_prompt_once():
    choices = [Choice(i, usage={"prompt_tokens": 4, "completion_tokens": i}) for i in range(3)]
    assert total_usage(tuple(choices)) == {"prompt_tokens": 4, "completion_tokens": 3, "total_tokens": 7}


def test_byte_tokens_have_their_bytes():
    logprobs = {
        "tokens": ["a", "<0xE4>"],
        "token_logprobs": [-1.0, -2.0],
        "top_logprobs": [{"a": -1.0}, None],
    }
    first, second = chat_logprobs(logprobs, 0)
    assert first == {
        "token": "a",
        "logprob": -1.0,
        "bytes": [97],
        "top_logprobs": [{"token": "a", "logprob": -1.0, "bytes": [97]}],
    }
    assert second["bytes"] == [0xE4]
    assert chat_logprobs(logprobs, 1) == [second]


@pytest.mark.parametrize(
    ("code", "status", "openai_code"),
    [
        (ErrorCode.VALIDATION_TYPE_ERROR, 400, None),
        (ErrorCode.PARAM_OUT_OF_RANGE, 400, None),
        (ErrorCode.CONTEXT_OVERFLOW, 400, "context_length_exceeded"),
        (ErrorCode.INVALID_MODEL, 404, "model_not_found"),
        (ErrorCode.RATE_LIMIT, 429, "rate_limit_exceeded"),
        (ErrorCode.QUOTA_EXCEEDED, 429, "rate_limit_exceeded"),
        (ErrorCode.ENGINE_OVERLOADED, 503, "no_worker"),
        (ErrorCode.CUDA_OUT_OF_MEMORY, 500, "out_of_memory"),
        (ErrorCode.INTERNAL_ERROR, 500, "worker_failed"),
    ],
)
def test_workers_errors_have_openais_status(code: ErrorCode, status: int, openai_code: str):
    document = error_document(RequestError(code, "max_new_tokens: must not be 0", "max_new_tokens"))
    error = from_worker(document, "yuan2")
    assert (error.status, error.code) == (status, openai_code)
    assert error.type == {429: "rate_limit_error"}.get(
        status, "invalid_request_error" if status < 500 else "server_error"
    )
    if status == 400:
        assert error.param == "max_tokens"


def test_the_parameter_is_named_by_the_worker_and_not_read_out_of_its_sentence():
    """FastChat's own worker names none."""
    document = {"error_code": 40302, "text": "temperature: 3 is greater than the maximum"}
    assert from_worker(document, "yuan2").param is None
    assert from_worker({**document, "param": "prompt"}, "yuan2", "input").param == "input"
    assert from_worker({"error_code": 40303, "text": "too long"}, "yuan2").param == "messages"
