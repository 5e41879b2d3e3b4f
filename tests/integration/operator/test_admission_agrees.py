"""The API server's rules and the operator's plan refuse the same resources, for the same reason."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from tests.support.finetunes import finetune_object
from yuan2_core.conflicts import job_conflicts
from yuan2_local.client import ApiError
from yuan2_operator.api.finetune import FineTuneSpec
from yuan2_operator.constants import KIND_FINETUNE
from yuan2_operator.plan.finetune import train_job
from yuan2_operator.plan.owner import Owner

pytestmark = pytest.mark.cluster

PATH = "/apis/yuan2.dev/v1alpha1/namespaces/default/yuan2finetunes?dryRun=All"
OWNER = Owner(KIND_FINETUNE, "agreed", "default", "uid", 1)
METHODS: tuple[dict[str, Any], ...] = (
    {"full": {}},
    {"lora": {}},
    {"lora": {"dora": True}},
    {"qlora": {}},
    {"qlora": {"dora": True}},
)
SIZES = ("2B", "51B", "102B", "custom")
STAGES = (None, 0, 2, 3)
OFFLOADS = ("none", "optimizer", "parameters")


def said(cluster: Any, spec: dict[str, Any]) -> str:
    """The API server's refusal of a spec; empty when it takes it."""
    try:
        cluster.client.request("POST", PATH, finetune_object("agreed", "default", **spec))
    except ApiError as error:
        return str(error)
    return ""


def conflicts(spec: dict[str, Any]) -> list[str]:
    """What the operator's plan has against it."""
    body = finetune_object("agreed", "default", **spec)["spec"]
    return list(job_conflicts(train_job(OWNER, FineTuneSpec.model_validate(body), 1)))


@pytest.mark.parametrize("size", SIZES)
def test_every_combination_of_method_stage_and_offload(control_plane, size):
    refusals = 0
    for method, stage, offload in itertools.product(METHODS, STAGES, OFFLOADS):
        deepspeed = {"stage": stage, "offload": offload}
        spec = {"model": {"size": size}, "method": {"full": None, **method}, "deepspeed": deepspeed}
        answer, wanted = said(control_plane, spec), conflicts(spec)
        assert bool(answer) == bool(wanted), (spec, answer, wanted)
        assert all(sentence in answer for sentence in wanted), (answer, wanted)
        refusals += bool(wanted)
    assert 0 < refusals < len(METHODS) * len(STAGES) * len(OFFLOADS)


HELD_OUT = ({}, {"evalFraction": 0.1}, {"evalSource": {"configMap": {"name": "a", "key": "b"}}})
JUDGED = ({}, {"sampleAnswers": 0}, {"sampleAnswers": 8}, {"everySteps": 5}, {"earlyStoppingPatience": 2})


def test_every_combination_of_held_out_data_and_evaluation(control_plane):
    for held_out, judged in itertools.product((*HELD_OUT, {**HELD_OUT[1], **HELD_OUT[2]}), JUDGED):
        spec = {"dataset": held_out, "evaluation": judged}
        answer, wanted = said(control_plane, spec), conflicts(spec)
        assert bool(answer) == bool(wanted), (spec, answer, wanted)
        assert all(sentence in answer for sentence in wanted), (answer, wanted)


CONFIG_MAP: dict[str, Any] = {"persistentVolumeClaim": None, "configMap": {"name": "a", "key": "b"}}
OBJECTIVES: tuple[dict[str, Any], ...] = (
    {},
    {"objective": {"sft": {}}},
    {"objective": {"dpo": {"beta": 0.2}}},
    {"objective": {"dpo": {}, "kto": {}}},
)
RATES: tuple[dict[str, Any], ...] = (
    {},
    {"schedule": "wsd", "decaySteps": 3, "minLearningRate": 1e-6},
    {"schedule": "wsd", "decaySteps": 3, "decayRatio": 0.1},
    {"decayRatio": 0.1},
    {"schedule": "constant", "minLearningRate": 1e-6},
    {"minLearningRate": 1},
    {"labelSmoothing": 0.1, "neftuneAlpha": 5},
)
FILES: tuple[dict[str, Any], ...] = (
    {},
    {"format": "openai"},
    {"files": [{"path": "."}, {"path": "a/b.json", "format": "openai", "weight": 0.5}]},
    {"files": [{"path": "a"}], "format": "openai"},
)


def test_every_combination_of_objective_and_learning_rate(control_plane):
    for objective, training in itertools.product(OBJECTIVES, RATES):
        spec = {**objective, "training": training}
        answer, wanted = said(control_plane, spec), conflicts(spec)
        assert bool(answer) == bool(wanted), (spec, answer, wanted)
        # A section that the schema refuses is not held against the rules of the whole spec.
        assert any(sentence in answer for sentence in wanted) or not wanted, (answer, wanted)


@pytest.mark.parametrize("dataset", FILES, ids=["none", "format", "files", "both"])
def test_files_of_a_data_set(control_plane, dataset):
    answer, wanted = said(control_plane, {"dataset": dataset}), conflicts({"dataset": dataset})
    assert bool(answer) == bool(wanted), (answer, wanted)
    assert all(sentence in answer for sentence in wanted), (answer, wanted)


@pytest.mark.parametrize("path", ["/a", "a/", "a/../b"])
def test_files_stay_below_their_directory_and_are_none_of_a_config_map(control_plane, path):
    assert "dataset.files: a path is relative" in said(
        control_plane, {"dataset": {"files": [{"path": path}]}}
    )
    spec = {"dataset": {"source": CONFIG_MAP, "files": [{"path": "a"}]}}
    assert "a key of a ConfigMap is one file" in said(control_plane, spec)
