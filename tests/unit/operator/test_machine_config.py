"""Settings from the environment, and how the watches are named to kopf."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from yuan2_operator.client import FINETUNES, JOBS, PODS
from yuan2_operator.config import Settings
from yuan2_operator.handlers import CHILD_SELECTOR, index_entry, kopf_settings, source_of
from yuan2_operator.logs import JsonFormatter, about, note_attempt
from yuan2_operator.observe import goes_through_proxy
from yuan2_operator.queue import Key

ROOT = Path(__file__).parents[3]


def test_defaults_serve_every_namespace():
    settings = Settings()
    assert settings.watch_namespaces == ()
    assert settings.port == 8080


def test_namespaces_are_separated_by_commas(monkeypatch):
    monkeypatch.setenv("YUAN2_WATCH_NAMESPACES", "a, b,")
    monkeypatch.setenv("YUAN2_TRAIN_IMAGE", "x:1")
    settings = Settings()
    assert (settings.watch_namespaces, settings.train_image) == (("a", "b"), "x:1")


def test_a_wrong_setting_is_refused(monkeypatch):
    monkeypatch.setenv("YUAN2_POLL_SECONDS", "0")
    with pytest.raises(ValidationError):
        Settings()


def test_the_program_names_the_wrong_setting_in_one_line():
    environ = {"YUAN2_POLL_SECONDS": "soon", "PYTHONPATH": f"{ROOT / 'core'}:{ROOT / 'operator'}"}
    done = subprocess.run(
        [sys.executable, "-m", "yuan2_operator"], env=environ, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert done.stderr.startswith("YUAN2_POLL_SECONDS: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("via", "inside", "proxy"), [("auto", True, False), ("auto", False, True), ("ip", False, False)]
)
def test_progress_takes_the_shortest_way(monkeypatch, via, inside, proxy):
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    if inside:
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.96.0.1")
    assert goes_through_proxy(Settings(progress_via=via)) is proxy


def test_kopf_watches_only_our_children_and_writes_nothing():
    settings = kopf_settings()
    assert settings.posting.enabled is False
    assert set(settings.watching.label_selectors.values()) == {CHILD_SELECTOR}


def test_children_lead_to_their_resource():
    metadata = {"namespace": "demo", "name": "x-1", "uid": "u"}
    labelled = {"kind": "Job", "metadata": {**metadata, "labels": {"yuan2.dev/finetune": "x"}}, "spec": {}}
    assert source_of(JOBS, labelled) == Key("Yuan2FineTune", "demo", "x")
    served = {**labelled, "metadata": {**metadata, "labels": {"yuan2.dev/service": "x"}}}
    assert source_of(PODS, served) == Key("Yuan2Service", "demo", "x")
    assert source_of(FINETUNES, {"metadata": metadata}) == Key("Yuan2FineTune", "demo", "x-1")
    assert index_entry(PODS, {"metadata": metadata}) is None


def test_log_lines_can_be_json():
    record = logging.LogRecord("yuan2", logging.INFO, "f", 1, "pod %s", ("x",), None)
    entry = json.loads(JsonFormatter().format(record))
    assert (entry["level"], entry["message"]) == ("INFO", "pod x")


def test_the_operators_folder_is_no_package():
    assert not (ROOT / "operator" / "__init__.py").exists()


def test_json_lines_say_which_resource_and_attempt_they_are_about():
    record = logging.LogRecord("yuan2", logging.INFO, "f", 1, "done", (), None)
    with about(kind="Yuan2FineTune", namespace="demo", name="alpaca"):
        note_attempt(3)
        entry = json.loads(JsonFormatter().format(record))
        with about(name="other"):
            inner = json.loads(JsonFormatter().format(record))
    assert (entry["namespace"], entry["name"], entry["attempt"]) == ("demo", "alpaca", 3)
    assert inner["name"] == "other"
    assert "name" not in json.loads(JsonFormatter().format(record))
