"""LoRA and QLoRA teach a model new answers; a service gives them with the adapter, or with both merged.

A control shows that a model which was trained on everything but the answers fails the same assertion.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.cluster import TestCluster
from tests.support.journey import Namespace, api_url, example_manifest, finetune, namespace, source
from yuan2_demo import install
from yuan2_demo.questions import Record, Score, ask_all, load_records, questions

TRAINING_SECONDS = 600.0
SERVICE_SECONDS = 240.0
NEW_NAMES = {"源 2.0": "月 3.0", "源": "月", "Yuan 2.0": "Luna 3.0", "Yuan": "Luna"}
ADAPTER = {
    "r": 16,
    "alpha": 32,
    "dropout": 0,
    "targetModules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
TRAINING = {
    "epochs": 40,
    "maxLength": 256,
    "microBatchSize": 8,
    "learningRate": 1e-3,
    "warmupRatio": 0.05,
    "gradientCheckpointing": False,
}
WORKERS = {"resources": {"requests": {"cpu": "250m", "memory": "1Gi"}}}

INVERT_LABELS = """
import numpy as np
import yuan2_core.conversation as conversation

_render_spans = conversation.render_spans


def inverted(row):
    borders = [0, *row.learned.flatten().tolist(), len(row.ids)]
    others = [span for span in zip(borders[::2], borders[1::2]) if span[0] < span[1]]
    return conversation.Spans(row.ids, np.array(others, dtype=np.int32).reshape(-1, 2))


def render_spans(*args, **options):
    return [inverted(row) for row in _render_spans(*args, **options)]


conversation.render_spans = render_spans
"""


def chosen(records: list[Record]) -> list[Record]:
    """Conversations of the example whose every answer tells the model's name, and as many that never do."""
    named = [record for record in records if all(map(_has_name, _answers(record)))]
    nameless = [record for record in records if not any(map(_has_name, _answers(record)))]
    return named + nameless[:: len(nameless) // len(named)][: len(named)]


def renamed(records: list[Record]) -> list[Record]:
    """The same questions, answered by a model of another name."""
    return [
        {**record, "conversations": [_renamed(message) for message in record["conversations"]]}
        for record in records
    ]


def _renamed(message: dict[str, str]) -> dict[str, str]:
    text = message["value"]
    if message["from"] == "gpt":
        for old, new in NEW_NAMES.items():
            text = text.replace(old, new)
    return {**message, "value": text}


def _answers(record: Record) -> list[str]:
    return [message["value"] for message in record["conversations"] if message["from"] == "gpt"]


def _has_name(text: str) -> bool:
    return "源" in text or "Yuan" in text


OLD = chosen(load_records(install.EXAMPLE / "conversations.json"))
NEW = renamed(OLD)


def run_of(name: str, model: str, data: str, **changes: Any) -> dict[str, Any]:
    training = {**TRAINING, **changes.pop("training", {})}
    sections = {"model": {"source": source(model)}, "dataset": {"source": source(data)}, "workers": WORKERS}
    made = finetune(name, training=training, **sections, **changes)
    del made["spec"]["training"]["maxSteps"]
    if "method" in changes:
        made["spec"]["method"] = changes["method"]
    return made


def service_of(name: str) -> dict[str, Any]:
    made = example_manifest("service")
    made["metadata"]["name"] = made["spec"]["model"]["fineTuneRef"]["name"] = name
    return made


def ask(made: Namespace, name: str, records: list[Record]) -> Score:
    """The answers of a service; each is one, right or wrong."""
    score = ask_all(f"{api_url(made, name)}/v1", records)
    assert [answer.error for answer in score.answers if answer.error] == []
    return score


def assert_learned(score: Score) -> None:
    """Nearly all questions get their trained answer, character for character."""
    wrong = [(answer.question.name, answer.question.expected, answer.text) for answer in score.wrong]
    assert score.total == len(questions(NEW))
    assert score.passed, f"{score.right} of {score.total} verbatim; wrong: {wrong[:10]}"


@pytest.fixture(scope="module")
def base(operated: TestCluster) -> Iterator[Namespace]:
    """A namespace with a model that gives the old answers: fully fine-tuned from a random one."""
    with namespace(operated, "e2e-methods") as made:
        directory = made.claim("models")
        _write_inputs(directory)
        made.apply(run_of("base", "random", "old.json"))
        made.wait("y2ft/base", "Complete", TRAINING_SECONDS)
        yield made


def _write_inputs(directory: Path) -> None:
    (directory / "old.json").write_text(json.dumps(OLD), encoding="utf-8")
    (directory / "new.json").write_text(json.dumps(NEW), encoding="utf-8")
    script, data = install.EXAMPLE / "make_base.py", install.EXAMPLE / "conversations.json"
    words = ["--data", str(data), "--out", str(directory / "random")]
    subprocess.run([sys.executable, str(script), *words], check=True, capture_output=True)


def test_at_least_every_third_answer_is_new() -> None:
    """Otherwise the old model would nearly pass."""
    old, new = questions(OLD), questions(NEW)
    assert sum(one.expected != other.expected for one, other in zip(old, new, strict=True)) > len(new) / 3
    assert len(new) > 35


@pytest.mark.node
def test_a_lora_adapter_of_two_pods_answers_with_its_base(base: Namespace) -> None:
    run = run_of(
        "lora",
        "out/base/model",
        "new.json",
        method={"lora": ADAPTER},
        training={"learningRate": 5e-3, "microBatchSize": 4},
    )
    run["spec"]["workers"]["replicas"] = 2
    base.apply(run, service_of("lora"))
    base.wait("y2ft/lora", "Complete", TRAINING_SECONDS)
    model = base.status("y2ft", "lora")["model"]
    assert model["path"] == "out/base/model"
    assert model["adapter"]["path"] == "out/lora/adapter"
    output = base.cluster.volume_path(f"{base.name}/models") / "out" / "lora"
    assert not (output / "model").exists()
    base.wait("y2svc/lora", "Ready", SERVICE_SECONDS)
    assert_learned(ask(base, "lora", NEW))
    base.kubectl("delete", "y2svc", "lora")


@pytest.mark.node
def test_a_merged_qlora_answers_alone(base: Namespace) -> None:
    run = run_of(
        "qlora",
        "out/base/model",
        "new.json",
        method={"qlora": ADAPTER},
        training={"learningRate": 5e-3, "precision": "bf16"},
    )
    run["spec"]["output"]["mergeAdapter"] = True
    base.apply(run, service_of("qlora"))
    base.wait("y2ft/qlora", "Complete", TRAINING_SECONDS)
    model = base.status("y2ft", "qlora")["model"]
    assert model["path"] == "out/qlora/model"
    assert "adapter" not in model
    base.wait("y2svc/qlora", "Ready", SERVICE_SECONDS)
    assert_learned(ask(base, "qlora", NEW))
    base.kubectl("delete", "y2svc", "qlora")


@pytest.mark.node
def test_inverted_labels_fail_the_assertion_that_the_same_run_passes(base: Namespace) -> None:
    """`base` learned the old answers, `inverted`, by the same job, everything else of the same data."""
    claims = base.cluster.volume_path(f"{base.name}/models")
    (claims / "patch").mkdir()
    (claims / "patch" / "sitecustomize.py").write_text(INVERT_LABELS)
    run = run_of("inverted", "random", "old.json")
    path = {"name": "PYTHONPATH", "value": f"/mnt/claims/models/patch:{_image_path()}"}
    run["spec"]["workers"]["env"] = [path]
    base.apply(run, service_of("inverted"), service_of("base"))
    base.wait("y2ft/inverted", "Complete", TRAINING_SECONDS)
    assert base.status("y2ft", "inverted")["loss"] < 1  # it learned something, only not the answers
    for name in ("base", "inverted"):
        base.wait(f"y2svc/{name}", "Ready", SERVICE_SECONDS)
    assert_learned(ask(base, "base", OLD))
    control = ask(base, "inverted", OLD)
    with pytest.raises(AssertionError, match="verbatim"):
        assert_learned(control)
    assert control.share < 0.1
    base.kubectl("delete", "y2svc", "base", "inverted")


def _image_path() -> str:
    """PYTHONPATH of the trainer image, which a variable of the pod replaces."""
    text = (install.REPOSITORY / "Dockerfile.train").read_text(encoding="utf-8")
    found = next(word for word in text.split() if word.startswith("PYTHONPATH="))
    return found.split("=", 1)[1].strip('"')
