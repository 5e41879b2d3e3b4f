"""FastChat's wire format: reading requests, writing documents."""

from __future__ import annotations

import json

import pytest

from yuan2_server.protocol import (
    Chunk,
    ErrorCode,
    GenerateRequest,
    RequestError,
    TokenLogprob,
    Usage,
    encode_document,
    error_document,
)


def parse(**fields) -> GenerateRequest:
    return GenerateRequest.parse({"model": "yuan2", "prompt": "x", **fields}, served=("yuan2",))


def test_null_means_the_default_but_no_limit_for_the_answer():
    request = parse(temperature=None, top_k=None, stop=None, logprobs=None, max_new_tokens=None)
    assert (request.temperature, request.top_k, request.stop, request.logprobs) == (1.0, -1, (), None)
    assert request.max_new_tokens is None
    assert parse().max_new_tokens == 256


def test_one_stop_string_needs_no_list():
    assert parse(stop="a").stop == parse(stop=["a"]).stop == ("a",)


@pytest.mark.parametrize(
    ("fields", "code", "message"),
    [
        ({"model": "other"}, ErrorCode.INVALID_MODEL, "model: 'other' is not served here; use one of yuan2"),
        ({"temperature": float("nan")}, ErrorCode.PARAM_OUT_OF_RANGE, "temperature: "),
        ({"temperature": -0.1}, ErrorCode.PARAM_OUT_OF_RANGE, "temperature: "),
        ({"repetition_penalty": 0}, ErrorCode.PARAM_OUT_OF_RANGE, "repetition_penalty: "),
        ({"best_of": 2}, ErrorCode.PARAM_OUT_OF_RANGE, "best_of: 2 is greater than n, 1"),
        ({"best_of": 0}, ErrorCode.PARAM_OUT_OF_RANGE, "best_of: "),
        ({"logprobs": 21}, ErrorCode.PARAM_OUT_OF_RANGE, "logprobs: "),
        ({"stop_token_ids": ["x"]}, ErrorCode.VALIDATION_TYPE_ERROR, "stop_token_ids.0: "),
        ({"grammar": "x"}, ErrorCode.VALIDATION_TYPE_ERROR, "grammar: this worker has no such parameter"),
        ({"messages": [{"role": "user"}]}, ErrorCode.VALIDATION_TYPE_ERROR, "messages.0.content: "),
    ],
)
def test_a_refusal_names_the_field(fields: dict, code: ErrorCode, message: str):
    with pytest.raises(RequestError) as raised:
        parse(**fields)
    assert raised.value.code == code
    assert raised.value.message.startswith(message)


def test_documents_end_with_a_zero_byte_and_carry_logprobs_only_when_asked():
    chunk = Chunk("你", Usage(2, 1), "stop")
    assert encode_document(chunk.to_dict())[-1:] == b"\0"
    assert json.loads(encode_document(chunk.to_dict())[:-1]) == {
        "text": "你",
        "error_code": 0,
        "usage": {"prompt_tokens": 2, "completion_tokens": 1, "total_tokens": 3},
        "finish_reason": "stop",
    }
    entries = (TokenLogprob("ab", -1.0, (("ab", -1.0),)), TokenLogprob("c", -2.0))
    assert Chunk("abc", Usage(2, 2), None, entries).to_dict()["logprobs"] == {
        "text_offset": [0, 2],
        "tokens": ["ab", "c"],
        "token_logprobs": [-1.0, -2.0],
        "top_logprobs": [{"ab": -1.0}, {}],
    }


def test_an_error_is_a_document_too():
    assert error_document(RequestError(ErrorCode.RATE_LIMIT, "full")) == {"text": "full", "error_code": 42901}
