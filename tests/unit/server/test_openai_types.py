"""OpenAI's requests: honoured or refused by name, never ignored."""

from __future__ import annotations

import pytest

from yuan2_server.completion import Choice, tokens_of, total_usage
from yuan2_server.openai_api import model_card
from yuan2_server.openai_errors import OpenAIError, from_worker
from yuan2_server.openai_params import check_choices
from yuan2_server.openai_styles import PlainText, chat_logprobs, text_logprobs
from yuan2_server.openai_text import (
    parse_completion_request,
    parse_embeddings_request,
    parse_tokenize_request,
)
from yuan2_server.openai_tokens import CACHE_VARIABLE, is_cached, texts_of
from yuan2_server.openai_types import NEUTRAL, parse_chat_request, prompt_text
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
    answer = {"role": "assistant", "content": "Hello", "refusal": None, "tool_calls": None, "annotations": []}
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
        ({"messages": [{"role": "user", "content": "Hi", "name": ""}]}, "messages.0.name"),
        ({"messages": [{"role": "user"}]}, "messages.0"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]}, "messages.0.tool_calls"),
        ({"stop": ["x"] * 100_000}, "stop"),
        ({"stop": ["x" * 300]}, "stop.0"),
        ({"repetition_penalty": 1e-40}, "repetition_penalty"),
        ({"temperature": float("nan")}, "temperature"),
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
        ([QUESTION, {"role": "system", "content": "x"}], "can only come first"),
        ([QUESTION, {"role": "assistant", "content": "x"}], "the last message must be the user's"),
        ([{"role": "system", "content": "x"}], "the last message must be the user's"),
    ],
)
def test_a_conversation_that_breaks_a_rule_is_refused(messages: list, words: str):
    with pytest.raises(OpenAIError, match=words) as raised:
        parse(messages=messages).dialogue()
    assert raised.value.param == "messages"


@pytest.mark.parametrize("empty", [{"content": ""}, {"content": None}, {"content": " \n"}, {}])
def test_a_chat_goes_on_after_an_answer_in_which_nothing_was_said(empty: dict):
    """The model may answer `<eod>` at once, and clients send their history as it is."""
    history = [QUESTION, {"role": "assistant", **empty}, {"role": "user", "content": "Hello?"}]
    request = parse(messages=history)
    assert request.spoken() == [{"role": "user", "content": "Hi\nHello?"}]
    assert request.dialogue().question == "Hi\nHello?"


def test_messages_of_one_role_in_a_row_are_one_of_several_lines():
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": "Hi", "name": "Ann"},
        {"role": "user", "content": "Hello", "name": "Bob"},
        {"role": "assistant", "content": "Hello both."},
        QUESTION,
    ]
    request = parse(messages=messages)
    assert request.dialogue().system == "Be brief.\nBe kind."
    assert request.dialogue().turns == (("Ann: Hi\nBob: Hello", "Hello both."),)
    assert request.worker_params(0)["messages"] == request.spoken()


def test_more_answers_than_a_worker_takes_at_once_are_no_rate_limit():
    check_choices(64, 64, "n")
    with pytest.raises(OpenAIError, match="n: 65 answers") as raised:
        check_choices(65, 64, "n")
    assert (raised.value.status, raised.value.param) == (400, "n")


def completion(**fields):
    return parse_completion_request({"model": "yuan2", "prompt": "Hi", **fields})


def test_each_prompt_of_a_completion_gets_its_n_answers():
    request = completion(prompt=["Hi", [5, 6]], n=2, seed=3, logprobs=0, echo=None)
    params = [request.worker_params(index) for index in range(request.count)]
    assert [one.get("prompt") for one in params] == ["Hi", "Hi", None, None]
    assert [one.get("prompt_ids") for one in params] == [None, None, [5, 6], [5, 6]]
    assert [one["seed"] for one in params] == [3, 4, 3, 4]
    assert (params[0]["max_new_tokens"], params[0]["logprobs"], params[0]["clamp"]) == (16, 0, False)
    assert completion(prompt=[5, 6]).prompt == ((5, 6),)
    assert "logprobs" not in completion().worker_params(0)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt.0"),
        ({"prompt": [[-1]]}, "prompt.0"),
        ({"prompt": [1.5]}, "prompt.0"),
        ({"best_of": 3}, "best_of"),
        ({"suffix": "end"}, "suffix"),
        ({"echo": True, "logprobs": 1}, "echo"),
        ({"messages": []}, "messages"),
    ],
)
def test_a_bad_field_of_a_completion_is_named(fields: dict, param: str):
    with pytest.raises(OpenAIError) as raised:
        completion(**fields)
    assert raised.value.status == 400
    assert (raised.value.param or "").startswith(param)


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("Hi", ("Hi",)),
        (["Hi", "Ho"], ("Hi", "Ho")),
        ([5, 6], ((5, 6),)),
        ([[5, 6], [7]], ((5, 6), (7,))),
    ],
)
def test_embeddings_are_of_texts_or_token_ids(given, read):
    assert parse_embeddings_request({"model": "yuan2", "input": given}).input == read


@pytest.mark.parametrize("given", [[], "", [""], [[]], ["x"] * 2049, [True], {"a": 1}, [[2.5]], [None]])
def test_what_cannot_be_embedded_is_refused(given):
    with pytest.raises(OpenAIError) as raised:
        parse_embeddings_request({"model": "yuan2", "input": given})
    assert (raised.value.param or "").startswith("input")


async def test_token_ids_are_those_of_the_model_that_is_asked_for(monkeypatch: pytest.MonkeyPatch):
    assert await texts_of("yuan2", [(5, 6), "Hi"]) == [[5, 6], "Hi"]
    # An alias that is a model of OpenAI's has OpenAI's tokenizer, whose file is not here.
    monkeypatch.delenv(CACHE_VARIABLE, raising=False)
    assert await texts_of("text-embedding-ada-002", ["Hi"]) == ["Hi"]
    with pytest.raises(OpenAIError, match="check_embedding_ctx_length=False") as raised:
        await texts_of("text-embedding-ada-002", [(5, 6)])
    assert raised.value.param == "input"
    assert not is_cached({CACHE_VARIABLE: "/nowhere"})


def test_either_a_text_or_messages_are_tokenized():
    assert parse_tokenize_request({"model": "m", "prompt": "x"}).worker_body() == {
        "model": "m",
        "prompt": "x",
    }
    chat = parse_tokenize_request({"model": "m", "messages": [QUESTION]})
    assert chat.worker_body() == {"model": "m", "messages": [QUESTION]}
    for both in ({}, {"prompt": "x", "messages": [QUESTION]}):
        with pytest.raises(OpenAIError):
            parse_tokenize_request({"model": "m", **both})


def test_a_model_card_has_the_shape_of_fastchats():
    card, alias = model_card("yuan2", "yuan2"), model_card("gpt-3.5-turbo", "yuan2")
    assert list(card) == ["id", "object", "created", "owned_by", "root", "parent", "permission"]
    assert (card["owned_by"], card["root"], card["parent"]) == ("fastchat", "yuan2", None)
    assert (alias["root"], alias["parent"]) == ("yuan2", "yuan2")
    assert card["permission"][0]["object"] == "model_permission"


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
    params = request.worker_params(2)
    assert params["prompt"] == prompt_text(request.dialogue()) == "Be brief.\nHi<n>Hello<n>man<sep>"
    assert [message["role"] for message in params["messages"]] == ["system", "user", "assistant", "user"]
    assert (params["seed"], params["max_new_tokens"], params["stop"], params["logprobs"]) == (7, 9, ["x"], 0)
    assert "seed" not in parse().worker_params(0)


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
    two_prompts = [Choice(i, usage={"prompt_tokens": 4 + i // 2, "completion_tokens": 1}) for i in range(4)]
    assert total_usage(tuple(two_prompts), 2) == {
        "prompt_tokens": 9,
        "completion_tokens": 4,
        "total_tokens": 13,
    }


def test_byte_tokens_have_their_bytes():
    logprobs = {
        "tokens": ["a", "<0xE4>"],
        "token_logprobs": [-1.0, -2.0],
        "top_logprobs": [{"a": -1.0}, None],
    }
    tokens = tokens_of({"logprobs": logprobs}, 0)
    first, second = chat_logprobs(tokens)
    assert first == {
        "token": "a",
        "logprob": -1.0,
        "bytes": [97],
        "top_logprobs": [{"token": "a", "logprob": -1.0, "bytes": [97]}],
    }
    assert second["bytes"] == [0xE4]
    assert tokens_of({"logprobs": logprobs}, 1) == tokens[1:]
    assert text_logprobs(tokens, 3) == {
        "tokens": ["a", "<0xE4>"],
        "token_logprobs": [-1.0, -2.0],
        "top_logprobs": [{"a": -1.0}, {}],
        "text_offset": [3, 4],
    }


def test_the_tokens_of_a_streamed_completion_have_their_places_in_the_whole_text():
    choice, offsets = Choice(0), []
    for text in ("Hel", "lo"):
        logprobs = {"tokens": [text], "token_logprobs": [-1.0], "top_logprobs": [{}]}
        piece = PlainText().piece(*choice.take({"text": text, "delta": True, "logprobs": logprobs}), choice)
        offsets += piece["logprobs"]["text_offset"]
    assert offsets == [0, 3]


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
