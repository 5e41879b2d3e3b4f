"""Whole manifests of a Yuan2Service, compared with files that were read by people.

`YUAN2_UPDATE_GOLDEN=1 pytest tests/golden/test_service_manifests.py` writes them anew; review the difference.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from tests.support.services import finetune_of
from yuan2_operator.api.service import ServiceSpec, ServiceStatus
from yuan2_operator.manifests.service import service_manifests
from yuan2_operator.plan.owner import Owner
from yuan2_operator.plan.service import ServicePlan, plan_service

FOLDER = Path(__file__).parent / "manifests"
INPUTS = sorted(FOLDER.glob("service-*.input.yaml"))


@pytest.mark.parametrize("path", INPUTS, ids=[path.name.split(".")[0] for path in INPUTS])
def test_a_service_becomes_these_manifests(path: Path):
    body = yaml.safe_load(path.read_text(encoding="utf-8"))
    spec = ServiceSpec.model_validate(body["spec"])
    finetune = finetune_of() if spec.model.fine_tune_ref else None
    decision = plan_service(
        Owner.of(body),
        spec,
        ServiceStatus(),
        finetune=finetune,
        missing=(),
        default_image="registry.example/yuan2/serve:1",
        default_vllm_image="registry.example/yuan2/serve-vllm:1",
    )
    assert isinstance(decision, ServicePlan)
    made = service_manifests(decision)
    output = path.with_name(path.name.replace(".input.", ".output."))
    if os.environ.get("YUAN2_UPDATE_GOLDEN"):
        output.write_text(yaml.safe_dump_all(made, sort_keys=False, width=120), encoding="utf-8")
    assert made == list(yaml.safe_load_all(output.read_text(encoding="utf-8")))
