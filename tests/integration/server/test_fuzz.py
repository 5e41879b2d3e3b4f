"""Requests that nobody would write: whatever they hold, the answer is one of OpenAI's and never a 5xx."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import httpx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.integration.server.conftest import Service

ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from([2**70, -1]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
ODD = st.integers(-3, 40) | st.floats() | st.sampled_from([1e-40, 1e300, 2**64])
FRACTION = st.floats(0.02, 1) | st.just(1)
PART = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "text", "image_url"]), "text": st.text(max_size=5)}
)
MESSAGE = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["user"] * 4 + ["system", "developer", "assistant", "tool"]),
        "content": st.text(max_size=30) | st.lists(PART, max_size=2),
    },
    optional={"name": st.text(min_size=1, max_size=5), "tool_calls": st.just([]) | ANYTHING},
)
COMMON: Mapping[str, st.SearchStrategy[Any]] = {
    "temperature": FRACTION,
    "top_p": FRACTION,
    "top_k": st.integers(-1, 500),
    "repetition_penalty": FRACTION,
    "presence_penalty": FRACTION,
    "frequency_penalty": FRACTION,
    "max_tokens": st.integers(1, 6),
    "n": st.integers(1, 3),
    "seed": st.integers(),
    "stop": st.text(min_size=1, max_size=3) | st.lists(st.text(max_size=3), max_size=40),
    "stream": st.booleans(),
    "user": st.text(max_size=5),
    "logit_bias": st.just({}),
}
IDS = st.lists(st.integers(-1, 500), max_size=5)
TEXTS = st.text(max_size=20) | st.lists(st.text(max_size=20), max_size=3) | IDS | st.lists(IDS, max_size=3)
MODEL = {"model": st.sampled_from(["yuan2"] * 8 + ["gpt-4", ""])}


def bodies(required: Mapping[str, Any], optional: Mapping[str, Any]) -> st.SearchStrategy[Any]:
    """Objects that are nearly right, and now and then anything instead of a value."""
    known = st.fixed_dictionaries({**MODEL, **required}, optional=dict(optional))
    spoiled = st.tuples(known, st.sampled_from(sorted({*required, *optional})), ODD | ANYTHING)
    return known | known | known | spoiled.map(lambda drawn: {**drawn[0], drawn[1]: drawn[2]}) | ANYTHING


CHAT = {"logprobs": st.booleans(), "tools": st.just([]), "response_format": st.just({"type": "text"})}
TEXT = {"echo": st.booleans(), "logprobs": st.integers(0, 20), "best_of": st.integers(1, 3)}
REQUESTS = (
    st.tuples(
        st.just("/v1/chat/completions"),
        bodies({"messages": st.lists(MESSAGE, max_size=4)}, {**COMMON, **CHAT}),
    )
    | st.tuples(
        st.just("/v1/completions"),
        bodies({"prompt": TEXTS}, {**COMMON, **TEXT}),
    )
    | st.tuples(
        st.just("/v1/embeddings"),
        bodies({"input": TEXTS}, {"encoding_format": st.sampled_from(["float", "base64", "x"])}),
    )
    | st.tuples(
        st.just("/tokenize"),
        bodies({}, {"prompt": st.text(max_size=20), "messages": st.lists(MESSAGE, max_size=3)}),
    )
)


def test_no_request_is_answered_with_a_server_error(service: Service):
    answers = {200: 0, 400: 0}
    with httpx.Client(base_url=service.api.url, timeout=60) as client:

        @settings(max_examples=60, suppress_health_check=list(HealthCheck))
        @given(REQUESTS)
        def ask(request: tuple[str, Any]) -> None:
            path, body = request
            answer = client.post(path, content=dump(body), headers={"content-type": "application/json"})
            answers[answer.status_code] = answers.get(answer.status_code, 0) + 1
            assert answer.status_code in (200, 400, 404), answer.text
            if answer.status_code != 200:
                error = answer.json()["error"]
                assert set(error) == {"message", "type", "param", "code"}
                assert error["message"]
            else:
                assert '"error"' not in answer.text

        ask()
    assert answers[200] > 0  # not all of them fell at the first hurdle
    assert answers[400] > 0
    assert httpx.get(service.worker.url + "/healthz").text == "ok"


def dump(body: Any) -> bytes:
    """JSON as careless clients write it: NaN, infinities and half surrogate pairs included."""
    return json.dumps(body).encode()
