"""Whole manifests of a FineTune, compared with files: what changes here changes in every cluster.

`YUAN2_UPDATE_GOLDEN=1` writes the files anew; look at the difference before it is committed.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from yuan2_operator.api.finetune import FineTuneSpec
from yuan2_operator.manifests.finetune import finetune_manifests
from yuan2_operator.plan.finetune import FineTunePlan, plan_finetune
from yuan2_operator.plan.owner import Owner

FOLDER = Path(__file__).parent / "manifests"
CASES = [("cpu", 1, 0), ("gpu", 3, 2), ("qlora", 1, 0)]


@pytest.mark.parametrize(("case", "attempt", "restarts"), CASES)
def test_manifests_are_those_of_the_file(case, attempt, restarts):
    resource = yaml.safe_load((FOLDER / f"{case}.in.yaml").read_text())
    plan = plan_finetune(
        Owner.of(resource),
        FineTuneSpec.model_validate(resource["spec"]),
        attempt=attempt,
        restarts=restarts,
        missing=(),
        default_image="registry.example/yuan2/train:1",
    )
    assert isinstance(plan, FineTunePlan)
    manifests = finetune_manifests(plan)
    expected = FOLDER / f"{case}.out.yaml"
    if os.environ.get("YUAN2_UPDATE_GOLDEN"):
        expected.write_text(yaml.safe_dump_all(manifests, sort_keys=False, width=110, allow_unicode=True))
    assert manifests == list(yaml.safe_load_all(expected.read_text()))
