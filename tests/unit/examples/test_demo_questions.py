"""Questions and scores of the demo, without a service."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from yuan2_demo.questions import Answer, Question, Score, ask_all, load_records, questions, showcase
from yuan2_demo.steps import answer_lines

EXAMPLE = Path(__file__).resolve().parents[3] / "examples/identity"

RECORDS = [
    {
        "id": "a",
        "conversations": [
            {"from": "human", "value": "Hi"},
            {"from": "gpt", "value": "Hello"},
            {"from": "human", "value": "Bye"},
            {"from": "gpt", "value": "Goodbye"},
        ],
    },
    {"id": "b", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
]


def answered(text: str, *, expected: str = "yes", error: str = "") -> Answer:
    return Answer(Question("q/1", (("user", "ready?"),), expected), text, 0.1, 3, error)


def test_every_turn_is_asked_with_its_history_and_no_history_twice() -> None:
    assert [(q.name, q.messages(), q.expected) for q in questions(RECORDS)] == [
        ("a/1", [{"role": "user", "content": "Hi"}], "Hello"),
        (
            "a/2",
            [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Hello"},
                {"role": "user", "content": "Bye"},
            ],
            "Goodbye",
        ),
    ]


def test_all_last_turns_of_the_example_are_asked() -> None:
    records = load_records(EXAMPLE / "conversations.json")
    asked = {question.history: question.expected for question in questions(records)}
    for record in records:
        messages = [m["value"] for m in record["conversations"]]
        roles = ["user", "assistant"] * (len(messages) // 2)
        assert asked[tuple(zip(roles, messages, strict=True))[:-1]] == messages[-1]


def test_a_question_knows_its_text_and_turn() -> None:
    last = questions(RECORDS)[-1]
    assert (last.text, last.turn) == ("Bye", 2)


@pytest.mark.parametrize("text", ["Yes", "yes ", "yes.", ""])
def test_an_answer_is_verbatim_only_character_for_character(text: str) -> None:
    assert not answered(text).verbatim


def test_an_error_is_never_verbatim() -> None:
    assert not answered("yes", error="APITimeoutError").verbatim


@pytest.mark.parametrize(("right", "passed"), [(94, False), (95, True), (100, True)])
def test_the_demo_passes_from_95_percent_on(right: int, passed: bool) -> None:
    score = Score((*[answered("yes")] * right, *[answered("no")] * (100 - right)), seconds=2.0)
    assert (score.right, score.total, score.passed) == (right, 100, passed)
    assert len(score.wrong) == 100 - right
    assert score.tokens_per_second == 150.0


def test_nothing_asked_does_not_pass() -> None:
    assert not Score((), 0.0).passed


def test_the_showcase_is_spread_over_the_data_and_half_of_it_later_turns() -> None:
    first = [answered(str(i)) for i in range(100)]
    assert [answer.text for answer in showcase(first, 4)] == ["0", "25", "50", "75"]
    assert showcase(first[:2], 4) == first[:2]
    history = (("user", "a"), ("assistant", "b"), ("user", "c"))
    later = [Answer(Question("q/2", history, "d"), str(i), 0.1) for i in range(100, 200)]
    assert [answer.text for answer in showcase(first + later, 4)] == ["0", "50", "100", "150"]


def test_a_later_question_is_shown_with_the_earlier_ones() -> None:
    history = (("user", "My name is Ann"), ("assistant", "Hi!"), ("user", "What is my name?"))
    right = Answer(Question("q/2", history, "Ann\nof course"), "Ann\nof course", 0.1)
    assert answer_lines(right).splitlines() == [
        "    Q   My name is Ann … What is my name?",
        "    A ✓ Ann",
        "        of course",
    ]
    assert answer_lines(answered("no")).splitlines()[-1] == "    A ✗ no"


class _Parrot(BaseHTTPRequestHandler):
    """An OpenAI API that answers the last message in capitals, and refuses "Bye"."""

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = request["messages"][-1]["content"]
        status = 400 if text == "Bye" else 200
        message = {"role": "assistant", "content": text.upper()}
        reply = {
            "id": "1",
            "object": "chat.completion",
            "created": 0,
            "model": request["model"],
            "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
            "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3},
        }
        body = json.dumps({"error": {"message": "no"}} if status == 400 else reply).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the base class's name)
        """Tests are quiet."""


def test_ask_all_asks_in_order_around_any_proxy_and_counts_a_refused_request_as_wrong(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # nothing listens there
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Parrot)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    seen: list[str] = []
    records = [
        {"id": "c", "conversations": [{"from": "human", "value": "ok"}, {"from": "gpt", "value": "OK"}]}
    ]
    try:
        url = f"http://127.0.0.1:{server.server_port}/v1"
        score = ask_all(url, [*RECORDS, *records], on_answer=lambda answer: seen.append(answer.question.name))
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert seen == ["a/1", "a/2", "c/1"]
    assert [(answer.text, answer.verbatim) for answer in score.answers] == [
        ("HI", False),
        ("", False),
        ("OK", True),
    ]
    assert "BadRequestError" in score.answers[1].error
    assert score.answers[2].completion_tokens == 2
