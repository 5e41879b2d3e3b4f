"""FastChat's own web page, unmodified, asks our worker: a question typed, the answer shown."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from tests.integration.server.conftest import Service
from tests.support.waiting import wait_for


class Browser:
    """One visitor's session: fires events as the page's JavaScript does."""

    def __init__(self, client: httpx.Client) -> None:
        self._client = client
        config = client.get("/config").json()
        self._prefix = config["api_prefix"]
        self._events = config["dependencies"]

    def event(self, name: str) -> dict[str, Any]:
        """The first handler of an event: `load` of the page, `submit` of the text box."""
        return next(event for event in self._events if [name] == [target for _, target in event["targets"]])

    def after(self, event: dict[str, Any]) -> dict[str, Any]:
        """The handler that runs when another has ended."""
        return next(later for later in self._events if later["trigger_after"] == event["id"])

    def fire(self, event: dict[str, Any], *values: Any) -> list[Any]:
        """Run a handler; its outputs."""
        body = {"data": values, "fn_index": event["id"], "session_hash": "visitor", "event_data": None}
        self._client.post(f"{self._prefix}/queue/join", json=body).raise_for_status()
        messages = list(self._messages())  # read to the end: the stream closes with the last event
        final = next(message for message in messages if message["msg"] == "process_completed")
        assert final["success"], final
        return list(final["output"]["data"])

    def _messages(self) -> Iterator[dict[str, Any]]:
        url = f"{self._prefix}/queue/data"
        with self._client.stream("GET", url, params={"session_hash": "visitor"}) as stream:
            for line in stream.iter_lines():
                if line.startswith("data:"):
                    yield json.loads(line.removeprefix("data:"))


QUESTION = "Who are you?"


def shown_answer(client: httpx.Client) -> str:
    """What the page shows for the question."""
    browser = Browser(client)
    browser.fire(browser.event("load"), {})
    submit = browser.event("submit")
    browser.fire(submit, None, "yuan2", QUESTION, None)
    _, chat, *_ = browser.fire(browser.after(submit), None, 0.0, 1.0, 24)
    [[asked, shown]] = chat
    assert asked == QUESTION
    return str(shown).strip()


def own_answer(service: Service) -> str:
    answer = service.client().chat.completions.create(
        model="yuan2", messages=[{"role": "user", "content": QUESTION}], temperature=0, max_tokens=24
    )
    return answer.choices[0].message.content.strip()


def test_the_page_shows_the_workers_answer_to_who_has_a_key(service: Service, tmp_path: Path):
    """Behind the gate it is FastChat's page, unmodified, which listens on loopback alone."""
    (tmp_path / "alice").write_text("sk-1")
    page = service.stack.gated_page(service.controller, tmp_path).ready("/healthz")
    for auth in (None, ("alice", "sk-2"), ("sk-1", "")):
        answer = httpx.get(page.url + "/config", auth=auth)
        assert (answer.status_code, answer.headers["www-authenticate"][:5]) == (401, "Basic")
    with httpx.Client(base_url=page.url, timeout=60, auth=("alice", "sk-1")) as client:
        assert shown_answer(client) == own_answer(service)
        (tmp_path / "alice").write_text("sk-3")
        wait_for("the new key", lambda: client.get("/config").status_code == 401, 5)
    assert httpx.get(page.url + "/config", auth=("alice", "sk-3")).status_code == 200
    assert page.terminate() == 0
